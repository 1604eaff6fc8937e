"""A layer has one name in every dialect; for SDXL's, diffusers' own converter is the reference."""

import re
from types import SimpleNamespace

import pytest
import torch
from unmemorize.shared.training.layer_names import core

ATTENTION = "transformer_blocks_0_attn1_to_v"
BLOCKS = [f"input_blocks_{place}_1" for place in (4, 5, 7, 8)]
BLOCKS += ["middle_block_1", *(f"output_blocks_{place}_1" for place in range(6))]
RESNETS = [f"input_blocks_{place}_0" for place in (1, 2, 4, 5, 7, 8)]
RESNETS += ["middle_block_0", "middle_block_2", *(f"output_blocks_{n}_0" for n in range(9))]
CONVOLUTIONS = ("in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection")
NAMES = [f"{block}_{layer}" for block in BLOCKS for layer in (ATTENTION, "proj_in")]
NAMES += [f"{block}_{layer}" for block in RESNETS for layer in CONVOLUTIONS]
NAMES += ["input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv",
          "output_blocks_5_2_conv"]  # fmt: skip


def test_names_of_sd_scripts_are_those_diffusers_converts_them_to():
    from diffusers import StableDiffusionXLPipeline

    state = {}
    for place, name in enumerate(NAMES):
        for factor in ("down", "up"):
            state[f"lora_unet_{name}.lora_{factor}.weight"] = torch.full((1, 1), float(place))
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(
        state, unet_config=SimpleNamespace(layers_per_block=2)
    )
    expected = {}
    for key, value in converted.items():
        expected[NAMES[int(value)]] = core(re.sub(r"[._]lora[._].*", "", key))
    assert expected.keys() == set(NAMES)
    assert {name: core(f"lora_unet_{name}") for name in NAMES} == expected
    assert len(set(expected.values())) == len(NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "mid_block.attentions.0.attn1.to_q",
        "unet.mid_block.attentions.0.attn1.to_q",
        "base_model.model.mid_block.attentions.0.attn1.to_q",
        "mid_block.attentions.0.attn1.processor.to_q",
        "lora_unet_mid_block_attentions_0_attn1_to_q",
        "lora_unet_middle_block_1_attn1_to_q",
    ],
)
def test_a_layer_is_the_same_in_every_dialect(name):
    assert core(name) == "mid_block_attentions_0_attn1_to_q"
    assert core(name.replace("to_q", "to_v")) != core(name)
