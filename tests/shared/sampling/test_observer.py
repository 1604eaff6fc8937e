"""The observer reads scores, changes no image, and leaves nothing behind."""

from inspect import signature
from itertools import pairwise

import pytest
import tiny
import torch
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.sampling.observer import observe
from unmemorize.shared.score.calibration import (
    Calibration,
    CalibrationError,
    CalibrationMismatch,
    settings_of,
)
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import inner_products, ordinary
from unmemorize.shared.score.detection import control_differences, detect
from unmemorize.shared.score.metrics import text_noise_norm
from unmemorize.shared.score.pooled_basis import pooled_cross_fitted

PROMPTS = ["a red cat", "tall tree"]
STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


def run(pipeline, prompts=PROMPTS, seeds=(0, 1), **kwargs):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt"} | kwargs
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipeline(prompts, generator=generators, **settings).images


class Calls:
    """Counts network calls and keeps the rows of each."""

    def __init__(self, network):
        self.rows = []
        network.register_forward_hook(lambda m, a, o: self.rows.append(len(o[0])))


@pytest.fixture(params=tiny.PIPELINES)
def pipeline(request):
    return tiny.PIPELINES[request.param]()


def test_images_are_bit_identical_and_nothing_is_computed_twice(pipeline):
    calls = Calls(getattr(pipeline, "unet", None) or pipeline.transformer)
    plain = run(pipeline)
    without = list(calls.rows)
    calls.rows.clear()
    with observe(pipeline) as record:
        observed = run(pipeline)
    assert torch.equal(plain, observed)
    assert calls.rows == without
    assert len(record.runs) == 1


def trace_of(pipeline) -> tuple:
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    return (
        {k: id(v) for k, v in vars(pipeline).items() if not k.startswith("_")},
        {name: len(getattr(network, name)) for name in vars(network) if "hooks" in name},
        network.forward.__func__,
    )


def test_removal_leaves_no_trace(pipeline):
    before = trace_of(pipeline)
    with observe(pipeline):
        assert trace_of(pipeline) != before
        run(pipeline)
    assert trace_of(pipeline) == before
    with pytest.raises(ZeroDivisionError), observe(pipeline) as record:
        run(pipeline, callback_on_step_end=lambda *_: 1 / 0)
    assert trace_of(pipeline) == before
    assert len(record.runs) == 1  # what was seen until then is kept


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_scores_are_those_of_the_denoiser(name):
    pipeline = tiny.PIPELINES[name]()
    denoiser = PipelineDenoiser(pipeline)
    with observe(pipeline) as record:
        run(pipeline)
    observed = record.runs[0]
    sigmas = denoiser.sigmas(STEPS)
    x = denoiser.initial_noise((0, 1), sigmas[0])
    cond, uncond = denoiser.encode(PROMPTS), denoiser.unconditional()[[0, 0]]
    expected = []
    with torch.no_grad():
        for sigma, after in pairwise(sigmas):
            rows = [denoiser.denoise(x, sigma, c) for c in (uncond, cond)]
            expected.append(text_noise_norm(*rows) / sigma)
            x0 = rows[0] + 5.0 * (rows[1] - rows[0])
            x = x0 + after / sigma * (x - x0)
    expected = torch.stack(expected, dim=1).double()
    torch.testing.assert_close(observed.l2, expected, rtol=1e-3, atol=1e-5)
    assert observed.l2.shape == (2, STEPS)
    elements = torch.tensor(denoiser.latent_shape).prod()
    torch.testing.assert_close(observed.per_element, observed.l2 / elements**0.5)
    assert observed.measurable
    assert observed.comparable
    assert observed.reason == ""
    assert observed.prompts == tuple(PROMPTS)
    assert list(observed.timesteps) == sorted(observed.timesteps, reverse=True)


