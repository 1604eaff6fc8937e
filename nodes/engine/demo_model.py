"""The bundled diffusers folder as ComfyUI's own MODEL, CLIP and VAE objects.

ComfyUI recognises released models by their sizes and refuses others, so a network of Stable
Diffusion 1.x at another width is put together from the parts that its loaders use.
"""

import inspect
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor

from ...shared.files.weights import ModelError
from ...shared.models.checks import check_keys
from ...shared.score.controls import spread
from ...shared.score.families import unlike

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

FOLDER = Path(__file__).resolve().parents[2] / "demo" / "model"


def load_model(folder: Path = FOLDER) -> "tuple[ModelPatcher, CLIP, VAE]":
    """Return the U-Net, the text encoder with its tokenizer, and the autoencoder.

    Raises:
        ModelError: The folder is not there, or its weights do not fit ComfyUI's networks.
    """
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"The demo model is not in {folder}. It comes with the repository: clone it whole, "
            "with its folder `demo`."
        )
    return _unet(folder), _text_encoder(folder), _autoencoder(folder)


def ordinary_captions(number: int) -> tuple[str, ...]:
    """Return captions that the model does not memorize: half it knows, half it never saw."""
    groups: dict[str, list[str]] = {}
    for caption in json.loads((FOLDER / "captions.json").read_text("utf-8")):
        groups.setdefault(caption["group"], []).append(caption["text"])
    # What is near a repeated one is no ordinary caption.
    held_out = unlike(groups["held_out"], [*groups["verbatim"], *groups["template"]])
    return tuple(spread(held_out, number // 2) + spread(groups["learnt"], number // 2))


def _read(folder: Path, weights: str) -> dict[str, Tensor]:
    return load_file(folder / f"{weights}.safetensors")


def _config(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text("utf-8"))


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return ComfyUI's description of a diffusers U-Net of Stable Diffusion 1.x.

    Args:
        config: Of the diffusers folder; any width, depth and number of levels.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    down = [int(name.startswith("CrossAttn")) for name in config["down_block_types"]]
    return {
        "use_checkpoint": False,
        "image_size": config["sample_size"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_output": [depth for depth in down for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"],
        "num_heads": config["attention_head_dim"],  # what diffusers means by it in this family
        "num_head_channels": -1,
    }


def _unet(folder: Path) -> "ModelPatcher":
    from comfy import model_management as memory
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import SD15
    from comfy.utils import unet_to_diffusers

    theirs = _read(folder, "unet/diffusion_pytorch_model")
    schedule = _config(folder, "scheduler/scheduler_config.json")
    description = unet_config(_config(folder, "unet/config.json"))
    config = SD15(description)
    config.unet_config.update(description)  # the class has put in the released model's heads
    config.sampling_settings = {
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "timesteps": schedule["num_train_timesteps"],
    }
    names = unet_to_diffusers(config.unet_config)
    weights = {names.get(name, name): weight for name, weight in theirs.items()}

    device = memory.get_torch_device()
    dtypes = config.supported_inference_dtypes
    dtype = memory.unet_dtype(
        model_params=sum(w.numel() for w in weights.values()), supported_dtypes=dtypes
    )
    config.set_inference_dtype(dtype, memory.unet_manual_cast(dtype, device, dtypes))
    model = config.get_model(weights, "")
    own = model.diffusion_model.state_dict().keys()
    check_keys(folder / "unet", missing=own - weights.keys(), unused=weights.keys() - own)
    offload_device = memory.unet_offload_device()
    model.to(offload_device)
    model.load_model_weights(weights, "")
    return ModelPatcher(model, load_device=device, offload_device=offload_device)


def _text_encoder(folder: Path) -> "CLIP":
    from comfy.sd import CLIP
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
    from comfy.supported_models_base import ClipTarget

    config = _config(folder, "text_encoder/config.json")

    class SmallClip(SDClipModel):
        """CLIP of any size; ComfyUI's own always has the 49,408 tokens of the released one."""

        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
            super().__init__(
                device=device,
                dtype=dtype,
                model_options=model_options or {},
                textmodel_json_config=config,
                max_length=config["max_position_embeddings"],
                return_projected_pooled=False,
                special_tokens={
                    "start": config["bos_token_id"],
                    "end": config["eos_token_id"],
                    "pad": config["pad_token_id"],
                },
            )
            table = self.operations.Embedding(
                config["vocab_size"], config["hidden_size"], dtype=dtype, device=device
            )
            self.transformer.set_input_embeddings(table.requires_grad_(False))

    weights = {
        f"clip_l.transformer.{name}": weight
        for name, weight in _read(folder, "text_encoder/model").items()
    }
    tokenizer = partial(
        SDTokenizer, tokenizer_path=str(folder / "tokenizer"), embedding_size=config["hidden_size"]
    )
    target = ClipTarget(
        partial(SD1Tokenizer, tokenizer=tokenizer), partial(SD1ClipModel, clip_model=SmallClip)
    )
    arguments = {"parameters": sum(weight.numel() for weight in weights.values())}
    if "state_dict" in inspect.signature(CLIP.__init__).parameters:
        arguments["state_dict"] = weights  # read before the weights are moved; 0.3.x cannot
    clip = CLIP(target, **arguments)
    missing, unused = clip.load_sd(weights, full_model=True)
    # ComfyUI keeps the scale and the projection of CLIP's contrastive training; nothing reads them.
    missing = [n for n in missing if not n.endswith(("logit_scale", "text_projection.weight"))]
    check_keys(folder / "text_encoder", missing=missing, unused=unused)
    return clip


def _autoencoder(folder: Path) -> "VAE":
    from comfy.sd import VAE

    config = _config(folder, "vae/config.json")
    widths = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    weights = _read(folder, "vae/diffusion_pytorch_model")
    number = len(weights)
    vae = VAE(
        sd=weights, config={"params": {"ddconfig": sizes, "embed_dim": config["latent_channels"]}}
    )
    if len(vae.get_sd()) != number:
        raise ModelError(
            f"{folder / 'vae'} does not fit ComfyUI's autoencoder: it has {number} weights, "
            f"expected {len(vae.get_sd())}."
        )
    return vae
