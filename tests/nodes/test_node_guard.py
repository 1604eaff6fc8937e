"""Memorization Guard: what each method does to a run, and that nothing happens without cause."""

import numpy as np
import pytest
import torch
from comfyui import newest, node, pack
from demo_side import denoiser
from mitigated_prompts import calibrated, memorized, ordinary, sampler
from test_cancel import demo
from unmemorize import demo as demo_images
from unmemorize.shared.mitigation.attention import cross_attention, damped
from unmemorize.shared.mitigation.initial_noise import InitialNoise
from unmemorize.shared.mitigation.method import Start
from watched_sampling import patched, report

pytestmark = pytest.mark.comfy
METHODS = ["delayed guidance", "static delay", "opposite guidance", "attention", "initial noise"]
STEPS, CFG = 6, 5.0
BY_NORM = {"target_from": "norm", "target_norm": 0.0, "iterations": 2}


def guarded_run(method: str | None, parameters: dict, changes: dict, more: dict) -> dict:
    """Sample the demo under a guard; return latents, the record and what was left alone.

    Args:
        method: As in the combo; None samples without a guard.
        parameters: Of the method.
        changes: Of the sampler's settings.
        more: "between", names of nodes that patch the model, "before" the guard or after it;
            "batch", images; "noise" False, as a second sampler; "stop", the forward pass at whose
            end the user cancels; "prompt".
    """
    from comfy.model_management import InterruptProcessingException

    import nodes as comfyui_nodes

    record = latent = None
    with torch.inference_mode():
        model, clip, passes = demo(more.get("stop"))
        weights = {key: value.clone() for key, value in model.model.state_dict().items()}
        options = repr(model.model_options)
        encode = pack("nodes.engine.measuring").encoded
        positive, negative = (encode(clip, t) for t in (more.get("prompt", "a red cat"), ""))
        between, guarded = more.get("between", []), model
        if more.get("before"):
            guarded = patched(guarded, between)
        if method is not None:
            made = pack("nodes.guard").chosen_method({"method": method} | parameters, {})
            gate = pack("nodes.inputs").gate_of("always", None)
            guarded, record = pack("nodes.engine.guarding").guard(guarded, made, gate)
        if not more.get("before"):
            guarded = patched(guarded, between)
        settings = {"seed": 1, "steps": STEPS, "cfg": CFG, "sampler_name": "euler",
                    "scheduler": "normal"} | changes  # fmt: skip
        try:
            latent = comfyui_nodes.common_ksampler(
                guarded, **settings, positive=positive, negative=negative,
                latent={"samples": torch.zeros(more.get("batch", 1), 4, 16, 16)},
                disable_noise=not more.get("noise", True),
            )[0]["samples"]  # fmt: skip
        except InterruptProcessingException:
            pass
        runs = record.runs if record is not None else []
        after = model.model.state_dict(keep_vars=True)
    return {
        "samples": latent,
        "passes": len(passes),
        "images": [vars(image) for run in runs for image in run.guarded],
        "traces": [run.traces for run in runs],
        "undone": all(torch.equal(weights[key], after[key]) for key in weights)
        and all(weight.is_inference() for weight in after.values())
        and repr(model.model_options) == options,
    }


def guarded(comfy, method, parameters=None, changes=None, **more) -> dict:
    return comfy.call(guarded_run, method, parameters or {}, changes or {}, more)


@pytest.mark.parametrize("method", METHODS)
def test_a_shut_gate_gives_the_very_images(comfy, method):
    graph = calibrated() | {
        "guard": node("UnmemorizeGuard", model=["demo", 0], gate="auto", method=method,
                      calibration=["calibrate", 0], negative=["empty", 0]),
    }  # fmt: skip
    for name in ("memorized", "ordinary"):
        graph[f"plain {name}"] = sampler([name, 0])
        graph[f"guarded {name}"] = sampler([name, 0], ["guard", 0])
        graph[f"report {name}"] = report([f"guarded {name}", 0], record=["guard", 1])
    keep = {f"{part} {name}": [f"{part} {name}", 0] for name in ("memorized", "ordinary")
            for part in ("plain", "guarded")}  # fmt: skip
    keep |= {name: [f"report {name}", 2] for name in ("memorized", "ordinary")}
    run = comfy.run(graph, keep=keep)
    shut = (run[f"{part} ordinary"]["samples"] for part in ("plain", "guarded"))
    np.testing.assert_array_equal(*shut)
    assert "guard did not act" in run["ordinary"]
    acted = (run[f"{part} memorized"]["samples"] for part in ("plain", "guarded"))
    assert np.abs(np.subtract(*acted)).max() > 0.1
    assert "guard acted by" in run["memorized"]
    assert "threshold" in run["memorized"]


