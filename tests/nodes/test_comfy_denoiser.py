"""The denoiser on ComfyUI's MODEL: same numbers as through diffusers, gradients that are right."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui import newest, pack
from demo_side import caption, denoiser
from unmemorize.shared.models.families.schedules import DiscreteSchedule, FlowSchedule
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

pytestmark = pytest.mark.comfy
PROMPTS = [caption(), caption("held_out"), ""]


def demo_traces(prompts: list, steps: int):
    """Return |D| of the demo through ComfyUI; the negative is the empty prompt."""
    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    detection, prompt = pack("shared.score.detection"), pack("nodes.engine.comfy_denoiser").Prompt
    config = detection.DetectionConfig(steps=steps, batch_size=4)
    with torch.inference_mode():

        def encode(text: str) -> list:
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

        return pack("nodes.engine.measuring").with_denoiser(
            model, {text: prompt(entries=encode(text)) for text in prompts}, encode(""),
            {"samples": torch.zeros(1, 4, 16, 16)},
            lambda ours: detection.detect(ours, prompts, config).traces,
            forward_rows=1,
        )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3])
def test_scores_are_those_of_diffusers(comfy, steps):
    expected = detect(denoiser(), PROMPTS, DetectionConfig(steps=steps)).traces
    found = torch.from_numpy(comfy.call(demo_traces, PROMPTS, steps))
    # Sums in another order, seen through the difference of two predictions that nearly agree.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def levels(kind: str, steps: int):
    from tiny_networks import tiny_model

    model = tiny_model(kind)
    sampling = model.get_model_object("model_sampling")
    return pack("nodes.engine.comfy_denoiser").noise_levels(sampling, steps)


DISCRETE = DiscreteSchedule({
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False,
})  # fmt: skip


def flow(mu: float | None = None, **config) -> FlowSchedule:
    """Return the levels of diffusers' Euler; with `mu` from evenly spaced ones, as Flux starts."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    def levels(steps: int):
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        even = None if mu is None else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, sigmas=even, mu=mu)
        return scheduler.sigmas, scheduler.timesteps

    return FlowSchedule(levels, 1000)


SCHEDULES = {  # as the released models' folders say; Flux at 1024 pixels
    "sd1": DISCRETE,
    "sdxl": DISCRETE,
    "sd3": flow(shift=3.0),
    "flux": flow(mu=1.15, use_dynamic_shifting=True),
}


@newest
@pytest.mark.parametrize("steps", [50, 30, 1])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_noise_levels_are_those_of_diffusers(comfy, kind, steps):
    found = torch.from_numpy(comfy.call(levels, kind, steps))
    torch.testing.assert_close(found, SCHEDULES[kind].sigmas(steps), rtol=1e-5, atol=1e-6)


def gradients(kind: str) -> dict:
    """Return |gradient of |D|| per token, and the slope of |D| along each token's gradient."""
    from tiny_networks import tiny_conditioning, tiny_model

    metrics, prompt = pack("shared.score.metrics"), pack("nodes.engine.comfy_denoiser").Prompt

    def work(denoiser) -> dict:
        sigma = denoiser.sigmas(50)[0]
        x, cond = denoiser.initial_noise([0], sigma), denoiser.encode(["text"])
        with torch.no_grad():
            x0_uncond = denoiser.denoise(x, sigma, denoiser.unconditional())

        def norm(embeddings):
            x0_cond = denoiser.denoise(x, sigma, replace(cond, embeddings=embeddings))
            return (metrics.text_noise_norm(x0_cond, x0_uncond) / sigma).double()

        start = cond.embeddings.detach().clone()
        leaf = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(norm(leaf), leaf)
        lengths, step, slopes = gradient.norm(dim=2)[0], 0.02, []
        with torch.no_grad():
            for token, length in enumerate(lengths):
                away = torch.zeros_like(start)
                away[0, token] = step * gradient[0, token] / length
                slopes.append((norm(start + away) - norm(start - away)) / (2 * step))
        return {"lengths": lengths, "slopes": torch.cat(slopes)}

    with torch.inference_mode():
        model = tiny_model(kind)
        weights = {id(weight) for weight in model.model.state_dict(keep_vars=True).values()}
        found = pack("nodes.engine.measuring").with_denoiser(
            model, {"text": prompt(entries=tiny_conditioning(kind, 1))},
            tiny_conditioning(kind, 2), {"samples": torch.zeros(1, 4, 8, 8)}, work,
            forward_rows=1, gradients=True,
        )  # fmt: skip
        after = list(model.model.state_dict(keep_vars=True).values())
        found["undone"] = {id(weight) for weight in after} == weights
        found["inference"] = all(weight.is_inference() for weight in after)
    return found


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
def test_gradients_are_those_of_finite_differences(comfy, kind):
    found = comfy.call(gradients, kind)
    # In float32, over steps of 0.02; a wrong vector is less steep than it is long.
    np.testing.assert_allclose(found["slopes"], found["lengths"], rtol=3e-3)
    assert found["lengths"].min() > 1e-2
    assert found["undone"]
    assert found["inference"]  # so that there was something to undo