def test_guidance_off_is_not_measurable_and_costs_nothing(pipeline):
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    with observe(pipeline) as record:
        calls = Calls(network)
        run(pipeline, guidance_scale=1.0)
    assert calls.rows == [2] * STEPS
    assert not record.runs[0].measurable
    assert "no network call" in record.runs[0].reason
    assert record.runs[0].l2.shape == (0, 0)


def test_several_runs_batches_and_images_per_prompt():
    pipeline = tiny.stable_diffusion()
    with observe(pipeline) as record:
        run(pipeline)
        run(pipeline, "a dog", seeds=(0, 1, 2), num_images_per_prompt=3, num_inference_steps=2)
        run(pipeline, guidance_scale=1.0)
        run(pipeline, "a red cat", seeds=(0,))
    assert [tuple(r.l2.shape) for r in record.runs] == [(2, 3), (3, 2), (0, 0), (1, 3)]
    assert [r.measurable for r in record.runs] == [True, True, False, True]
    torch.testing.assert_close(record.runs[3].l2, record.runs[0].l2[:1], rtol=1e-4, atol=1e-5)
    run(pipeline)
    assert len(record.runs) == 4  # after the block nothing is seen


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_negatives_are_recorded_because_they_decide_the_score(name):
    pipeline = tiny.PIPELINES[name]()
    with observe(pipeline) as record:
        run(pipeline)
        run(pipeline, negative_prompt=["a sea", "a sea"])
    plain, negative = record.runs
    assert plain.negatives == ()
    assert plain.negatives_are == ("zeros" if name == "sdxl" else "empty prompt")
    assert negative.negatives == ("a sea", "a sea")
    assert negative.negatives_are == "prompts"
    assert negative.measurable
    assert not negative.comparable
    assert not torch.allclose(plain.l2, negative.l2, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "encoder"), [("sdxl", "_2"), ("sd3", "_2"), ("sd3", "_3"), ("flux", "_2")]
)
def test_a_negative_for_another_text_encoder_is_seen(name, encoder):
    """It decides the score like the first one: what the controls were measured with is another."""
    pipeline = tiny.PIPELINES[name]()
    if name == "sdxl":
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    calibration = calibration_of(pipeline)
    empty = (TRUE_GUIDANCE if name == "flux" else {}) | {"negative_prompt": ["", ""]}
    plain = run_observed(pipeline, calibration, **empty)
    assert plain.residual is not None
    other = no_verdict(
        pipeline, calibration, "moved away from prompts",
        **empty | {f"negative_prompt{encoder}": ["a sea", "a sea"]},
    )  # fmt: skip
    assert other.negatives[-2:] == ("a sea", "a sea")
    assert not other.comparable
    assert not torch.allclose(plain.l2, other.l2, rtol=1e-4)


def test_zeros_stay_zeros_whatever_the_second_encoder_was_given():
    """As SDXL's pipeline does it: without a first negative prompt it does not read the second."""
    pipeline = tiny.stable_diffusion_xl()
    calibration = calibration_of(pipeline)
    plain = run_observed(pipeline, calibration)
    other = run_observed(pipeline, calibration, negative_prompt_2=["a sea", "a sea"])
    assert other.negatives_are == "zeros"
    assert torch.equal(plain.residual, other.residual)


def test_negative_embeddings_are_recorded():
    pipeline = tiny.stable_diffusion()
    embeddings = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    with observe(pipeline) as record:
        run(pipeline, None, prompt_embeds=embeddings, negative_prompt_embeds=embeddings)
    assert record.runs[0].negatives_are == "embeddings"
    assert record.runs[0].prompts == ()
    assert record.runs[0].l2.max() < 1e-4  # the same text on both sides