NOTHING = [
    ("delayed guidance", {"start_percent": 0.0}),
    ("static delay", {"start_percent": 0.0}),
    ("attention", {"alpha": 1.0, "repulsion": 0.0}),
    ("initial noise", BY_NORM | {"iterations": 0}),
]


@newest
@pytest.mark.parametrize(("method", "parameters"), NOTHING)
def test_strength_zero_changes_nothing_bit_for_bit(comfy, method, parameters):
    plain = guarded(comfy, None, batch=2)
    acting = guarded(comfy, method, parameters, batch=2)
    np.testing.assert_array_equal(acting["samples"], plain["samples"])
    assert [image["fired"] for image in acting["images"]] == [True, True]


def in_two_parts(scale_before: float, percent: float) -> torch.Tensor:
    """Return the latent of two samplers one after the other, each with a cfg of its own."""
    import comfy.sample
    import comfy.samplers

    model, clip, _ = demo()
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    waits = sum(float(sigma) > float(sampling.percent_to_sigma(percent)) for sigma in sigmas[:-1])
    with torch.inference_mode():
        encode = pack("nodes.engine.measuring").encoded
        positive, negative = (encode(clip, t) for t in ("a red cat", ""))
        latent = torch.zeros(1, 4, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 1)
        for cfg, part in ((scale_before, sigmas[: waits + 1]), (CFG, sigmas[waits:])):
            latent = comfy.sample.sample_custom(
                model, noise, cfg, comfy.samplers.sampler_object("euler"), part, positive,
                negative, latent, seed=1,
            )  # fmt: skip
            noise = torch.zeros_like(noise)
    return latent


@pytest.mark.parametrize(
    ("method", "parameters", "scale_before", "percent"),
    [("static delay", {"start_percent": 0.5}, 0.0, 0.5),
     ("static delay", {"start_percent": 0.4, "scale_before": 1.0}, 1.0, 0.4),
     ("opposite guidance", {}, -2.0, 0.35),
     # Its score falls throughout, so that guidance comes in at the latest.
     ("delayed guidance", {"start_percent": 0.3}, 0.0, 0.3)],
)  # fmt: skip
def test_delays_are_two_samplers_in_a_row(comfy, method, parameters, scale_before, percent):
    expected = comfy.call(in_two_parts, scale_before, percent)
    found = guarded(comfy, method, parameters)["samples"]
    # Between two samplers latents are scaled back and forth.
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(found - guarded(comfy, None)["samples"]).max() > 0.1


def damped_prediction(x: np.ndarray, sigma: float, blocks: str) -> torch.Tensor:
    """Return the x0-prediction of the demo with damped attention."""

    attention = pack("nodes.engine.damped_attention")
    model, clip, _ = demo()
    with torch.inference_mode():
        cond = pack("nodes.engine.measuring").encoded(clip, "a red cat")
        forces = attention.ComfyTwoForces(
            attention.ComfyAttractionRepulsion(blocks=blocks), model.model.diffusion_model
        )
        return model.model.apply_model(
            torch.from_numpy(x), torch.tensor([sigma]), c_crossattn=cond[0][0],
            transformer_options=forces.damped({})["transformer_options"],
        )  # fmt: skip


@pytest.mark.parametrize("blocks", ["early", "all"])
def test_damped_attention_predicts_as_in_diffusers(comfy, blocks):
    theirs = denoiser()
    sigma = theirs.sigmas(50)[10]
    x = theirs.initial_noise([0], sigma)
    network = theirs.pipeline.unet
    cond = theirs.encode(["a red cat"])
    with torch.no_grad():
        plain = theirs.denoise(x, sigma, cond)
        with damped(cross_attention(network, blocks), 0.3, 0.1):
            expected = theirs.denoise(x, sigma, cond)
    found = torch.from_numpy(comfy.call(damped_prediction, x.numpy(), float(sigma), blocks))
    # As for undamped predictions: 1e-5 of the noise.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(sigma))
    assert (expected - plain).abs().max() > 1e-3 * float(sigma)


