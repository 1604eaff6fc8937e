"""Which factors are projected, and that no layer of the LoRA is left without a subspace."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from small_text import subspace_of
from torch import nn
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.factors import (
    UnsupportedTraining,
    projected_factors,
    projected_factors_of,
)

WIDTH = 12


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(WIDTH, 6), "to_k": nn.Linear(WIDTH, 6)})
        self.attn2 = nn.ModuleDict({"to_k": nn.Linear(8, 6)})
        self.ff = nn.Linear(WIDTH, 4)


def lora(*targets: str, **settings) -> nn.Module:
    return get_peft_model(Network(), LoraConfig(r=2, target_modules=list(targets), **settings))


def layers(*names: str) -> LayerSubspaces:
    return LayerSubspaces(bases={name: subspace_of(WIDTH, 2).basis for name in names})


ALL = layers("attn1.to_q", "attn1.to_k", "ff")


def modules(factors) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in factors}


def test_a_lora_may_train_fewer_layers_than_the_file_holds():
    factors = projected_factors(lora("attn1.to_q", "attn2.to_k"), text=True, layers=ALL)
    assert modules(factors) == {"attn1.to_q", "attn2.to_k"}
    assert ALL.among(factors).bases.keys() == {"attn1.to_q"}
    assert modules(projected_factors(lora("ff"), text=False, layers=ALL)) == {"ff"}


def test_without_layers_only_text_is_looked_at():
    factors = projected_factors(lora("attn1.to_q", "attn2.to_k"), text=True, layers=None)
    assert modules(factors) == {"attn2.to_k"}


@pytest.mark.parametrize(
    ("targets", "text", "message"),
    [
        (("attn1.to_q", "attn2.to_k"), False, "1 of the LoRA's 2 layers have no subspace: .*attn2"),
        (("attn1.to_q", "ff", "attn2.to_k"), True, "1 of the LoRA's 3 layers .*: .*ff"),
        (("attn1.to_q",), True, "No LoRA reads the text"),
    ],
)
def test_a_layer_without_a_subspace_is_refused(targets, text, message):
    held = layers("attn1.to_q", "attn1.to_k")
    with pytest.raises(UnsupportedTraining, match=message):
        projected_factors(lora(*targets), text=text, layers=held)


def test_what_is_no_plain_pair_is_refused_in_every_layer():
    for changed in ({"use_dora": True}, {"modules_to_save": ["ff"]}):
        network = lora("attn1.to_q", **changed)
        with pytest.raises(UnsupportedTraining, match="Also trained"):
            projected_factors(network, text=False, layers=ALL)
    assert projected_factors(lora("attn1.to_q"), text=False, layers=ALL)


def test_named_parameters_may_be_a_generator():
    network = lora("attn1.to_q", "attn2.to_k")
    found = projected_factors(network.named_parameters(), text=True, layers=ALL)
    assert found.keys() == projected_factors(network, text=True, layers=ALL).keys()


def test_a_file_must_hold_each_layer():
    state = get_peft_model_state_dict(lora("attn1.to_q", "attn2.to_k"))
    state = {name.replace("base_model.model.", "unet."): value for name, value in state.items()}
    held = layers("attn1.to_q")
    found = projected_factors_of(state, text=True, layers=held, source="lora")
    assert {name.removeprefix("unet.") for name in found} == {"attn1.to_q", "attn2.to_k"}
    assert all(isinstance(value, torch.Tensor) for value in found.values())
    with pytest.raises(ValueError, match="1 layer is not there: ff"):
        projected_factors_of(state, text=True, layers=layers("attn1.to_q", "ff"), source="lora")
