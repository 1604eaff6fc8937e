"""LoRAs under the names of a network's authors; diffusers' own converters are the reference.

A factor B numbers its rows, so that the reference shows where each row of a layer ends up.
"""

import inspect

import pytest
import torch
from safetensors.torch import save_file
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.lora.attach import load_lora
from unmemorize.shared.models.lora.files import read_lora
from unmemorize.shared.models.lora.names import LiveNames

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")

MMDIT = {
    f"joint_blocks.{block}.{stream}_block.{layer}": rows
    for block in (0, 1)
    for stream in ("x", "context")
    for layer, rows in {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": 1,
                        "adaLN_modulation.1": 6}.items()
    if block == 0 or stream == "x" or layer == "attn.qkv"  # the last one has no text at its end
} | {
    "joint_blocks.0.x_block.attn2.qkv": 3, "joint_blocks.0.x_block.attn2.proj": 1,
    "joint_blocks.0.x_block.adaLN_modulation.1": 9,
    "joint_blocks.1.context_block.adaLN_modulation.1": 2, "final_layer.adaLN_modulation.1": 2,
    "context_embedder": 1, "x_embedder.proj": 1,
}  # fmt: skip
STREAMS = {
    f"double_blocks.0.{stream}_{layer}": rows
    for stream in ("img", "txt")
    for layer, rows in {"attn.qkv": 3, "attn.proj": 1, "mlp.0": 4, "mlp.2": 1}.items()
}
FLUX = STREAMS | {
    "double_blocks.0.img_mod.lin": 6, "double_blocks.0.txt_mod.lin": 6,
    "single_blocks.0.linear1": 7, "single_blocks.0.linear2": 1, "single_blocks.0.modulation.lin": 3,
    "img_in": 1, "txt_in": 1, "final_layer.adaLN_modulation.1": 2,
}  # fmt: skip
FLUX_2 = STREAMS | {
    "double_blocks.0.img_mlp.0": 6, "double_blocks.0.txt_mlp.0": 6,
    "single_blocks.0.linear1": 9, "single_blocks.0.linear2": 1, "single_stream_modulation.lin": 3,
    "double_stream_modulation_img.lin": 6, "double_stream_modulation_txt.lin": 6,
    "final_layer.adaLN_modulation.1": 2,
}  # fmt: skip
HUNYUAN = {
    **{f"double_blocks.0.{stream}_{layer}": rows for stream in ("img", "txt")
       for layer, rows in {"attn_qkv": 3, "attn_proj": 1, "mlp.fc1": 4, "mlp.fc2": 1,
                           "mod.linear": 6}.items()},
    "single_blocks.0.linear1": 7, "single_blocks.0.linear2": 1,
    "single_blocks.0.modulation.linear": 3, "final_layer.adaLN_modulation.1": 2,
    **{f"txt_in.individual_token_refiner.blocks.1.{layer}": rows
       for layer, rows in {"self_attn_qkv": 3, "self_attn_proj": 1, "mlp.fc1": 4, "mlp.fc2": 1,
                           "adaLN_modulation.1": 2}.items()},
}  # fmt: skip
LUMINA = {
    f"{stack}.0.{layer}": rows
    for stack in ("layers", "noise_refiner", "context_refiner")
    for layer, rows in {"attention.qkv": 5 / 3, "attention.out": 1, "feed_forward.w1": 4,
                        "feed_forward.w2": 1, "feed_forward.w3": 4,
                        "adaLN_modulation.1": 4}.items()
    if (stack, layer) != ("context_refiner", "adaLN_modulation.1")
}  # fmt: skip
Z_IMAGE = {
    **{f"{stack}.0.{layer}": rows for stack in ("layers", "noise_refiner", "context_refiner")
       for layer, rows in {"attention.qkv": 3, "attention.out": 1, "feed_forward.w1": 2,
                           "feed_forward.w2": 1, "feed_forward.w3": 2}.items()},
    "layers.0.adaLN_modulation.0": 4, "x_embedder": 1, "final_layer.linear": 1,
}  # fmt: skip
WAN = {
    **{f"blocks.0.{attention}.{layer}": 1 for attention in ("self_attn", "cross_attn")
       for layer in "qkvo"},
    "blocks.0.ffn.0": 2, "blocks.0.ffn.2": 1, "time_embedding.0": 1, "time_embedding.2": 1,
    "time_projection.1": 6, "text_embedding.0": 1, "text_embedding.2": 1, "head.head": 1,
}  # fmt: skip
COSMOS = {
    **{f"blocks.0.{attention}.{layer}_proj": 1 for attention in ("self_attn", "cross_attn")
       for layer in ("q", "k", "v", "output")},
    **{f"blocks.0.adaln_modulation_{part}.{place}": 1 for part in ("self_attn", "cross_attn", "mlp")
       for place in (1, 2)},
    "blocks.0.mlp.layer1": 4, "blocks.0.mlp.layer2": 1,
}  # fmt: skip
SANA = {
    "blocks.0.attn.qkv": 3, "blocks.0.attn.proj": 1, "blocks.0.cross_attn.q_linear": 1,
    "blocks.0.cross_attn.kv_linear": 2, "blocks.0.cross_attn.proj": 1,
    "blocks.0.mlp.inverted_conv.conv": 5, "blocks.0.mlp.point_conv.conv": 1,
}  # fmt: skip
KREA_2 = {
    **{f"blocks.0.attn.{layer}": 1 for layer in ("wq", "wk", "wv", "wo", "gate")},
    **{f"blocks.0.mlp.{layer}": 1 for layer in ("gate", "up", "down")},
    **{f"txtfusion.refiner_blocks.1.{layer}": 1
       for layer in ("attn.wq", "attn.wk", "attn.wv", "attn.wo", "attn.gate", "mlp.up")},
}  # fmt: skip