def test_attention_takes_one_more_pass_a_step(comfy):
    plain, acting = guarded(comfy, None), guarded(comfy, "attention")
    # Of the start one pass, for the empty prompt.
    assert acting["passes"] == plain["passes"] + STEPS + 1
    assert np.abs(acting["samples"] - plain["samples"]).max() > 0.1


def test_the_initial_noise_is_that_of_shared_through_diffusers(comfy):
    theirs = denoiser()
    cond, sigma = theirs.encode(["a red cat"]), theirs.sigmas(50)[0]
    x = theirs.initial_noise([1], sigma)
    with torch.no_grad():
        x0_uncond = theirs.denoise(x, sigma, theirs.unconditional())
    start = Start(
        denoiser=theirs, cond=cond, x=x, sigma=sigma, x0_uncond=x0_uncond,
        generator=torch.Generator(),
    )  # fmt: skip
    expected = InitialNoise(target=0.0, iterations=2).start(start)
    (image,) = guarded(comfy, "initial noise", BY_NORM)["images"]
    assert image["noise_before"] == pytest.approx(expected.before.item(), rel=1e-4)
    assert image["noise_after"] == pytest.approx(expected.after.item(), rel=1e-3)
    assert image["noise_after"] < 0.99 * image["noise_before"]


def test_initial_noise_works_without_guidance_and_others_say_that_they_cannot(comfy):
    plain = guarded(comfy, None, changes={"cfg": 1.0})
    acting = guarded(comfy, "initial noise", BY_NORM, {"cfg": 1.0})
    assert np.abs(acting["samples"] - plain["samples"]).max() > 1e-3
    for method in METHODS[:-1]:
        with pytest.raises(AssertionError, match="acts on guidance, which is off"):
            guarded(comfy, method, changes={"cfg": 1.0})
    with pytest.raises(AssertionError, match="begins at pure noise"):
        guarded(comfy, "initial noise", BY_NORM, noise=False)


@pytest.mark.parametrize(
    ("method", "parameters", "stop"),
    [("initial noise", BY_NORM, 3), ("attention", {}, 4), ("delayed guidance", {}, 2)],
)
def test_nothing_is_left_after_a_run_nor_after_cancel(comfy, method, parameters, stop):
    cancelled = guarded(comfy, method, parameters, stop=stop)
    assert cancelled["samples"] is None
    assert cancelled["passes"] - stop in (0, 1)  # ComfyUI looks once a pass has begun
    assert cancelled["undone"]
    assert guarded(comfy, method, parameters)["undone"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["PerturbedAttentionGuidance", "APG", "TCFG", "RescaleCFG"])
def test_other_guidance_gets_along(comfy, name, before):
    """Where the guard leaves guidance alone theirs counts; where it acts, scores stay true."""
    theirs = guarded(comfy, None, between=[name])
    idle = guarded(
        comfy, "static delay", {"start_percent": 0.0}, between=[name], before=before, batch=1
    )
    np.testing.assert_array_equal(idle["samples"], theirs["samples"])
    acting = guarded(comfy, "static delay", between=[name], before=before)
    alone = guarded(comfy, "static delay")
    np.testing.assert_allclose(acting["traces"][0][:, 0], alone["traces"][0][:, 0], rtol=1e-6)
    assert np.isfinite(acting["samples"]).all()
    assert np.abs(acting["samples"] - theirs["samples"]).max() > 0.1


@newest
@pytest.mark.parametrize(
    "changes", [{"sampler_name": "heun"}, {"sampler_name": "dpmpp_2m_sde"}, {"scheduler": "karras"}]
)
def test_any_sampler_and_a_batch(comfy, changes):
    for method in ("delayed guidance", "attention"):
        acting = guarded(comfy, method, changes=changes, batch=2)
        plain = guarded(comfy, None, changes=changes, batch=2)
        moved = np.abs(acting["samples"] - plain["samples"]).reshape(2, -1).max(1)
        assert (moved > 0.1).all()
        assert len(acting["images"]) == 2


