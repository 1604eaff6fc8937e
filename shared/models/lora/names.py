"""Where each module of a LoRA file belongs in a live pipeline, whoever named it.

Trainers name a layer as diffusers does, or as the authors of the network did; parts are joined by
dots or by underscores. The live network decides: a name counts when all layers are there that it
stands for.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .layer_names import cores

CARRIERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline that can carry a LoRA."""
Place = tuple[str, str]
"""Component of the pipeline and module in it, without the ``text_model.`` of transformers 4."""
NETWORK = re.compile(
    r"^(base_model\.model\.|diffusion_model\.|unet\.|transformer\.|lora_unet_|lora_transformer_"
    r"|lycoris_)*"
)
TEXT = re.compile(
    r"^(?:lora_te(?P<number>\d?)_|text_encoder(?:_(?P<second>[23]))?\."
    r"|(?:text_encoders\.)?(?P<name>clip_l|clip_g|t5xxl)\.(?:transformer\.)?)"
)
"""What trainers put before a layer's name: of the network; of a text encoder (kohya and OneTrainer,
diffusers, ComfyUI)."""
NUMBERS = {"clip_l": "", "clip_g": "2", "t5xxl": "3"}
SHORT = {"to_out": "to_out_0"}
"""A name that diffusers' attention processors shortened."""
AUTHORS: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {  # Lumina 2; in Z-Image the attention is called as its authors call it
        rf"((?:layers|noise_refiner|context_refiner)_\d+)_{theirs}": ours
        for theirs, ours in {
            "attention_qkv": (r"\1_attn_to_q", r"\1_attn_to_k", r"\1_attn_to_v"),
            "attention_out": (r"\1_attn_to_out_0",),
            r"feed_forward_w(\d)": (r"\1_feed_forward_linear_\2",),
            "adaLN_modulation_1": (r"\1_norm1_linear",),
        }.items()
    },
    {
        r"(\w+_\d+_attention)_qkv": (r"\1_to_q", r"\1_to_k", r"\1_to_v"),
        r"(\w+_\d+_attention)_out": (r"\1_to_out_0",),
        r"x_embedder": ("all_x_embedder_2-1",),
        r"final_layer_(linear|adaLN_modulation_1)": (r"all_final_layer_2-1_\1",),
    },
    {  # Flux 2
        r"double_blocks_(\d+)_img_mlp_0": (r"transformer_blocks_\1_ff_linear_in",),
        r"double_blocks_(\d+)_img_mlp_2": (r"transformer_blocks_\1_ff_linear_out",),
        r"double_blocks_(\d+)_txt_mlp_0": (r"transformer_blocks_\1_ff_context_linear_in",),
        r"double_blocks_(\d+)_txt_mlp_2": (r"transformer_blocks_\1_ff_context_linear_out",),
        r"single_blocks_(\d+)_linear1": (r"single_transformer_blocks_\1_attn_to_qkv_mlp_proj",),
        r"single_blocks_(\d+)_linear2": (r"single_transformer_blocks_\1_attn_to_out",),
        r"(single_stream|double_stream)_modulation(_img|_txt)?_lin": (r"\1_modulation\2_linear",),
    },
    {  # HunyuanVideo
        r"double_blocks_(\d+)_img_mlp_fc1": (r"transformer_blocks_\1_ff_net_0_proj",),
        r"double_blocks_(\d+)_img_mlp_fc2": (r"transformer_blocks_\1_ff_net_2",),
        r"double_blocks_(\d+)_txt_mlp_fc1": (r"transformer_blocks_\1_ff_context_net_0_proj",),
        r"double_blocks_(\d+)_txt_mlp_fc2": (r"transformer_blocks_\1_ff_context_net_2",),
        r"double_blocks_(\d+)_img_mod_linear": (r"transformer_blocks_\1_norm1_linear",),
        r"double_blocks_(\d+)_txt_mod_linear": (r"transformer_blocks_\1_norm1_context_linear",),
        r"single_blocks_(\d+)_modulation_linear": (r"single_transformer_blocks_\1_norm_linear",),
        **{
            rf"txt_in_individual_token_refiner_blocks_(\d+)_{theirs}": tuple(
                rf"context_embedder_token_refiner_refiner_blocks_\1_{each}" for each in ours
            )
            for theirs, ours in {
                "self_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
                "self_attn_proj": ("attn_to_out_0",),
                "mlp_fc1": ("ff_net_0_proj",),
                "mlp_fc2": ("ff_net_2",),
                "adaLN_modulation_1": ("norm_out_linear",),
            }.items()
        },
    },
    {  # Wan
        r"(blocks_\d+)_self_attn_([qkv])": (r"\1_attn1_to_\2",),
        r"(blocks_\d+)_self_attn_o": (r"\1_attn1_to_out_0",),
        r"(blocks_\d+)_cross_attn_([qkv])": (r"\1_attn2_to_\2",),
        r"(blocks_\d+)_cross_attn_o": (r"\1_attn2_to_out_0",),
        r"(blocks_\d+)_cross_attn_([kv])_img": (r"\1_attn2_add_\2_proj",),
        r"(blocks_\d+)_ffn_0": (r"\1_ffn_net_0_proj",),
        r"(blocks_\d+)_ffn_2": (r"\1_ffn_net_2",),
        r"time_projection_1": ("condition_embedder_time_proj",),
        r"(time|text)_embedding_0": (r"condition_embedder_\1_embedder_linear_1",),
        r"(time|text)_embedding_2": (r"condition_embedder_\1_embedder_linear_2",),
        r"head_head": ("proj_out",),
    },
    {  # Cosmos Predict 2, Anima
        r"blocks_(\d+)_self_attn_([qkv])_proj": (r"transformer_blocks_\1_attn1_to_\2",),
        r"blocks_(\d+)_self_attn_output_proj": (r"transformer_blocks_\1_attn1_to_out_0",),
        r"blocks_(\d+)_cross_attn_([qkv])_proj": (r"transformer_blocks_\1_attn2_to_\2",),
        r"blocks_(\d+)_cross_attn_output_proj": (r"transformer_blocks_\1_attn2_to_out_0",),
        r"blocks_(\d+)_mlp_layer1": (r"transformer_blocks_\1_ff_net_0_proj",),
        r"blocks_(\d+)_mlp_layer2": (r"transformer_blocks_\1_ff_net_2",),
        r"blocks_(\d+)_adaln_modulation_self_attn_([12])": (
            r"transformer_blocks_\1_norm1_linear_\2",
        ),
        r"blocks_(\d+)_adaln_modulation_cross_attn_([12])": (
            r"transformer_blocks_\1_norm2_linear_\2",
        ),
        r"blocks_(\d+)_adaln_modulation_mlp_([12])": (r"transformer_blocks_\1_norm3_linear_\2",),
        r"final_layer_adaln_modulation_([12])": (r"norm_out_linear_\1",),
    },
    {  # Sana, PixArt
        r"blocks_(\d+)_attn_qkv": tuple(rf"transformer_blocks_\1_attn1_to_{x}" for x in "qkv"),
        r"blocks_(\d+)_attn_proj": (r"transformer_blocks_\1_attn1_to_out_0",),
        r"blocks_(\d+)_cross_attn_q_linear": (r"transformer_blocks_\1_attn2_to_q",),
        r"blocks_(\d+)_cross_attn_kv_linear": (
            r"transformer_blocks_\1_attn2_to_k", r"transformer_blocks_\1_attn2_to_v",
        ),
        r"blocks_(\d+)_cross_attn_proj": (r"transformer_blocks_\1_attn2_to_out_0",),
        r"blocks_(\d+)_mlp_fc1": (r"transformer_blocks_\1_ff_net_0_proj",),
        r"blocks_(\d+)_mlp_fc2": (r"transformer_blocks_\1_ff_net_2",),
        r"blocks_(\d+)_mlp_(inverted|depth|point)_conv_conv": (
            r"transformer_blocks_\1_ff_conv_\2",
        ),
    },
    {  # Krea 2
        r"blocks_(\d+)_attn_w([qkv])": (r"transformer_blocks_\1_attn_to_\2",),
        r"blocks_(\d+)_attn_wo": (r"transformer_blocks_\1_attn_to_out_0",),
        r"blocks_(\d+)_attn_gate": (r"transformer_blocks_\1_attn_to_gate",),
        r"blocks_(\d+)_mlp_(gate|up|down)": (r"transformer_blocks_\1_ff_\2",),
        r"txtfusion_(\w+_blocks_\d+)_attn_w([qkv])": (r"text_fusion_\1_attn_to_\2",),
        r"txtfusion_(\w+_blocks_\d+)_attn_wo": (r"text_fusion_\1_attn_to_out_0",),
        r"txtfusion_(\w+_blocks_\d+)_attn_gate": (r"text_fusion_\1_attn_to_gate",),
        r"txtfusion_(\w+_blocks_\d+)_mlp_(gate|up|down)": (r"text_fusion_\1_ff_\2",),
    },
)  # fmt: skip
"""Names of layers by the networks' authors, and by diffusers; what joins several layers has several
names, in the order of its rows. Stable Diffusion, SDXL, SD3 and Flux: `layer_names.cores`."""


