"""Projection in sd-scripts: what is saved, resumed and refused."""

import json

import pytest
import torch
from checkouts import CONCEPT
from kohya_lora import flow, header, largest_share, protect, same_tensors
from safetensors.torch import load_file
from unmemorize.shared.models.lora.layer_names import cores
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [
        ({"optimizer_type": "AdamW", "scale_weight_norms": 1.0}, 1e-6),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "constant"}, 1e-6),
        ({"mixed_precision": "bf16", "save_precision": "bf16", "full_bf16": True}, 1e-3),
        ({"save_precision": "fp16", "network_weights": "PLAIN", "dim_from_weights": True}, 1e-3),
    ],
    ids=["AdamW", "Adafactor", "bf16", "from a LoRA that knows the concept"],
)
def test_the_saved_lora_is_off_the_subspace(train, plain, concept, changed, tolerance):
    changed = {key: str(plain) if value == "PLAIN" else value for key, value in changed.items()}
    sizes = () if "dim_from_weights" in changed else ("conv_dim=2", "conv_alpha=1")
    asked = protect(f"project_concepts={concept}", *sizes)
    path = train(f"kept {len(str(changed))}", *asked.pop("extra"), **(changed | asked))
    assert largest_share(path, ConceptSubspace.load(concept).basis) < tolerance
    assert not same_tensors(path, plain)


UNETS = {
    "train_network.py": {},
    "sdxl_train_network.py": {
        "block_out_channels": (32, 64, 64), "norm_num_groups": 32, "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": 8,
        "use_linear_projection": True,
    },
}  # fmt: skip
"""The layers of SD 1 and of SDXL, as diffusers names them; sd-scripts writes SDXL's otherwise."""


@pytest.mark.parametrize("script", UNETS)
def test_layers_named_by_diffusers_are_kept_off_their_subspaces(train, room, script):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[script])
    names = {cores(name): name for name, _ in unet.named_modules()}
    usual = {"script": script, "max_train_steps": 3}
    before = load_file(train(f"bare {script}", **usual))
    ends = ("attn2_to_k.lora_down.weight", "attn2_to_v.lora_down.weight")
    downs = [key for key in before if "lora_down" in key and not key.endswith(ends)]
    bases = {}
    for place, key in enumerate(downs):
        generator = torch.Generator().manual_seed(place)
        columns = torch.randn(before[key].shape[1], 2, generator=generator, dtype=torch.float64)
        bases[key] = torch.linalg.qr(columns).Q
    modules = {key: names[cores(key.removesuffix(".lora_down.weight"))] for key in downs}
    assert len(set(modules.values())) == len(downs) > 100
    held = LayerSubspaces(bases={modules[key]: basis for key, basis in bases.items()})
    held.save(room / f"{script}.layers.safetensors")
    width = before[next(key for key in before if key.endswith(ends))].shape[1]
    ConceptSubspace.empty(width).save(room / f"{width}.safetensors")
    path = train(
        f"kept {script}", door="door", **usual, project_concepts=str(room / f"{width}.safetensors"),
        project_layers=str(room / f"{script}.layers.safetensors"),
    )  # fmt: skip
    after = load_file(path)
    for key, basis in bases.items():
        shares = [
            float((rows @ basis).norm() / rows.norm())
            for rows in (state[key].double().movedim(1, -1) for state in (before, after))
        ]
        assert shares[1] < 1e-6 < shares[0]
    assert json.loads(header(path)["unmemorize.projection"])["layers"]["count"] == len(downs)


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=1)


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(num_layers=2)


@pytest.mark.parametrize("make", [flux, sd3])
def test_joined_layers_are_kept_off_the_subspaces_of_all_that_they_join(
    train, room, checkout, make
):
    kind, end = make.__name__, ".lora_down.weight"
    if not (checkout / f"{kind}_train_network.py").exists():
        pytest.skip("this version of sd-scripts does not train it")
    with torch.device("meta"):
        linear = {cores(name)[0]: name for name, module in make().named_modules()
                  if isinstance(module, torch.nn.Linear)}  # fmt: skip
    before = load_file(train(f"{kind} bare", **flow(kind)))
    bases, parts = {}, {}
    for key in (key for key in before if key.endswith(end)):
        parts[key] = [linear[core] for core in cores(key.removesuffix(end))]
        for name in parts[key]:
            generator = torch.Generator().manual_seed(len(bases))
            columns = torch.randn(before[key].shape[1], 2, generator=generator, dtype=torch.float64)
            bases[name] = torch.linalg.qr(columns).Q
    assert len(bases) > len(parts) > 10
    LayerSubspaces(bases=bases).save(room / f"{kind}.layers.safetensors")
    asked = flow(kind) | {"project_layers": str(room / f"{kind}.layers.safetensors")}
    path = train(f"{kind} kept", door="door", **asked)
    after = load_file(path)
    for key, names in parts.items():
        for basis in (bases[name] for name in names):
            shares = [
                float((state[key].double() @ basis).norm() / state[key].double().norm())
                for state in (before, after)
            ]
            assert shares[1] < 1e-6 < shares[0]
    assert json.loads(header(path)["unmemorize.projection"])["layers"]["count"] == len(bases)
    if kind == "sd3":  # Flux' sizes are fixed there
        split = ("--network_args", "split_qkv=True")
        assert "a second factor" in train("split", *split, door="door", fails=True, **asked)


