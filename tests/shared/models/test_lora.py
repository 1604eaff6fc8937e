"""LoRA files: every dialect gives the merged network's answer, every fault is named."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.lora.attach import has_lora, load_lora, lora_disabled

RANK, ALPHA = 4, 2.0
UNET_LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_in")
TEXT_LAYERS = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


def layers(pipeline) -> dict[tuple[str, str], torch.nn.Module]:
    """Return what a LoRA is trained on, by component and name."""
    found = {}
    for part, ends in (("unet", UNET_LAYERS), ("transformer", UNET_LAYERS),
                       ("text_encoder", TEXT_LAYERS), ("text_encoder_2", TEXT_LAYERS)):  # fmt: skip
        module = getattr(pipeline, part, None)
        if module is None or (part.startswith("text") and not hasattr(pipeline, "unet")):
            continue
        for name, layer in module.named_modules():
            if name.endswith(ends) and hasattr(layer, "weight"):
                found[part, name.removeprefix("text_model.")] = layer
    return found


def factors(pipeline, seed: int = 0) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for key, layer in layers(pipeline).items():
        out, *rest = layer.weight.shape
        down = torch.randn(RANK, *rest, generator=generator)
        up = 0.1 * torch.randn(out, RANK, *[1] * (len(rest) - 1), generator=generator)
        pairs[key] = down, up
    return pairs


def kohya(pairs) -> dict[str, torch.Tensor]:
    two = any(part == "text_encoder_2" for part, _ in pairs)
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_text_model_" if two else "lora_te_text_model_",
        "text_encoder_2": "lora_te2_text_model_",
    }  # fmt: skip
    state = {}
    for (part, name), (down, up) in pairs.items():
        stem = prefix[part] + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        state[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return state


def diffusers(pairs, inner: str = "text_model.") -> dict[str, torch.Tensor]:
    """Return today's dialect of diffusers' own training scripts; the scale goes into B."""
    state = {}
    for (part, name), (down, up) in pairs.items():
        stem = f"{part}.{inner if part.startswith('text') else ''}{name}"
        state[f"{stem}.lora_A.weight"] = down
        state[f"{stem}.lora_B.weight"] = up * ALPHA / RANK
    return state


def old_diffusers(pairs) -> dict[str, torch.Tensor]:
    state = {}
    for (part, name), (down, up) in pairs.items():
        head, _, layer = name.removesuffix(".0").rpartition(".")
        text = part.startswith("text")
        if text:
            stem = f"{part}.text_model.{name}.lora_linear_layer."
        elif layer.startswith("to_"):
            stem = f"{part}.{head}.processor.{layer}_lora."
        else:
            stem = f"{part}.{name}.lora."
        state |= {f"{stem}down.weight": down, f"{stem}up.weight": up * ALPHA / RANK}
    return state


def peft(pairs) -> dict[str, torch.Tensor]:
    state = {}
    for (part, name), (down, up) in pairs.items():
        if part == "unet":
            stem = f"base_model.model.{name}"
            state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    return state


@torch.no_grad()
def merged(pipeline, pairs, parts=None):
    """Return the pipeline with the LoRA added to its weights: plainly right, and slow."""
    for (part, name), (down, up) in pairs.items():
        if parts and part not in parts:
            continue
        delta = (up.flatten(1) @ down.flatten(1)) * ALPHA / RANK
        weight = layers(pipeline)[part, name].weight
        weight += delta.view_as(weight)
    return pipeline


@torch.no_grad()
def answer(pipeline) -> torch.Tensor:
    denoiser = PipelineDenoiser(pipeline)
    sigma = denoiser.sigmas(3)[0]
    x = denoiser.initial_noise((0,), sigma)
    return denoiser.denoise(x, sigma, denoiser.encode(["a red cat"]))


def written(tmp_path, state, name="lora.safetensors", **metadata):
    path = tmp_path / name
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("dialect", [kohya, diffusers, old_diffusers])
def test_every_dialect_gives_the_merged_networks_answer(tmp_path, family, dialect):
    make = tiny.PIPELINES[family]
    pipeline = make()
    pairs = factors(pipeline)
    plain = answer(pipeline)
    load_lora(pipeline, written(tmp_path, dialect(pairs)))
    expected = answer(merged(make(), pairs))
    # x0 = x - sigma * eps: what is left of float32 after a sigma of 14.
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-3, atol=1e-3)
    assert (expected - plain).abs().max() > 0.1
    assert not any(p.requires_grad for p in pipeline.unet.parameters())


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_take_loras(tmp_path, family):
    make = tiny.PIPELINES[family]
    pipeline = make()
    pairs = factors(pipeline)
    load_lora(pipeline, written(tmp_path, diffusers(pairs)))
    expected = answer(merged(make(), pairs))
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-3, atol=1e-3)


def test_peft_files_take_their_scale_from_the_config_beside_them(tmp_path):
    pipeline = tiny.stable_diffusion()
    pairs = factors(pipeline)
    path = written(tmp_path, peft(pairs), "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_lora(pipeline, path)
    path.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    load_lora(pipeline, path)
    expected = answer(merged(tiny.stable_diffusion(), pairs, ("unet",)))
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-3, atol=1e-3)


def test_what_diffusers_writes_itself_is_read(tmp_path):
    """With its header of ranks and alphas, from a LoRA trained with PEFT."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    source = tiny.stable_diffusion()
    source.unet.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in source.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(source.unet)),
        unet_lora_adapter_metadata=source.unet.peft_config["default"].to_dict(),
    )
    pipeline = tiny.stable_diffusion()
    load_lora(pipeline, tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(answer(pipeline), answer(source), rtol=1e-4, atol=1e-4)


def test_switched_off_is_the_base_model_bit_for_bit(tmp_path):
    base = answer(tiny.stable_diffusion())
    pipeline = tiny.stable_diffusion()
    assert not has_lora(pipeline)
    with lora_disabled(pipeline):  # nothing to switch off
        assert torch.equal(answer(pipeline), base)
    load_lora(pipeline, written(tmp_path, kohya(factors(pipeline))))
    with_lora = answer(pipeline)
    assert has_lora(pipeline)
    flags = [p.requires_grad for p in pipeline.unet.parameters()]
    with PipelineDenoiser(pipeline).lora_disabled():
        assert torch.equal(answer(pipeline), base)
    assert torch.equal(answer(pipeline), with_lora)
    with pytest.raises(ZeroDivisionError), lora_disabled(pipeline):
        1 / 0  # noqa: B018
    assert torch.equal(answer(pipeline), with_lora)
    assert not torch.equal(with_lora, base)
    assert [p.requires_grad for p in pipeline.unet.parameters()] == flags


def test_a_fused_lora_cannot_be_switched_off(tmp_path):
    pipeline = tiny.stable_diffusion()
    load_lora(pipeline, written(tmp_path, kohya(factors(pipeline))))
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"), lora_disabled(pipeline):
        pass


def broken(name: str, pipeline) -> dict[str, torch.Tensor]:
    state = kohya(factors(pipeline))
    first = next(key for key in state if key.endswith("lora_up.weight"))
    if name == "lone factor":
        del state[first]
    elif name == "unknown key":
        state["lora_unet_nothing.weight"] = torch.ones(1)
    elif name == "unknown module":
        state |= {key.replace("attn1_to_q", "attn7_to_q"): state.pop(key)
                  for key in list(state) if "attn1_to_q" in key}  # fmt: skip
    elif name == "second encoder":
        state |= {key.replace("lora_te_", "lora_te2_"): state.pop(key)
                  for key in list(state) if "lora_te_" in key}  # fmt: skip
    elif name == "nan":
        state[first] = state[first] * float("nan")
    elif name == "loha":
        state = {key.replace("lora_up.weight", "hada_w1_a"): v for key, v in state.items()}
    elif name == "alpha alone":
        state["lora_unet_mid_block.alpha"] = torch.tensor(1.0)
    elif name == "empty":
        state = {}
    elif name == "sdxl":
        state = kohya(factors(tiny.stable_diffusion_xl()))
    elif name == "wider":
        down = [key for key in state if key.endswith("down.weight")]
        state |= {key: torch.cat([state[key]] * 2, 1) for key in down}
    return state


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("lone factor", "1 module lacks a LoRA factor: lora_.* \\(only A\\)"),
        ("unknown key", "lora_unet_nothing.weight"),
        ("unknown module", "attn7"),
        ("second encoder", "text_encoder_2"),
        ("nan", "1 weight with NaN or infinity .*: lora_"),
        ("loha", "has the factors hada_w1_a, which make no LoHa and no LoKr"),
        ("alpha alone", "lora_unet_mid_block \\(no factor\\)"),
        ("empty", "the file is empty"),
        ("sdxl", "another architecture"),
        ("wider", "another size: .* 32 in the model"),
    ],
)
def test_faults_are_named_and_leave_the_pipeline_as_it_was(tmp_path, fault, says):
    pipeline = tiny.stable_diffusion()
    before = answer(pipeline)
    path = written(tmp_path, broken(fault, pipeline))
    with pytest.raises(ModelError, match=says):
        load_lora(pipeline, path)
    assert torch.equal(answer(pipeline), before)
    assert not has_lora(pipeline)


def test_files_that_are_no_loras(tmp_path):
    pipeline = tiny.stable_diffusion()
    with pytest.raises(ModelError, match="no such file"):
        load_lora(pipeline, tmp_path / "absent.safetensors")
    pickled = tmp_path / "lora.safetensors"
    torch.save({"a": torch.ones(2)}, pickled)
    with pytest.raises(ModelError, match="pickle renamed to"):
        load_lora(pipeline, pickled)
    whole = written(tmp_path, kohya(factors(pipeline)), "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_lora(pipeline, tmp_path / "cut.safetensors")
    save_file(pipeline.unet.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="given as MODEL, not as --lora"):
        load_lora(pipeline, tmp_path / "model.safetensors")