class LiveNames:
    """The layers of a pipeline by every name that files give them."""

    def __init__(self, pipeline: Any):
        """Look at the components that can carry a LoRA."""
        self.layers: dict[str, dict[str, tuple[str, nn.Module]]] = {}
        self._swapped: set[Place] = set()
        for component in CARRIERS:
            part = getattr(pipeline, component, None)
            if isinstance(part, nn.Module):
                self.layers[component] = self._of(component, part)
        self.denoiser = "unet" if "unet" in self.layers else "transformer"
        config = getattr(getattr(pipeline, "unet", None), "config", {})
        depth = config.get("layers_per_block", 2)
        self._depth = depth if isinstance(depth, int) else 2

    def _of(self, component: str, part: nn.Module) -> dict[str, tuple[str, nn.Module]]:
        """Return names and layers of one component by their names with underscores."""
        found: dict[str, tuple[str, nn.Module]] = {}
        for name, layer in part.named_modules():
            if getattr(layer, "weight", None) is None:
                continue
            short = name.removeprefix("text_model.")
            found[short.replace(".", "_")] = short, layer
            above = part.get_submodule(name.rpartition(".")[0])
            if type(above).__name__ == "AdaLayerNormContinuous":
                self._swapped.add((component, short))
        return found

    def locate(self, stem: str, rows: int | None) -> list[Place] | None:
        """Return the places of the layers that a module's rows change, in order; None for none.

        Args:
            stem: What stands before the factor's name in a key.
            rows: Of the module's change; None for one that cannot be split.
        """
        component, name = self._component(stem)
        layers = self.layers.get(component, {})
        for names in self._spellings(component, name):
            there = [layers[each] for each in names if each in layers]
            places = [(component, short) for short, _ in there]
            if len(there) == len(names) and (
                len(names) == 1 or sum(map(self.rows, places)) == rows
            ):
                return places
        return None

    def rows(self, place: Place) -> int:
        """Return how many rows the weight of a layer has."""
        layer: Any = self.layers[place[0]][place[1].replace(".", "_")][1]
        return getattr(layer, "out_features", None) or len(layer.weight)  # codes have another shape

    def swaps(self, stem: str, place: Place) -> bool:
        """Return whether diffusers keeps scale and shift of a layer in the other order.

        That is so in its AdaLayerNormContinuous, for names that are not its own.
        """
        _, name = self._component(stem)
        return place in self._swapped and name != place[1].replace(".", "_")

    def _component(self, stem: str) -> tuple[str, str]:
        """Return component and the layer's name in it, parts joined by underscores."""
        if match := TEXT.match(stem):
            number = match["number"] or match["second"] or NUMBERS.get(match["name"] or "", "")
            component = f"text_encoder_{number}" if number in ("2", "3") else "text_encoder"
            if component == "text_encoder_3" and component not in self.layers:
                component = "text_encoder_2"  # T5 is Flux' second encoder
            rest = stem[match.end() :]
        else:
            rest = NETWORK.sub("", stem)
            is_text = rest.startswith(("text_model.", "encoder.layers."))  # PEFT on an encoder
            component = "text_encoder" if is_text else self.denoiser
        flat = rest.replace(".processor.", ".").replace(".", "_")
        return component, flat.removeprefix("text_model_")

    def _spellings(self, component: str, name: str) -> Iterator[tuple[str, ...]]:
        """Yield what diffusers may call a layer, by each author's table."""
        yield (name,)
        for short, long in SHORT.items():
            if name.endswith(f"_{short}"):
                yield (name.removesuffix(short) + long,)
        if component != self.denoiser:
            return
        yield cores(name, self._depth)
        for table in AUTHORS:
            for theirs, ours in table.items():
                if match := re.fullmatch(theirs, name):
                    yield tuple(match.expand(each) for each in ours)
