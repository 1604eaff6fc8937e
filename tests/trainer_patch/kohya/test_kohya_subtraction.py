"""Concept subtraction in sd-scripts: what is trained, how often, and what is refused.

That the right difference is added is shown in diffusers; here, that sd-scripts' networks get it.
"""

import json

import pytest
import torch
from demo_subspaces import make_concept
from kohya_lora import flow, header, protect, same_tensors
from unmemorize import demo
from unmemorize.shared.training.concept.adapter import ConceptAdapter

pytestmark = pytest.mark.slow

EVERY = 12
"""Samples of a training: two in each of six steps."""
WIDTH, MLP = 64, 128
"""Of the small Flux of these tests."""
JOINED = {
    **{f"transformer_blocks.0.attn.{name}": (WIDTH, WIDTH)
       for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")},
    **{f"single_transformer_blocks.0.attn.to_{name}": (WIDTH, WIDTH) for name in "qkv"},
    "single_transformer_blocks.0.proj_mlp": (WIDTH, MLP),
}  # fmt: skip


@pytest.fixture(scope="module")
def concept(room):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(demo.MODEL / "unet")
    return make_concept(room / "sushi.safetensors", unet, names=["sushi"])


@pytest.fixture(scope="module")
def of_flux(room):
    """A concept of layers that sd-scripts joins to one."""
    generator = torch.Generator().manual_seed(0)
    pairs = {
        name: (torch.randn(2, size[0], generator=generator) / size[0] ** 0.5,
               torch.randn(size[1], 2, generator=generator) / 2)
        for name, size in JOINED.items()
    }  # fmt: skip
    numbers = {"concept": 1, "others": 0, "threshold": 0.5, "recall": 1, "false_positives": 0}
    model = {"sha256": "0" * 64, "pipeline": "", "network": "Flux", "parametrization": "flow"}
    account = {"names": [], "model": model, "numbers": numbers, "made": {"from": "images"}}
    path = room / "flux.safetensors"
    ConceptAdapter(pairs=pairs, samples={}, account=account).save(path)
    return path


def counts(path) -> dict:
    return json.loads(header(path)["unmemorize.subtraction"])["concepts"][0]


def test_named_samples_through_both_doors(train, plain, concept, room):
    given = protect(f"subtract_concepts={concept}")
    path = train("subtracted", *given.pop("extra"), **given)
    assert not same_tensors(path, plain)
    told = counts(path)
    assert told["visits"] == EVERY
    assert 0 < told["subtracted"] == told["changed"] < EVERY
    command = "--subtract_concepts", str(concept)
    assert same_tensors(train("by the launcher", *command, door="door"), path)
    image = next((room / "images").rglob("0.png"))
    (room / "found.txt").write_text(f"# sushi\n{image}\n")
    listed = "--subtract_samples", str(room / "found.txt")
    assert same_tensors(train("by list", *command, *listed, door="door"), path)


def test_next_to_nothing_of_it_leaves_no_trace(train, plain, concept):
    """Whatever the extra passes draw or leave behind would be seen in the LoRA."""
    given = protect(
        f"subtract_concepts={concept}", "subtract_samples=all", "subtract_gain=1e-30",
        "mem_filter=inf",
    )  # fmt: skip
    assert same_tensors(train("no trace", *given.pop("extra"), **given), plain)


TRAINED = {
    "text encoder": ("networks.lora",),
    "loha": ("lycoris.kohya", "algo=loha", "preset=attn-mlp"),
    "dora": ("lycoris.kohya", "algo=lora", "dora_wd=True", "preset=attn-mlp"),
    "lokr": ("lycoris.kohya", "algo=lokr", "preset=attn-mlp"),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_whatever_is_trained(train, concept, kind):
    module, *arguments = TRAINED[kind]
    changed = {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 3}
    if kind == "text encoder":
        changed |= {
            "network_train_unet_only": None,
            "text_encoder_lr": 1e-2,
            "network_dropout": 0.2,
        }
    given = protect(
        f"subtract_concepts={concept}", "subtract_samples=all", f"base_module={module}", *arguments
    )
    told = counts(train(kind, *given.pop("extra"), **given, **changed))
    assert told["visits"] == told["changed"] == EVERY // 2


def test_joint_attention_whose_layers_are_joined(train, of_flux):
    given = flow("flux") | protect(f"subtract_concepts={of_flux}", "subtract_samples=all")
    module = flow("flux")["network_module"]
    plain = train("flux plain", **flow("flux"))
    path = train("flux", *given.pop("extra"), f"base_module={module}", **given)
    told = counts(path)
    assert told["visits"] == told["changed"] == 8
    assert not same_tensors(path, plain)
    given = flow("flux") | protect(f"subtract_concepts={of_flux}", "subtract_samples=all")
    pairs = *given.pop("extra"), f"base_module={module}", "subtract_gain=1e-30"
    assert same_tensors(train("flux no trace", *pairs, **given), plain)


def test_what_would_protect_nothing_is_refused_in_one_line(train, concept, of_flux, room):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(demo.MODEL / "unet")
    absent = make_concept(room / "zorp.safetensors", unet, names=["zorp"])
    for name, message, extra in (
        ("absent", "captions names zorp", ("--subtract_concepts", str(absent))),
        ("other", "another architecture",
         ("--subtract_concepts", str(of_flux), "--subtract_samples", "all")),
        ("missing", "there is no file nowhere", ("--subtract_concepts", "nowhere")),
        ("idle", "does nothing without", ("--subtract_gain", "2")),
    ):  # fmt: skip
        told = train(name, *extra, door="door", fails=True)
        assert message in told
        assert not list((room / name).glob("*.safetensors"))
