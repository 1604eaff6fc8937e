"""Which layers of a LoRA are projected, and what saved files are checked for."""

import pytest
import torch
from small_text import seeded, subspace_of
from torch import nn
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.training.projection.factors import (
    UnsupportedTraining,
    factors_of,
    saved_state,
    text_factors,
    trains_text_encoder,
)
from unmemorize.shared.training.projection.projection import (
    Projection,
    ProjectionFailed,
    check_file,
)

WIDTH, RANK = 24, 4


def named(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("__", "."), nn.Parameter(torch.zeros(s))) for name, s in shapes.items()]


LORA = {
    "attn2__to_k__lora_A__default__weight": (4, 8),
    "attn2__to_k__lora_B__default__weight": (6, 4),
}


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"attn2__to_k__lora_magnitude_vector__default__weight": (6,)}, "DoRA"),
        ({"lora_unet_attn2_to_v__dora_scale": (6,)}, "DoRA"),
        ({"lora_unet_attn2_to_v__hada_w2_b": (4, 8, 3, 3)}, "LoHa"),
        ({"lora_unet_attn2_to_v__hada_t2": (4, 4, 3, 3)}, "LoHa in Tucker"),
        ({"attn2__to_v__hada_w1_a__default": (6, 4)}, "LoHa"),
        ({"lora_unet_attn2_to_v__lokr_w2": (2, 2, 3, 3)}, "LoKr"),
        ({"attn2__to_v__ia3_l__default": (6, 1)}, "IA"),
        ({"attn2__to_v__oft_R__default__weight": (6, 1)}, "OFT"),
        ({"attn2__to_v__lora_E__default": (4, 1)}, "AdaLoRA"),
        ({"attn2__to_k__lora_B__default__bias": (6,)}, "bias"),
        ({"attn2__to_k__weight": (6, 8)}, "full fine-tuning"),
    ],
)
def test_what_would_not_be_exact_is_refused_before_the_first_step(extra, kind):
    with pytest.raises(UnsupportedTraining, match=kind):
        text_factors(named(**LORA, **extra))
    frozen = [(name, p.requires_grad_(False)) for name, p in named(**extra)]
    assert list(text_factors([*named(**LORA), *frozen])) == ["attn2.to_k"]


@pytest.mark.parametrize(
    "name", ["lora_te1_text_model_0_q__lora_down__weight",
             "text_encoder__attn2__to_k__lora_A__default__weight"],
)  # fmt: skip
def test_a_trained_text_encoder_is_passed_over_and_told(name):
    both = named(**LORA, **{name: (4, 8)})
    assert list(text_factors(both)) == ["attn2.to_k"]
    assert trains_text_encoder(both)
    assert not trains_text_encoder([(name, p.requires_grad_(False)) for name, p in both])
    assert not trains_text_encoder(named(**LORA))


@pytest.mark.parametrize(
    ("first", "second"),
    [("lora_A__default", "lora_A__other"), ("lora_down__0", "lora_down__1")],
    ids=["two adapters", "sd-scripts' split_qkv"],
)
def test_a_second_factor_of_a_layer_does_not_hide_the_first(first, second):
    shapes = {f"attn2__to_k__{each}__weight": (4, 8) for each in (first, second)}
    with pytest.raises(UnsupportedTraining, match="a second factor"):
        text_factors(named(**shapes))
    assert text_factors(named(**dict(list(shapes.items())[:1])))


def test_other_layers_may_be_trained_in_any_way():
    free = named(**LORA, attn1__to_k__hada_w1_a=(2, 2), conv_in__weight=(2, 2))
    assert list(text_factors(free)) == ["attn2.to_k"]
    with pytest.raises(UnsupportedTraining, match="nothing to project"):
        text_factors(named(transformer__attn__to_k__lora_A__default__weight=(4, 8)))


def test_real_peft_layers_are_found_and_real_dora_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    def model(dora: bool) -> nn.Module:
        block = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(WIDTH, 6)})})
        config = LoraConfig(r=RANK, target_modules=["to_k"], use_dora=dora)
        return get_peft_model(block, config)

    with pytest.raises(UnsupportedTraining, match="DoRA"):
        text_factors(model(True))
    network = model(False)
    factors = text_factors(network)
    assert [name.split(".")[-1] for name in factors] == ["to_k"]
    Projection(factors, [subspace_of()]).project_weights()
    down = next(iter(factors.values())).detach()
    state = {f"unet.{n}": p.detach() for n, p in network.named_parameters() if "lora_" in n}
    save_file(state, tmp_path / "lora.safetensors")
    (saved,) = factors_of(saved_state(tmp_path / "lora.safetensors")).values()
    assert torch.equal(saved, down)


DIALECTS = {
    "kohya": ("lora_unet_down_blocks_0_attn2_to_{}", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("base_model.model.mid.attn2.to_{}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("unet.mid.attn2.to_{}", ".lora.down.weight", ".lora.up.weight"),
    "processor": ("unet.mid.attn2.processor.to_{}", "_lora.down.weight", "_lora.up.weight"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-3), (torch.float32, 1e-6)])
def test_saved_files_of_every_dialect_are_checked(dialect, dtype, bound, tmp_path):
    from safetensors.torch import save_file

    module, down, up = DIALECTS[dialect]
    subspace = subspace_of(320, 8)
    factors = {module.format(part): seeded(16, 320, seed=ord(part)) for part in "kv"}
    path = tmp_path / "lora.safetensors"

    def save() -> None:
        state = {f"{name}{down}": value.to(dtype) for name, value in factors.items()}
        state |= {f"{name}{up}": torch.zeros(6, 16) for name in factors}
        state[f"unet.attn1.to_k{down}"] = torch.ones(2, 64)  # reads no text
        state[f"unet.attn1.to_k{up}"] = torch.ones(6, 2)
        save_file(state, path)

    save()
    with pytest.raises(ProjectionFailed, match="2 of 2"):
        check_file(path, [subspace])
    Projection(factors, [subspace]).project_weights()
    save()
    assert check_file(path, [subspace]) < bound


def test_files_that_cannot_be_certified_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "lora.safetensors"
    pair = {"lora_unet_attn1_to_k.lora_down.weight": torch.ones(2, 8),
            "lora_unet_attn1_to_k.lora_up.weight": torch.ones(8, 2)}  # fmt: skip
    save_file(pair, path)
    with pytest.raises(ModelError, match="no LoRA factor that reads text"):
        check_file(path, [subspace_of(8, 1)])
    with pytest.raises(ModelError, match="changes a text encoder"):
        factors_of({"lora_te_text_model_q.lora_down.weight": torch.ones(2, 8)})
    te = {key.replace("unet_attn1", "te_attn2"): value for key, value in pair.items()}
    with pytest.raises(ModelError, match="no LoRA factor that reads text"):
        factors_of(te, text_encoder=True)
    save_file(pair | {"lora_unet_attn2_to_k.hada_w1_a": torch.ones(2, 2)}, path)
    with pytest.raises(ModelError, match="lacks a factor"):
        check_file(path, [subspace_of(8, 1)])