def test_scores_of_the_gate_are_those_of_detect(comfy):
    graph = calibrated() | {
        "guard": node("UnmemorizeGuard", model=["demo", 0], gate="always", method="static delay",
                      calibration=["calibrate", 0], **{"method.start_percent": 0.3}),
        "sampler": sampler(["memorized", 0], ["guard", 0]),
        "report": report(["sampler", 0], record=["guard", 1]),
        "detect": node("UnmemorizeDetect", model=["demo", 0], positive=["memorized", 0],
                       negative=["empty", 0], latent=["latent", 0], seeds=1, steps=1,
                       calibration=["calibrate", 0]),
    }  # fmt: skip
    run = comfy.run(graph, keep={"told": ["report", 2], "score": ["detect", 1]})
    assert f"prompt scores {run['score']:.3g}" in run["told"]
    assert memorized() != ordinary()


def parameters(method: str) -> list:
    """Return which of the guard's inputs are parameters of a method, as ComfyUI describes them."""
    import nodes as comfyui_nodes

    inputs = comfyui_nodes.NODE_CLASS_MAPPINGS["UnmemorizeGuard"].INPUT_TYPES()
    kind, details = inputs["required"]["method"][:2]
    if kind != "COMFY_DYNAMICCOMBO_V3":
        return [name for name in inputs["optional"] if name.startswith("method.")]
    (option,) = (option for option in details["options"] if option["key"] == method)
    return [f"method.{name}" for name in option["inputs"]["optional"]]


def test_only_the_parameters_of_the_method_show_where_comfyui_can(comfy):
    found = {method: comfy.call(parameters, method) for method in METHODS}
    assert "method.alpha" in found["attention"]
    assert "method.target_norm" in found["initial noise"]
    assert ("method.alpha" in found["initial noise"]) == (comfy.version == "0.3.75")


@newest
def test_a_calibration_of_another_negative_is_refused(comfy):
    graph = calibrated() | {
        "bad": node("CLIPTextEncode", clip=["demo", 1], text="blurry"),
        "guard": node("UnmemorizeGuard", model=["demo", 0], gate="auto", method="static delay",
                      calibration=["calibrate", 0]),
        "sampler": sampler(["memorized", 0], ["guard", 0], negative=["bad", 0]),
    }  # fmt: skip
    refused = comfy.run(graph, keep={"latent": ["sampler", 0]}, check=False)
    assert "negative: calibrated" in refused.error
    graph["guard"]["inputs"]["negative"] = ["empty", 0]
    comfy.run(graph, keep={"latent": ["sampler", 0]})


def beside_a_folder(folder: str, vae: bool, prompt: str) -> dict:
    """Sample the demo with and without the guard away from a folder; return both latents."""
    import nodes as comfyui_nodes

    with torch.inference_mode():
        load = pack("nodes.load_demo").LoadDemoModel.execute().result
        model, clip, autoencoder = load[:3]
        encode = pack("nodes.engine.measuring").encoded
        positive, negative = (encode(clip, text) for text in (prompt, ""))
        result = (
            pack("nodes.guard")
            .MemorizationGuard.execute(
                model=model, gate="always", vae=autoencoder if vae else None,
                method={"method": "training images", "folder": folder},
            ).result
        )  # fmt: skip
        sampled = [
            comfyui_nodes.common_ksampler(
                each, seed=1, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="normal",
                positive=positive, negative=negative,
                latent={"samples": torch.zeros(1, 4, 16, 16)},
            )[0]["samples"]
            for each in (model, result[0])
        ]  # fmt: skip
    return {"plain": sampled[0], "guarded": sampled[1]}


@newest
def test_a_folder_of_training_images_is_kept_away_from(comfy, tmp_path):
    with pytest.raises(AssertionError, match="There is no folder"):
        comfy.call(beside_a_folder, str(tmp_path / "absent"), True, "")
    with pytest.raises(AssertionError, match="holds no images"):
        comfy.call(beside_a_folder, str(tmp_path), True, "")
    with pytest.raises(AssertionError, match="connect the model's VAE"):
        comfy.call(beside_a_folder, str(tmp_path), False, "")
    demo_images.training_image(memorized()).save(tmp_path / "one.png")
    found = comfy.call(beside_a_folder, str(tmp_path), True, memorized())
    assert np.abs(found["guarded"] - found["plain"]).max() > 0.1
