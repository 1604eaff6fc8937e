"""Layers have their names of diffusers in every dialect; its own converters are the reference."""

import re
from types import SimpleNamespace

import pytest
import torch
from small_text import subspace_of
from unmemorize.shared.models.lora.layer_names import JOINT, cores
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

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
        expected[NAMES[int(value)]] = cores(re.sub(r"[._]lora[._].*", "", key))
    assert expected.keys() == set(NAMES)
    assert {name: cores(f"lora_unet_{name}") for name in NAMES} == expected
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
    assert cores(name) == ("mid_block_attentions_0_attn1_to_q",)
    assert cores(name.replace("to_q", "to_v")) != cores(name)


def test_layers_outside_of_the_blocks_are_those_diffusers_loads_them_as():
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    known = DIFFUSERS_TO_LDM_MAPPING["unet"]
    layers = known["layers"] | known["addition_embed_type"]
    for ours, theirs in layers.items():
        if not ours.startswith("conv_norm"):
            name = theirs.rpartition(".")[0]
            assert cores(f"lora_unet_{name}".replace(".", "_")) == cores(ours.rpartition(".")[0])


def by_marker(state: dict[str, torch.Tensor], end: str) -> dict[int, set[str]]:
    """Return the names of what holds each marker; 0 is none."""
    found: dict[int, set[str]] = {}
    for key, value in state.items():
        if key.endswith(end) and (marker := int(value.flatten()[0])):
            assert (value == marker).all()
            found.setdefault(marker, set()).update(cores(key.removesuffix(end)))
    return found


def test_flux_layers_of_sd_scripts_read_what_those_diffusers_splits_them_into_read():
    from diffusers import FluxPipeline

    names = [f"{kind}_3_{layer}" for kind in ("double_blocks", "single_blocks")
             for layer in JOINT[kind]]  # fmt: skip
    state = {}
    for marker, name in enumerate(names, 1):
        joined = {"single_blocks_3_linear1": 21504}  # fixed in the converter
        state[f"lora_unet_{name}.lora_down.weight"] = torch.full((1, 1), float(marker))
        state[f"lora_unet_{name}.lora_up.weight"] = torch.ones(joined.get(name, 3), 1)
    found = by_marker(FluxPipeline.lora_state_dict(state), ".lora_A.weight")
    assert {name: found[marker] for marker, name in enumerate(names, 1)} == {
        name: set(cores(f"lora_unet_{name}")) for name in names
    }
    assert len(cores("lora_unet_single_blocks_3_linear1")) == 4


class Checkpoint(dict):
    """A model's weights, of which only some matter."""

    def pop(self, key):
        return super().pop(key, torch.zeros(3, 1))


def test_sd3_layers_of_sd_scripts_are_those_diffusers_converts_them_to():
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    names, state = [], Checkpoint({"context_embedder.weight": torch.zeros(3, 1)})
    for block in range(2):  # the last one has no text at its end
        for layer, parts in JOINT["joint_blocks"].items():
            name = f"joint_blocks_{block}_{layer}"
            path = re.sub("_(attn2?|mlp|adaLN_modulation)_", r".\1.", layer)
            names.append(name)
            state[f"joint_blocks.{block}.{path}.weight"] = torch.full((6, 1), float(len(names)))
            assert len(parts) == (3 if layer.endswith("qkv") else 1)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(state)
    found = by_marker(converted, ".weight")
    lost = {
        f"joint_blocks_1_context_block_{layer}" for layer in ("attn_proj", "mlp_fc1", "mlp_fc2")
    }
    assert {name: found[marker] for marker, name in enumerate(names, 1) if name not in lost} == {
        name: set(cores(f"lora_unet_{name}")) for name in names if name not in lost
    }


def test_a_layer_that_joins_others_is_kept_off_all_of_their_subspaces():
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    held = LayerSubspaces(bases={
        f"single_transformer_blocks.0.{part}": subspace_of(12, 2, seed=min(place, 2)).basis
        for place, part in enumerate(parts)
    } | {"single_transformer_blocks.0.proj_out": subspace_of(20, 1).basis})  # fmt: skip
    names = [f"lora_unet_single_blocks_0_linear{number}" for number in (1, 2)]
    joined = held.of(names)
    assert held.among(names).bases.keys() == held.bases.keys()
    assert joined[names[0]].shape == (12, 6)  # the last two are equal
    for part in parts:
        basis = held.bases[f"single_transformer_blocks.0.{part}"]
        torch.testing.assert_close(joined[names[0]] @ (joined[names[0]].T @ basis), basis)
    assert joined[names[1]] is held.bases["single_transformer_blocks.0.proj_out"]
    assert held.among(names[1:]).bases.keys() == {"single_transformer_blocks.0.proj_out"}


def test_equal_subspaces_stay_as_they_are():
    basis = subspace_of(12, 2).basis
    held = LayerSubspaces(bases={f"transformer_blocks.0.attn.to_{part}": basis for part in "qkv"})
    for name in (
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
    ):
        assert held.of([name])[name] is basis