def together_and_alone(kind: str) -> dict:
    """Return the scores of prompts measured together, and each on its own."""
    from tiny_networks import tiny_conditioning, tiny_model

    detection, prompt = pack("shared.score.detection"), pack("nodes.engine.comfy_denoiser").Prompt
    run = pack("nodes.engine.measuring")
    config = detection.DetectionConfig(seeds=(0, 1, 2), steps=2, batch_size=4)

    def scores(part: dict) -> list:
        return run.with_denoiser(
            model, part, tiny_conditioning(kind, 9), {"samples": torch.zeros(1, 4, 8, 16)},
            lambda denoiser: detection.detect(denoiser, [*part], config).scores,
            forward_rows=1,
        ).tolist()  # fmt: skip

    with torch.inference_mode():
        model = tiny_model(kind)
        one, long = tiny_conditioning(kind, 1), tiny_conditioning(kind, 2, tokens=13)
        ((embeddings, further),) = tiny_conditioning(kind, 3)
        area = [[embeddings, further | {"area": (8, 8, 0, 8), "strength": 1.0}]]
        both = [one[0], tiny_conditioning(kind, 4)[0]]
        entries = {"one": one, "long": long, "combined": both, "area": one + area}
        prompts = {name: prompt(entries=part) for name, part in entries.items()}
        groups = run.share_negative(prompts)
        return {
            "groups": [list(group) for group in groups],
            "together": [score for group in groups for score in scores(group)],
            "alone": [scores({name: one})[0] for name, one in prompts.items()],
        }


@newest
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_prompts_measured_together_score_as_alone(comfy, kind):
    found = comfy.call(together_and_alone, kind)
    assert found["groups"] == [["one", "long", "combined"], ["area"]]
    np.testing.assert_allclose(found["together"], found["alone"], rtol=1e-4)
    assert len({f"{score:.3g}" for score in found["alone"]}) == 4  # each entry counts


@newest
def test_what_cannot_be_measured_is_refused(comfy):
    for case, message in REFUSED.items():
        with pytest.raises(AssertionError, match=message):
            comfy.call(refused, case)


REFUSED = {
    "video": "Only images can be measured",
    "empty": "A conditioning is empty",
    "sampling": "cannot be measured",
}


def refused(case: str) -> None:
    import comfy.model_sampling
    from tiny_networks import tiny_conditioning, tiny_model

    model, text = tiny_model("sd1"), tiny_conditioning("sd1", 1)
    samples = torch.zeros(1, 4, 2, 8, 8) if case == "video" else torch.zeros(1, 4, 8, 8)
    if case == "sampling":
        kind = type("Sampling", (comfy.model_sampling.COSMOS_RFLOW, torch.nn.Module), {})
        model.add_object_patch("model_sampling", kind())
    prompts = {
        "text": pack("nodes.engine.comfy_denoiser").Prompt(entries=[] if case == "empty" else text)
    }
    pack("nodes.engine.measuring").with_denoiser(
        model, prompts, text, {"samples": samples}, lambda denoiser: None, forward_rows=1
    )
