"""LyCORIS files, made by LyCORIS itself, give the answer of a network with the change added."""

import json
import warnings

import pytest
import tiny
import torch
from needs import need_package
from safetensors.torch import save_file
from test_lora import answer
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.lora.attach import has_lora, load_lora, lora_disabled

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lycoris = need_package("lycoris")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")

RANK, ALPHA = 4, 2.0
KINDS = {
    "locon": {"algo": "locon"},
    "locon tucker": {"algo": "locon", "use_tucker": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr both": {"algo": "lokr", "factor": 2, "decompose_both": True, "linear_dim": 1},
    "lokr whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
}
PREFIX = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_"},
    "flux": {"transformer": "lycoris_"},
}
TARGETS = ["Transformer2DModel", "ResnetBlock2D", "CLIPAttention", "CLIPMLP", "FluxAttention"]


@torch.no_grad()
def attached(pipeline, family: str, settings: dict) -> dict[str, torch.Tensor]:
    """Put a random LyCORIS network on the parts of a pipeline; return what its file would hold."""
    state = {}
    for part, prefix in PREFIX[family].items():
        lycoris.LycorisNetwork.apply_preset({"target_module": TARGETS})
        settings = {"linear_dim": RANK, "conv_dim": 2, "linear_alpha": ALPHA} | settings
        network = lycoris.create_lycoris(getattr(pipeline, part), 1.0, preset="full", **settings)
        network.apply_to()
        generator = torch.Generator().manual_seed(len(part))
        for name, value in network.named_parameters():
            if "dora_scale" not in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            else:
                value.mul_(1 + 0.3 * torch.randn(value.shape, generator=generator))
        inner = "text_model_" if hasattr(getattr(pipeline, part), "text_model") else ""
        state |= {
            key.replace(f"lycoris_{inner}", prefix): value.clone().contiguous()
            for key, value in network.state_dict().items()
        }
    assert state
    return state


def dense(factors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return a changed weight by the papers' formulas in float64, entry by entry."""
    f = {name.removesuffix(".weight"): value.double() for name, value in factors.items()}

    def product(a: str, b: str, core: str) -> torch.Tensor:
        if core in f:
            return torch.einsum("abkl,ap,bi->pikl", f[core], f[a], f[b])
        return f[a] @ f[b]

    if "lora_up" in f:
        down, rank = f["lora_down"], len(f["lora_down"])
        if "lora_mid" in f:
            down = torch.einsum("abkl,bi->aikl", f["lora_mid"], down.flatten(1))
        change = f["lora_up"].flatten(1) @ down.flatten(1)
    elif "hada_w1_a" in f:
        rank = len(f["hada_w1_b"])
        change = product("hada_w1_a", "hada_w1_b", "hada_t1")
        change = change * product("hada_w2_a", "hada_w2_b", "hada_t2")
    else:
        left = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
        right = f["lokr_w2"] if "lokr_w2" in f else product("lokr_w2_a", "lokr_w2_b", "lokr_t2")
        rank = len(
            f["lokr_w2_b"] if "lokr_w2_b" in f else f.get("lokr_w1_b", [0] * int(f["alpha"]))
        )
        blocks = [[left[i, j] * right for j in range(left.shape[1])] for i in range(len(left))]
        change = torch.cat([torch.cat(row, 1) for row in blocks])
    changed = weight.double() + f["alpha"] / rank * change.reshape(weight.shape)
    if "dora_scale" in f:
        changed = (
            changed * f["dora_scale"] / changed.flatten(1).norm(dim=1).view_as(f["dora_scale"])
        )
    return changed


@torch.no_grad()
def merged(pipeline, family: str, state: dict[str, torch.Tensor]):
    """Return a pipeline in float64 with every change added to its weights."""
    stems = {}
    for key, value in state.items():
        stem, _, factor = key.partition(".")
        stems.setdefault(stem, {})[factor] = value
    for part, prefix in PREFIX[family].items():
        for name, module in getattr(pipeline, part).named_modules():
            stem = prefix + name.removeprefix("text_model.").replace(".", "_")
            if factors := stems.pop(stem, None):
                module.weight.copy_(dense(factors, module.weight))
    assert not stems
    return pipeline


def made(family: str):
    return tiny.PIPELINES[family]().to(torch.float64)


def written(tmp_path, state, name="lycoris.safetensors"):
    save_file(state, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_answer_of_the_changed_network(tmp_path, kind):
    source = made("sd1")
    state = attached(source, "sd1", KINDS[kind])
    pipeline = made("sd1")
    plain = answer(pipeline)
    load_lora(pipeline, written(tmp_path, state))
    expected = answer(merged(made("sd1"), "sd1", state))
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer(source), expected, rtol=1e-4, atol=1e-4)  # LyCORIS itself
    assert (expected - plain).abs().max() > 0.1
    with lora_disabled(pipeline):
        assert torch.equal(answer(pipeline), plain)
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_strength_is_a_factor_of_every_change(tmp_path, kind):
    """DoRA normalises the changed weight, so that its change is no multiple."""
    state = attached(made("sd1"), "sd1", KINDS[kind])
    plain, once, half = made("sd1"), merged(made("sd1"), "sd1", state), made("sd1")
    for part in PREFIX["sd1"]:
        weights = (dict(getattr(each, part).named_parameters()) for each in (plain, once, half))
        before, changed, more = weights
        for name in before:
            more[name].data.copy_(before[name] - 0.5 * (changed[name] - before[name]))
    pipeline = made("sd1")
    load_lora(pipeline, written(tmp_path, state), strength=-0.5)
    torch.testing.assert_close(answer(pipeline), answer(half), rtol=1e-5, atol=1e-5)
    assert (answer(half) - answer(once)).abs().max() > 0.1


@pytest.mark.parametrize(("family", "kind"), [("sdxl", "loha"), ("sdxl", "dora"), ("flux", "lokr")])
def test_other_families(tmp_path, family, kind):
    state = attached(made(family), family, KINDS[kind])
    pipeline = made(family)
    load_lora(pipeline, written(tmp_path, state))
    expected = answer(merged(made(family), family, state))
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-5, atol=1e-5)
    assert has_lora(pipeline)


