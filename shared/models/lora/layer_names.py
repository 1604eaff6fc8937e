"""The names of a network's layers: from any dialect of a trainer or file to that of diffusers.

Stability AI's and Black Forest Labs' code joins layers that read the same input: such a layer has
several names in diffusers.
"""

import re

TEXT_FED = r"attn2[._](processor\.)?to_[kv]$|(^|[._])context_embedder$"
"""Modules whose input is the text encoder's output: cross-attention of SD 1, SD 2 and SDXL, and the
entry layer of SD3 and Flux, which trainers train only on request."""
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
"""What Stability AI calls the only layer of a downsampler and of an upsampler."""
BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)$")

IMAGE = ("attn_to_q", "attn_to_k", "attn_to_v")
TEXT = ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj")
JOINT = {
    "joint_blocks": {  # SD3
        "x_block_attn_qkv": IMAGE,
        "x_block_attn_proj": ("attn_to_out_0",),
        "x_block_attn2_qkv": ("attn2_to_q", "attn2_to_k", "attn2_to_v"),
        "x_block_attn2_proj": ("attn2_to_out_0",),
        "x_block_mlp_fc1": ("ff_net_0_proj",),
        "x_block_mlp_fc2": ("ff_net_2",),
        "x_block_adaLN_modulation_1": ("norm1_linear",),
        "context_block_attn_qkv": TEXT,
        "context_block_attn_proj": ("attn_to_add_out",),
        "context_block_mlp_fc1": ("ff_context_net_0_proj",),
        "context_block_mlp_fc2": ("ff_context_net_2",),
        "context_block_adaLN_modulation_1": ("norm1_context_linear",),
    },
    "double_blocks": {  # Flux
        "img_attn_qkv": IMAGE,
        "img_attn_proj": ("attn_to_out_0",),
        "img_mlp_0": ("ff_net_0_proj",),
        "img_mlp_2": ("ff_net_2",),
        "img_mod_lin": ("norm1_linear",),
        "txt_attn_qkv": TEXT,
        "txt_attn_proj": ("attn_to_add_out",),
        "txt_mlp_0": ("ff_context_net_0_proj",),
        "txt_mlp_2": ("ff_context_net_2",),
        "txt_mod_lin": ("norm1_context_linear",),
    },
    "single_blocks": {  # Flux
        "linear1": (*IMAGE, "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation_lin": ("norm_linear",),
    },
}
"""Layers of blocks with joint attention, as their authors' code and as diffusers calls them."""
JOINT_BLOCK = re.compile(rf"^({'|'.join(JOINT)})_(\d+)_(.+)$")
BLOCKS = {"single_blocks": "single_transformer_blocks"}
"""What diffusers calls them; it calls the others `transformer_blocks`."""
ENDS = {
    "img_in": "x_embedder",
    "x_embedder_proj": "pos_embed_proj",
    "txt_in": "context_embedder",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out_linear",
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
"""Layers outside of the blocks, in the same dialects."""


def cores(name: str, depth: int = 2) -> tuple[str, ...]:
    """Return the names that diffusers gives to a layer, without prefixes, parts joined by _.

    A layer that joins several layers has several names. A name of no known dialect stays as it is.

    Args:
        name: In any dialect.
        depth: Residual blocks in each block of the U-Net, by which Stability AI's names count.
    """
    name = PREFIXES.sub("", name).replace(".processor", "").replace(".", "_")
    if name in ENDS:
        return (ENDS[name],)
    if match := BLOCK.match(name):
        return (_of_unet(depth, *match.groups()),)
    if match := JOINT_BLOCK.match(name):
        stack, place, layer = match.groups()
        block = f"{BLOCKS.get(stack, 'transformer_blocks')}_{place}"
        return tuple(f"{block}_{each}" for each in JOINT[stack].get(layer, (layer,)))
    return (name,)


def _of_unet(depth: int, stack: str, first: str, second: str | None, layer: str) -> str:
    """Translate Stability AI's name of a layer, which sd-scripts writes for SDXL."""
    if stack == "middle_block":
        # Its parts are counted through: residual block, attention, residual block.
        part = f"attentions_0_{layer}" if first == "1" else _resnet(int(first) // 2, layer)
        return f"mid_block_{part}"
    # Going down, the first block is the entry layer alone, and the last of each a downsampler.
    block, place = divmod(int(first) - (stack == "input_blocks"), depth + 1)
    side = "down" if stack == "input_blocks" else "up"
    if layer in RESAMPLER:
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    part = f"attentions_{place}_{layer}" if second == "1" else _resnet(place, layer)
    return f"{side}_blocks_{block}_{part}"


def _resnet(place: int, layer: str) -> str:
    return f"resnets_{place}_{RESNET.get(layer, layer)}"