def test_flux_is_measurable_with_true_guidance_only():
    pipeline = tiny.flux()
    with observe(pipeline) as record:
        run(pipeline)
        run(pipeline, negative_prompt=["", ""], true_cfg_scale=2.0)
    assert "guides itself" in record.runs[0].reason
    assert record.runs[1].measurable
    assert record.runs[1].comparable
    denoiser = PipelineDenoiser(pipeline)
    sigma = denoiser.sigmas(STEPS)[0]
    x = denoiser.initial_noise((0, 1), sigma)
    denoiser.family.guidance_embedding = 5.0  # what `run` gives as guidance_scale
    with torch.no_grad():
        rows = [
            denoiser.denoise(x, sigma, c)
            for c in (denoiser.unconditional()[[0, 0]], denoiser.encode(PROMPTS))
        ]
    expected = (text_noise_norm(*rows) / sigma).double()
    torch.testing.assert_close(record.runs[1].l2[:, 0], expected, rtol=1e-3, atol=1e-5)


def test_what_the_user_encodes_inside_is_no_part_of_the_next_run():
    pipeline = tiny.flux()
    with observe(pipeline) as record:
        pipeline.encode_prompt(["a sea"], None)
        run(pipeline)
    assert record.runs[0].prompts == tuple(PROMPTS)
    assert "guides itself" in record.runs[0].reason


def test_another_pipeline_on_the_same_network_is_no_run():
    pipeline = tiny.stable_diffusion()
    other = type(pipeline)(**pipeline.components, requires_safety_checker=False)
    with observe(pipeline) as record:
        run(pipeline)
        run(other)
    assert record.runs[0].l2.shape == (2, STEPS)


def test_the_signatures_of_wrapped_methods_stay():
    """Pipelines ask which arguments a method takes."""
    pipeline = tiny.stable_diffusion()
    names = ("encode_prompt", "check_inputs", "progress_bar")
    before = [signature(getattr(pipeline, name)) for name in names]
    with observe(pipeline):
        assert [signature(getattr(pipeline, name)) for name in names] == before


def test_a_pipeline_that_is_not_supported_is_refused_untouched():
    with pytest.raises(ValueError, match="is not supported"), observe(object()):
        pass


def calibration_of(pipeline, resolution=None, seeds=(5, 6), name="abc"):
    """A calibration of controls that stand for themselves, at the pipeline's own first level."""
    denoiser = PipelineDenoiser(pipeline, resolution=resolution)
    config = DetectionConfig(seeds=seeds, schedule_steps=STEPS)
    kept = {}
    magnitudes = Calibration.from_controls(
        detect(denoiser, CONTROLS, config, on_difference=kept.__setitem__),
        model=name, settings=settings_of(denoiser, config), name="test", false_positive_rate=0.2,
    )  # fmt: skip
    return magnitudes.with_observed(torch.stack([kept[i] for i in range(len(CONTROLS))], dim=1))


CONTROLS = [f"a {color} {thing}" for color in ("red", "green", "tall") for thing in ("cat", "dog")]
TRUE_GUIDANCE = {"negative_prompt": ["", ""], "true_cfg_scale": 2.0, "guidance_scale": 3.5}
"""With which Flux is measurable, as its controls were."""


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_residuals_are_those_of_a_slow_reference(name):
    """For the same noise: D by the denoiser, outside of what all controls at all seeds span."""
    pipeline = tiny.PIPELINES[name]()
    calibration = calibration_of(pipeline)
    changes = TRUE_GUIDANCE if name == "flux" else {}
    plain = run(pipeline, **changes)
    with observe(pipeline, calibration) as record:
        assert torch.equal(run(pipeline, **changes), plain)
    (observed,) = record.runs
    assert observed.residual_reason == ""
    denoiser = PipelineDenoiser(pipeline)

    def differences(prompts, seeds):
        config = DetectionConfig(seeds=seeds, schedule_steps=STEPS)
        return control_differences(denoiser, prompts, config, [0] * len(seeds))

    of_controls = differences(CONTROLS, (5, 6))
    products = inner_products(of_controls.flatten(0, 1))
    products = products.view(2, len(CONTROLS), 2, len(CONTROLS))
    spanning = ordinary(pooled_cross_fitted(products, 1))
    rows = of_controls[:, spanning].flatten(0, 1).double()
    own = torch.stack([differences(PROMPTS, (seed,))[0, seed] for seed in (0, 1)]).double()
    mean = rows.mean(0)
    direction = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:1]
    rest = own - mean
    expected = (rest - rest @ direction.T @ direction).norm(dim=1)
    torch.testing.assert_close(observed.residual, expected, rtol=2e-3, atol=1e-5)
    assert not torch.allclose(observed.residual, observed.l2[:, 0], rtol=0.02)
    judge = calibration.observed
    assert judge.flags(observed.residual).shape == judge.p_values(observed.residual).shape == (2,)


