"""What LoRA files bring besides factors: settings of PEFT, 8-bit numbers, embeddings."""

import json
import logging
import math

import pytest
import tiny
import torch
from test_lora import answer, factors, kohya, merged, peft, written
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.lora.attach import has_lora, load_lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")

PATTERNS = {
    "ranks": {"rank_pattern": {"to_k": 2, "attn1.to_q": 3}},
    "alphas": {"alpha_pattern": {"attn2.to_q": 1.5, r"down_blocks\.\d\..*to_k": 20}},
    "rslora": {"use_rslora": True, "rank_pattern": {"to_k": 2}},
    "dora": {"use_dora": True, "alpha_pattern": {"to_k": 3}},
}


@pytest.mark.parametrize("settings", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kept", ["beside", "header"])
def test_settings_of_single_modules_have_the_effect_that_peft_gives_them(tmp_path, settings, kept):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False,
                        **settings)  # fmt: skip
    source = tiny.stable_diffusion()
    plain = answer(source)
    if kept == "beside":
        model = get_peft_model(source.unet, config)
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
    else:
        source.unet.add_adapter(config)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(source.unet))
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=layers,
            unet_lora_adapter_metadata=source.unet.peft_config["default"].to_dict(),
        )  # fmt: skip
        path = tmp_path / "pytorch_lora_weights.safetensors"
    pipeline = tiny.stable_diffusion()
    load_lora(pipeline, path)
    torch.testing.assert_close(answer(pipeline), answer(source), rtol=1e-4, atol=1e-4)
    assert (answer(source) - plain).abs().max() > 0.1


def peft_file(tmp_path, **config):
    pipeline = tiny.stable_diffusion()
    path = written(tmp_path, peft(factors(pipeline)), "adapter_model.safetensors")
    text = json.dumps({"r": 4, "lora_alpha": 2.0, "peft_type": "LORA"} | config)
    path.with_name("adapter_config.json").write_text(text)
    return pipeline, path


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bias": "all"}, "bias='all', which is not applied"),
        ({"modules_to_save": ["conv_in"]}, r"modules_to_save=\['conv_in'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"something_new": 1}, "something_new=1"),
        ({"r": 8}, "the rank 8, its factors have 4"),
        ({"rank_pattern": {"to_k": 2}}, "to_k the rank 2, its factors have 4"),
        ({"alpha_pattern": {"(": 2}}, "is no pattern"),
        ({"r": None}, "`r` is null, expected a whole number of at least 0"),
        ({"lora_alpha": math.nan}, "no finite number"),
        ({"peft_type": "IA3"}, "describes a IA3"),
    ],
)
def test_settings_that_are_not_applied_are_refused_by_name(tmp_path, config, says):
    pipeline, path = peft_file(tmp_path, **config)
    with pytest.raises(ModelError, match=says):
        load_lora(pipeline, path)
    assert not has_lora(pipeline)


@pytest.mark.parametrize("text", ["no", "[1]", '{"r": 4', "\x00", "[" * 100000])
def test_a_configuration_that_is_none_is_named_with_its_file(tmp_path, text):
    pipeline, path = peft_file(tmp_path)
    path.with_name("adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json .*expected an object"):
        load_lora(pipeline, path)
    header = written(tmp_path, kohya(factors(pipeline)), lora_adapter_metadata=text)
    if "\x00" not in text:
        with pytest.raises(ModelError, match=r"lora\.safetensors: .*lora_adapter_metadata"):
            load_lora(pipeline, header)


def test_two_scales_for_one_module_are_refused(tmp_path):
    pipeline = tiny.stable_diffusion()
    state = {"unet.conv_in.lora_A.weight": torch.ones(4, 4, 3, 3),
             "unet.conv_in.lora_B.weight": torch.ones(16, 4, 1, 1)}  # fmt: skip
    header = json.dumps({"unet.r": 4, "unet.lora_alpha": 8})
    same = written(tmp_path, state | {"unet.conv_in.alpha": torch.tensor(8.0)},
                   lora_adapter_metadata=header)  # fmt: skip
    load_lora(pipeline, same)
    other = written(tmp_path, state | {"unet.conv_in.alpha": torch.tensor(4.0)},
                    lora_adapter_metadata=header)  # fmt: skip
    with pytest.raises(ModelError, match=r"conv_in the alpha 4, .* 8"):
        load_lora(tiny.stable_diffusion(), other)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
     torch.float8_e4m3fnuz, torch.float8_e5m2fnuz],
)  # fmt: skip
def test_every_type_of_numbers_is_read(tmp_path, dtype):
    pipeline = tiny.stable_diffusion()
    pairs = {place: tuple(factor.to(dtype).float() for factor in pair)
             for place, pair in factors(pipeline).items()}  # fmt: skip
    state = {key: value.to(dtype) if value.ndim else value for key, value in kohya(pairs).items()}
    load_lora(pipeline, written(tmp_path, state))
    expected = answer(merged(tiny.stable_diffusion(), pairs))
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-3, atol=1e-3)