ONE = {"num_layers": 1}
FAMILIES = {
    "SD3": ("StableDiffusion3Pipeline", "SD3Transformer2DModel",
            {"num_layers": 2, "dual_attention_layers": (0,)}, 1152, MMDIT),
    "Flux": ("FluxPipeline", "FluxTransformer2DModel", ONE | {"num_single_layers": 1}, 3072, FLUX),
    "Flux 2": ("Flux2Pipeline", "Flux2Transformer2DModel", ONE | {"num_single_layers": 1}, 6144,
               FLUX_2),
    "HunyuanVideo": ("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel",
                     ONE | {"num_single_layers": 1}, 3072, HUNYUAN),
    "Lumina 2": ("Lumina2Pipeline", "Lumina2Transformer2DModel", ONE, 2304, LUMINA),
    "Z-Image": ("ZImagePipeline", "ZImageTransformer2DModel", {"n_layers": 1}, 3840, Z_IMAGE),
    "Wan": ("WanPipeline", "WanTransformer3DModel", ONE, 5120, WAN),
    "Cosmos": ("Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", ONE, 4096, COSMOS),
    "Sana": ("SanaPipeline", "SanaTransformer2DModel", ONE, 2240, SANA),
    "Krea 2": ("Krea2Pipeline", "Krea2Transformer2DModel", {"num_layers": 1}, 64, KREA_2),
}  # fmt: skip


def pipeline_of(name: str, transformer_name: str, settings: dict):
    """Return a pipeline of which the network alone is there, at its real size, without weights."""
    import diffusers

    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        transformer = getattr(diffusers, transformer_name)(**settings)
    cls = getattr(diffusers, name)
    needed = [p.name for p in inspect.signature(cls.__init__).parameters.values()
              if p.default is p.empty and p.name != "self"]  # fmt: skip
    parts = dict.fromkeys(needed) | {"transformer": transformer}
    if "safety_checker" in inspect.signature(cls.__init__).parameters:
        parts["safety_checker"] = torch.nn.Identity()  # Cosmos asks for one by force
    return cls(**parts)


class Checkpoint(dict):
    """A model's weights, of which only some matter."""

    def pop(self, key, *default):
        return super().pop(key, *default or (torch.zeros(21504, 1),))