def test_a_resumed_training_goes_on_counting_and_projecting(train, room, checkout, concept):
    """After the first of three epochs. sd-scripts itself draws other noise then than uninterrupted.

    test_kohya.py shows on a trainer that resumes exactly that ours does, too.
    """
    if "--skip_until_initial_step" not in (checkout / "train_network.py").read_text("utf-8"):
        pytest.skip("this version of sd-scripts does not resume at a step")
    asked = protect(f"project_concepts={concept}", "mem_filter=0.3")
    extra = asked.pop("extra")
    steps = {"max_train_steps": 18, "save_every_n_epochs": 1, "save_state": True}
    whole = train("whole", *extra, **steps, **asked)
    again = train(
        "again", *extra, **steps, **asked, skip_until_initial_step=True,
        resume=str(room / "whole" / "lora-000001-state"),
    )  # fmt: skip
    for key, count in (("unmemorize.filter", "seen"), ("unmemorize.projection", "steps")):
        one, other = (json.loads(header(path)[key])[count] for path in (whole, again))
        assert one == other
    assert largest_share(again, ConceptSubspace.load(concept).basis) < 1e-6


def test_beside_a_trained_text_encoder_the_network_is_kept_and_the_loss_is_told(train, concept):
    asked = protect(f"project_concepts={concept}")
    path = train("text kept", *asked.pop("extra"), **(asked | {"network_train_unet_only": None}))
    assert largest_share(path, ConceptSubspace.load(concept).basis) < 1e-6
    assert any("lora_te" in key and value.any() for key, value in load_file(path).items())
    told = json.loads(header(path)["unmemorize.projection"])
    assert told["text_encoder"].startswith("trained")


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_products_of_factors_leave_the_subspace_out(train, concept, algo):
    basis = ConceptSubspace.load(concept).basis[:, :2]
    small = concept.with_name("small.safetensors")
    ConceptSubspace(basis=basis).save(small)
    pairs = ("base_module=lycoris.kohya", f"algo={algo}", "preset=attn-mlp", "factor=4")
    shares = []
    for name, more in (("kept", (f"project_concepts={small}",)), ("bare", ("mem_filter=inf",))):
        asked = protect(*pairs, *more)
        state = load_file(train(f"{algo} {name}", *asked.pop("extra"), **asked))
        shares.append(max(changes_read(state, basis)))
    assert shares[0] < 1e-5
    assert shares[1] > 0.05


def changes_read(state, basis):
    """Yield |Delta V| / |Delta| of the layers that read text, spelt out for LoHa and LoKr."""
    state = {key: value.double() for key, value in state.items()}
    for key in (key for key in state if key.endswith(("attn2_to_k.alpha", "attn2_to_v.alpha"))):
        of = {name.rpartition(".")[2]: value for name, value in state.items()
              if name.startswith(key.removesuffix("alpha"))}  # fmt: skip
        if "hada_w1_a" in of:
            delta = (of["hada_w1_a"] @ of["hada_w1_b"]) * (of["hada_w2_a"] @ of["hada_w2_b"])
        else:
            first, second = (
                of.get(f"lokr_{w}", of.get(f"lokr_{w}_a", 0) @ of[f"lokr_{w}_b"]
                       if f"lokr_{w}_b" in of else None)
                for w in ("w1", "w2")
            )  # fmt: skip
            delta = torch.kron(first, second)
        yield float((delta @ basis).norm() / delta.norm())


@pytest.mark.parametrize(
    ("pairs", "changed", "message"),
    [
        (["project_concepts=FILE", "dora_wd=True", "base_module=lycoris.kohya"], {},
         "leave out dora_wd"),
        ([f"project_concepts={CONCEPT}"], {"save_model_as": "ckpt"},
         "use --save_model_as safetensors"),
        ([f"project_concepts={CONCEPT}"], {}, "or force it"),
        (["project_concepts=FILE", "base_module=networks.dylora"], {}, "not a plain pair"),
        (["project_concept=sushi"], {}, "`project_concept` is not an option"),
        (["mem_filter=high"], {}, "--mem_filter cannot be 'high'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_before_the_first_step(
    train, concept, pairs, changed, message
):
    asked = protect(*(pair.replace("FILE", str(concept)) for pair in pairs))
    said = train("refused", *asked.pop("extra"), fails=True, **(changed | asked))
    assert message in said
    assert "steps:" not in said