def test_kinds_in_one_file(tmp_path):
    """Convolutions as LoRA, attention as LoHa, text encoder as LoKr, in half precision."""
    parts = [attached(made("sd1"), "sd1", KINDS[kind]) for kind in ("locon", "loha", "lokr")]
    state = {key: v for key, v in parts[0].items() if "resnets" in key}
    state |= {key: v for key, v in parts[1].items() if "attentions" in key}
    state |= {key: v for key, v in parts[2].items() if "lora_te" in key}
    state = {key: value.half() for key, value in state.items()}
    pipeline = made("sd1")
    plain = answer(pipeline)
    flags = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    load_lora(pipeline, written(tmp_path, state))
    expected = answer(merged(made("sd1"), "sd1", state))
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-5, atol=1e-5)
    with lora_disabled(pipeline):
        assert torch.equal(answer(pipeline), plain)
    assert not any(flags)
    assert not any(parameter.requires_grad for parameter in pipeline.unet.parameters())


def damaged(fault: str) -> dict[str, torch.Tensor]:
    loha = attached(made("sd1"), "sd1", KINDS["loha"])
    first = next(key for key in loha if key.endswith("attn1_to_q.hada_w1_a"))
    stem = first.removesuffix(".hada_w1_a")
    if fault == "lone factor":
        del loha[first]
    elif fault == "nan":
        loha[first] = loha[first] * float("nan")
    elif fault == "does not meet":
        loha[first] = loha[first][:, :2].contiguous()
    elif fault == "too large":
        loha[first] = torch.cat([loha[first]] * 2)
    elif fault == "absent":
        return {key.replace("attn1_to_q", "attn7_to_q"): value for key, value in loha.items()}
    elif fault == "another kind":
        loha |= {f"{stem}.oft_blocks": torch.ones(2, 2)}
    elif fault == "of a loha":
        return attached(made("sd1"), "sd1", {"algo": "loha", "dora_wd": True})
    elif fault == "inputs":
        return attached(made("sd1"), "sd1", {**KINDS["dora"], "wd_on_output": False})
    elif fault == "some":
        dora = attached(made("sd1"), "sd1", KINDS["dora"])
        return {key: value for key, value in dora.items() if key != f"{stem}.dora_scale"}
    return loha


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("lone factor", "attn1_to_q has the factors hada_w1_b, .* no LoHa"),
        ("nan", "NaN or infinity .*hada_w1_a"),
        ("does not meet", "could not be loaded"),
        ("too large", "another size"),
        ("absent", "attn7"),
        ("another kind", "is a OFT"),
        ("of a loha", "DoRA of a loha, which PEFT does not read"),
        ("inputs", "dora_scale holds magnitudes of inputs"),
        ("some", "DoRA in some"),
    ],
)
def test_faults_are_named_and_leave_the_pipeline_as_it_was(tmp_path, fault, says):
    path = written(tmp_path, damaged(fault))
    pipeline = tiny.stable_diffusion()
    before = answer(pipeline)
    with pytest.raises(ModelError, match=says):
        load_lora(pipeline, path)
    assert torch.equal(answer(pipeline), before)
    assert not has_lora(pipeline)


def test_a_loha_that_peft_wrote_is_refused(tmp_path):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    state = {f"base_model.model.conv_in.{name}": torch.ones(4, 4) for name in names}
    path = written(tmp_path, state, "adapter_model.safetensors")
    path.with_name("adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 4}))
    with pytest.raises(ModelError, match="describes a LOHA"):
        load_lora(tiny.stable_diffusion(), path)