def test_nan_in_eight_bits_is_found(tmp_path):
    pipeline = tiny.stable_diffusion()
    state = {key: value.to(torch.float8_e4m3fn) for key, value in kohya(factors(pipeline)).items()}
    key = next(key for key in state if key.endswith("up.weight"))
    state[key] = torch.full_like(state[key].float(), math.nan).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="1 weight with NaN"):
        load_lora(pipeline, written(tmp_path, state))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e8m0fnu])
def test_codes_are_refused_as_quantized(tmp_path, dtype):
    pipeline = tiny.stable_diffusion()
    state = kohya(factors(pipeline))
    key = next(key for key in state if key.endswith("up.weight"))
    state[key] = torch.ones(state[key].shape).to(dtype)
    with pytest.raises(ModelError, match=r"is quantized \(1 key such as lora_"):
        load_lora(pipeline, written(tmp_path, state))


def still(kind: str, pipeline) -> dict[str, torch.Tensor]:
    """Return a LoRA that changes nothing."""
    state = kohya(factors(pipeline))
    ends = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": ".alpha"}[kind]
    return {key: value * 0 if key.endswith(ends) else value for key, value in state.items()}


@pytest.mark.parametrize("kind", ["down", "up", "alpha"])
def test_a_lora_without_effect_is_refused(tmp_path, kind):
    pipeline = tiny.stable_diffusion()
    with pytest.raises(ModelError, match=r"without any effect: in each module \(\d+\)"):
        load_lora(pipeline, written(tmp_path, still(kind, pipeline)))
    assert not has_lora(pipeline)


def test_one_module_with_an_effect_is_enough(tmp_path, caplog):
    pipeline = tiny.stable_diffusion()
    state, moving = still("up", pipeline), kohya(factors(pipeline))
    key = next(key for key in state if key.endswith("lora_up.weight"))
    with caplog.at_level(logging.WARNING, "unmemorize"):
        load_lora(pipeline, written(tmp_path, state | {key: moving[key]}))
    assert has_lora(pipeline)
    assert not caplog.records


@pytest.mark.parametrize(("alpha", "told"), [(1.0, False), (1e30, True), (-1e4, True)])
def test_an_absurd_scale_is_told(tmp_path, caplog, alpha, told):
    pipeline = tiny.stable_diffusion()
    state = {key: torch.tensor(alpha) if key.endswith("alpha") else value
             for key, value in kohya(factors(pipeline)).items()}  # fmt: skip
    with caplog.at_level(logging.WARNING, "unmemorize"):
        load_lora(pipeline, written(tmp_path, state))
    assert [("times its own size" in r.message) for r in caplog.records] == [True] * told