def reference(pipeline, numbered: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the rows of the live layers as diffusers reads them from a whole checkpoint."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CONVERTERS

    convert = CONVERTERS[type(pipeline.transformer).__name__]["checkpoint_mapping_fn"]
    state = Checkpoint({f"{stem}.weight": rows for stem, rows in numbered.items()})
    layers = dict(pipeline.transformer.named_modules())
    return {
        key.removesuffix(".weight"): value.flatten()
        for key, value in convert(checkpoint=state, config={}).items()
        if value is not None and value.any() and key.removesuffix(".weight") in layers
    }


def lora(tmp_path, numbered: dict[str, torch.Tensor], spell, down: str, up: str):
    state = {}
    for stem, rows in numbered.items():
        state |= {f"{spell(stem)}.{down}": torch.ones(1, 1), f"{spell(stem)}.{up}": rows}
    save_file(state, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


SPELLINGS = {
    "sd-scripts": (lambda stem: f"lora_unet_{stem.replace('.', '_')}", "lora_down.weight",
                   "lora_up.weight"),
    "ComfyUI": (lambda stem: f"diffusion_model.{stem}", "lora_A.weight", "lora_B.weight"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_up_where_diffusers_puts_those_of_a_checkpoint(tmp_path, family, spelling):
    name, transformer, settings, width, stems = FAMILIES[family]
    pipeline = pipeline_of(name, transformer, settings)
    numbered, first = {}, 1
    for stem, rows in stems.items():
        count = round(rows * width)
        numbered[stem] = torch.arange(first, first + count, dtype=torch.float32)[:, None]
        first += count
    expected = reference(pipeline, {stem: rows.clone() for stem, rows in numbered.items()})
    read = read_lora(pipeline, lora(tmp_path, numbered, *SPELLINGS[spelling])).modules
    assert {component for component, _ in read} == {"transformer"}
    assert {name for _, name in read} == expected.keys()
    for (_, layer), pair in read.items():
        assert torch.equal(pair.b.flatten(), expected[layer]), layer
    assert sum(len(pair.b) for pair in read.values()) == first - 1


PLAIN = {
    "base_model.model.": "PEFT", "transformer.": "ai-toolkit", "diffusion_model.": "ComfyUI",
    "lora_transformer_": "OneTrainer", "lora_unet_": "musubi", "lycoris_": "SimpleTuner",
}  # fmt: skip
DIFFUSERS_NAMES = {
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", ONE),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", ONE),
    "ZImagePipeline": ("ZImageTransformer2DModel", {"n_layers": 1}),
    "Flux2KleinPipeline": ("Flux2Transformer2DModel", ONE | {"num_single_layers": 1}),
    "ChromaPipeline": ("ChromaTransformer2DModel", ONE | {"num_single_layers": 1}),
    "AuraFlowPipeline": ("AuraFlowTransformer2DModel",
                         {"num_mmdit_layers": 1, "num_single_dit_layers": 1}),
    "HiDreamImagePipeline": ("HiDreamImageTransformer2DModel",
                             {"patch_size": 2, "num_layers": 1, "num_single_layers": 1,
                              "caption_channels": [64, 64], "llama_layers": [0]}),
    "ErnieImagePipeline": ("ErnieImageTransformer2DModel", ONE),
    "CogView4Pipeline": ("CogView4Transformer2DModel", ONE),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", ONE),
    "LTXPipeline": ("LTXVideoTransformer3DModel", ONE),
    "WanPipeline": ("WanTransformer3DModel", ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSERS_NAMES)
@pytest.mark.parametrize("prefix", PLAIN)
def test_names_of_diffusers_are_found_behind_every_prefix(name, prefix):
    """Each layer under its own name, no two layers under one."""
    pipeline = pipeline_of(name, *DIFFUSERS_NAMES[name])
    live = LiveNames(pipeline)
    for layer, module in pipeline.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            stem = prefix + (layer if prefix.endswith(".") else layer.replace(".", "_"))
            place = ("transformer", layer)
            assert live.locate(stem, len(module.weight)) == [place]
            assert not live.swaps(stem, place)


def test_a_layer_that_is_not_there_is_named(tmp_path):
    pipeline = pipeline_of("QwenImagePipeline", "QwenImageTransformer2DModel", ONE)
    rows = {"transformer_blocks.0.attn.to_x": torch.ones(3, 1)}
    with pytest.raises(ModelError, match=r"1 module is not in it: transformer.*attn\.to_x"):
        load_lora(pipeline, lora(tmp_path, rows, *SPELLINGS["ComfyUI"]))


def test_what_a_converter_loses_is_noticed(tmp_path):
    """These names stand in no table here; the first converter is diffusers' own."""
    whole = pipeline_of("Krea2Pipeline", "Krea2Transformer2DModel", ONE)
    path = lora(tmp_path, {"first": torch.ones(9, 1), "tmlp.0": torch.ones(9, 1)},
                *SPELLINGS["ComfyUI"])  # fmt: skip
    names = {name for _, name in read_lora(whole, path).modules}
    assert names == {"img_in", "time_embed.linear_1"}

    class Forgetful(type(whole)):
        @classmethod
        def lora_state_dict(cls, state, **options):
            kept = {key: value for key, value in state.items() if "tmlp" not in key}
            return super().lora_state_dict(kept, **options)

    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    with pytest.raises(ModelError, match="does not know all of them"):
        read_lora(Forgetful(**parts, transformer=whole.transformer), path)