def no_verdict(pipeline, calibration, *words, **changes):
    with observe(pipeline, calibration) as record:
        run(pipeline, **changes)
    assert record.runs[0].residual is None
    for word in words:
        assert word in record.runs[0].residual_reason
    return record.runs[0]


def test_what_does_not_compare_has_a_reason_and_no_residual():
    pipeline = tiny.stable_diffusion()
    calibration = calibration_of(pipeline)
    assert no_verdict(pipeline, None, "without a calibration").measurable
    assert not no_verdict(pipeline, calibration, "guidance was off", guidance_scale=1.0).measurable
    wide = {"height": tiny.RESOLUTION, "width": 2 * tiny.RESOLUTION}
    no_verdict(pipeline, calibration, "16 x 32", "16 x 16", **wide)
    no_verdict(
        pipeline, calibration, "moved away from prompts", "empty prompt", negative_prompt=["a", "a"]
    )
    fewer = no_verdict(pipeline, calibration, "began at noise level", num_inference_steps=30)
    level = PipelineDenoiser(pipeline).schedule.sigma(fewer.timesteps[0])
    assert f"{level:.4g}" in fewer.residual_reason
    again = run_observed(pipeline, calibration)
    assert again.residual is not None


def run_observed(pipeline, calibration, **changes):
    with observe(pipeline, calibration) as record:
        run(pipeline, **changes)
    return record.runs[0]


def test_zeros_are_another_negative_than_the_empty_prompt():
    pipeline = tiny.stable_diffusion_xl()
    calibration = calibration_of(pipeline)
    assert run_observed(pipeline, calibration).residual is not None
    no_verdict(pipeline, calibration, "empty prompt", "for the controls from zeros",
               negative_prompt=["", ""])  # fmt: skip


def test_flux_compares_at_the_guidance_and_the_shape_of_the_controls_alone():
    pipeline = tiny.flux()
    calibration = calibration_of(pipeline, resolution=(64, 32))
    same = TRUE_GUIDANCE | {"height": 64, "width": 32}
    assert run_observed(pipeline, calibration, **same).residual is not None
    no_verdict(pipeline, calibration, "16 x 8", "8 x 16", **same | {"height": 32, "width": 64})
    no_verdict(pipeline, calibration, "guidance_scale` 5.0", **same | {"guidance_scale": 5.0})
    no_verdict(pipeline, calibration, "guides itself", guidance_scale=3.5)


def test_a_calibration_of_other_weights_or_precision_or_of_prompts_alone_is_refused():
    pipeline = tiny.stable_diffusion()
    calibration = calibration_of(pipeline)
    before = trace_of(pipeline)
    with pytest.raises(CalibrationMismatch, match="calibrated abc, now xyz"):
        with observe(pipeline, calibration, model="xyz"):
            pytest.fail("was entered")
    with pytest.raises(CalibrationMismatch, match="parametrization"):
        with observe(tiny.stable_diffusion("v_prediction"), calibration):
            pytest.fail("was entered")
    with pytest.raises(CalibrationError, match="two seeds or more"):
        with observe(pipeline, calibration_of(pipeline, seeds=(5,))):
            pytest.fail("was entered")
    assert trace_of(pipeline) == before
    with observe(pipeline, calibration, model="abc") as record:
        run(pipeline)
    assert record.runs[0].residual is not None