def test_bundled_embeddings_are_left_out_and_named(tmp_path, caplog):
    pipeline = tiny.stable_diffusion()
    pairs = factors(pipeline)
    state = kohya(pairs) | {"bundle_emb.zorp.x.clip_l": torch.ones(2, 32),
                            "bundle_emb.zorp.x.clip_g": torch.ones(2, 32)}  # fmt: skip
    with caplog.at_level(logging.WARNING, "unmemorize"):
        load_lora(pipeline, written(tmp_path, state))
    assert "1 embedding along that is left out: zorp.x." in caplog.text
    expected = answer(merged(tiny.stable_diffusion(), pairs))
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-3, atol=1e-3)


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    """No layer of PEFT, no attribute, no parameter that learns no more."""
    import peft as library

    pipeline = tiny.stable_diffusion()
    for parameter in pipeline.unet.conv_out.parameters():
        parameter.requires_grad_(True)
    before = {part: (list(dict(module.named_modules())), dict(vars(module)),
                     [p.requires_grad for p in module.parameters()])
              for part, module in (("unet", pipeline.unet),
                                   ("text_encoder", pipeline.text_encoder))}  # fmt: skip
    state = kohya(factors(pipeline))
    for key in [key for key in state if "attn1_to_q.lora" in key]:
        state[key] = (state[key][:2] if "lora_down" in key else state[key][:, :2]).contiguous()
    path = written(tmp_path, state)  # two groups of ranks, each made by a call
    calls, inject = [], library.inject_adapter_in_model

    for fault, error in ((RuntimeError, ModelError), (KeyboardInterrupt, KeyboardInterrupt)):

        def failing(config, part, adapter, fault=fault):
            calls.append(part)
            if len(calls) == 3:
                raise fault
            return inject(config, part, adapter)

        monkeypatch.setattr(library, "inject_adapter_in_model", failing)
        calls.clear()
        with pytest.raises(error):
            load_lora(pipeline, path)
        assert len(calls) == 3
        for part, (names, attributes, flags) in before.items():
            module = getattr(pipeline, part)
            assert list(dict(module.named_modules())) == names
            assert vars(module).keys() == attributes.keys()
            assert [p.requires_grad for p in module.parameters()] == flags
    monkeypatch.undo()
    load_lora(pipeline, path)
    assert has_lora(pipeline)


def sd3_lora() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a LoRA as sd-scripts names SD3's layers, and what it adds to those of diffusers."""
    generator = torch.Generator().manual_seed(0)
    state, changes = {}, {}
    rows = {"x_block_attn_qkv": [f"attn.to_{x}" for x in "qkv"],
            "context_block_attn_qkv": [f"attn.add_{x}_proj" for x in "qkv"],
            "x_block_mlp_fc1": ["ff.net.0.proj"]}  # fmt: skip
    for layer, names in rows.items():
        high = 128 if "fc1" in layer else 32 * len(names)
        down = torch.randn(4, 32, generator=generator)
        up = 0.1 * torch.randn(high, 4, generator=generator)
        stem = f"lora_unet_joint_blocks_0_{layer}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                  f"{stem}.alpha": torch.tensor(2.0)}  # fmt: skip
        for name, part in zip(names, (0.5 * up @ down).chunk(len(names)), strict=True):
            changes[f"transformer_blocks.0.{name}"] = part
    return state, changes


@pytest.mark.parametrize("trainer", ["sd-scripts", "OneTrainer"])
def test_loras_for_sd3_have_the_effect_of_the_changed_network(tmp_path, trainer):
    state, changes = sd3_lora()
    if trainer == "OneTrainer":
        state = {}
        for name, change in changes.items():
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            stem = f"lora_transformer_{name.replace('.', '_')}"
            state |= {f"{stem}.lora_down.weight": v[:4], f"{stem}.lora_up.weight": u[:, :4] * s[:4],
                      f"{stem}.alpha": torch.tensor(4.0)}  # fmt: skip
    pipeline, reference = tiny.stable_diffusion_3(), tiny.stable_diffusion_3()
    plain = answer(pipeline)
    with torch.no_grad():
        for name, change in changes.items():
            reference.transformer.get_submodule(name).weight += change
    load_lora(pipeline, written(tmp_path, state))
    torch.testing.assert_close(answer(pipeline), answer(reference), rtol=1e-3, atol=1e-3)
    assert (answer(reference) - plain).abs().max() > 0.05


def test_a_folder_says_which_file_in_it_is_meant(tmp_path):
    pipeline = tiny.stable_diffusion()
    with pytest.raises(ModelError, match=r"is a folder, expected one file\. Give a \.safetensors"):
        load_lora(pipeline, tmp_path)
    path = written(tmp_path, kohya(factors(pipeline)), "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"Did you mean {path}"):
        load_lora(pipeline, tmp_path)


def test_a_lora_of_another_family_says_what_to_give(tmp_path):
    path = written(tmp_path, kohya(factors(tiny.stable_diffusion())))
    with pytest.raises(ModelError, match="Give the base model"):
        load_lora(tiny.stable_diffusion_3(), path)
