"""One name for each layer of a network, in whatever dialect a trainer or a file writes it."""

import re

PREFIXES = re.compile(r"^(base_model\.model\.|unet\.|transformer\.|lora_unet_|lora_transformer_)+")
"""What trainers put before a layer's name."""
RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
"""Layers of a residual block, as Stability AI's code and as diffusers calls them."""
RESAMPLER = ("op", "conv")
"""What the former calls the only layer of a downsampler and of an upsampler."""
BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)$")


def core(name: str) -> str:
    """Return a layer's name as diffusers gives it, with nothing before it, its parts joined by _.

    Stability AI's names of a U-Net's blocks, which sd-scripts writes for SDXL, are translated.
    """
    name = PREFIXES.sub("", name).replace(".processor", "").replace(".", "_")
    if not (found := BLOCK.match(name)):
        return name
    kind, first, second, layer = found.groups()
    if kind == "middle_block":
        # Its parts are counted through: residual block, attention, residual block.
        part = f"attentions_0_{layer}" if first == "1" else _resnet(int(first) // 2, layer)
        return f"mid_block_{part}"
    # Going down, the first block is the entry layer alone, and each third one a downsampler.
    block, place = divmod(int(first) - (kind == "input_blocks"), 3)
    side = "down" if kind == "input_blocks" else "up"
    if layer in RESAMPLER:
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    part = f"attentions_{place}_{layer}" if second == "1" else _resnet(place, layer)
    return f"{side}_blocks_{block}_{part}"


def _resnet(place: int, layer: str) -> str:
    return f"resnets_{place}_{RESNET.get(layer, layer)}"
