"""The guard acts on the images that fired, and on nothing else."""

from dataclasses import replace

import pytest
import tiny
import torch
from guards import (
    OTHERS,
    PROMPTS,
    REWORDED,
    STEPS,
    Calls,
    Scripted,
    calibrated,
    calibrated_at,
    network_of,
    parted,
    rewording,
    run,
    scale_of,
    unguided,
)
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.sampling.guard import guard
from unmemorize.shared.sampling.observer import observe
from unmemorize.shared.score.calibration import CalibrationMismatch
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(params=tiny.PIPELINES, scope="module")
def pipeline(request):
    return tiny.PIPELINES[request.param]()


@pytest.fixture(scope="module")
def sd1():
    return tiny.stable_diffusion()


def test_a_shut_gate_changes_no_bit_and_costs_a_row_per_prompt_and_seed(pipeline):
    calls = Calls(network_of(pipeline))
    plain, without = run(pipeline), calls.taken()
    method, calibration = unguided(), calibrated(pipeline, False)
    calls.taken()
    with guard(pipeline, method=method, calibration=calibration) as record:
        first, probed = run(pipeline), calls.taken()
        second, again = run(pipeline), calls.taken()
    assert torch.equal(plain, first)
    assert torch.equal(plain, second)
    # The empty prompt once, then both prompts, at both seeds.
    assert sorted(probed) == sorted([2, 4, *without])
    assert again == without
    assert method.starts == []
    expected = detect(
        PipelineDenoiser(pipeline),
        PROMPTS,
        DetectionConfig(seeds=tuple(calibration.settings["seeds"])),
    )
    for guarded in record.runs:
        assert [image.prompt for image in guarded.images] == PROMPTS
        assert [image.fired for image in guarded.images] == [False, False]
        assert [image.method for image in guarded.images] == [None, None]
        assert {image.threshold for image in guarded.images} == {calibration.threshold}
        scores = torch.tensor([image.score_before for image in guarded.images])
        torch.testing.assert_close(scores.double(), expected.scores, rtol=1e-4, atol=1e-6)


def test_never_does_nothing_and_always_acts_without_a_calibration(pipeline):
    calls = Calls(network_of(pipeline))
    plain, without = run(pipeline), calls.taken()
    with guard(pipeline, method=unguided(), gate="never") as record:
        assert torch.equal(plain, run(pipeline))
    assert calls.taken() == without
    assert not any(image.fired for image in record.runs[0].images)
    method = Scripted(guide=lambda step: None)
    with guard(pipeline, method=method, gate="always") as record:
        assert torch.equal(plain, run(pipeline))  # by construction: the method leaves all alone
    assert len(method.steps) == STEPS
    image = record.runs[0].images[1]
    assert (image.fired, image.score_before, image.threshold, image.method) == (
        True, None, None, "scripted",
    )  # fmt: skip


def test_other_embeddings_give_the_images_of_the_other_prompts(pipeline):
    expected, plain = run(pipeline, OTHERS), run(pipeline)
    calibration = calibrated(pipeline, True)
    with guard(pipeline, method=rewording(), calibration=calibration) as record:
        assert torch.equal(run(pipeline), expected)
    assert not torch.equal(plain, expected)
    config = DetectionConfig(seeds=tuple(calibration.settings["seeds"]))
    scores = detect(PipelineDenoiser(pipeline), PROMPTS + OTHERS, config).scores
    images = record.runs[0].images
    found = [i.score_before for i in images] + [i.score_after for i in images]
    torch.testing.assert_close(torch.tensor(found).double(), scores, rtol=1e-4, atol=1e-6)
    assert images[0].noise_before is None
    assert [image.change for image in images] == [f"now {prompt}" for prompt in OTHERS]
    torch.testing.assert_close(run(pipeline), plain, rtol=0, atol=0)


def test_guidance_of_the_method_replaces_that_of_the_pipeline(pipeline):
    off = {scale_of(pipeline): 1.0}
    expected = run(pipeline, **off)
    with guard(pipeline, method=unguided(), gate="always"):
        found = run(pipeline)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - run(pipeline)).abs().max() > 1e-3
    plain, weaker = run(pipeline), run(pipeline, **{scale_of(pipeline): 2.0})
    for scale, expected in ((None, plain), (2.0, weaker)):
        method = Scripted(guide=lambda step, scale=scale: step.guided(scale))
        with guard(pipeline, method=method, gate="always"):
            torch.testing.assert_close(run(pipeline), expected, rtol=1e-3, atol=1e-5)
    assert (plain - weaker).abs().max() > 1e-3


@pytest.mark.parametrize("fires", [[True, False], [False, True]])
def test_an_image_does_not_change_with_what_is_done_to_its_neighbour(pipeline, fires):
    prompts, calibration = parted(pipeline, fires)
    plain = run(pipeline, prompts)
    acted, spared = fires.index(True), fires.index(False)
    for method in (rewording(), unguided()):
        with guard(pipeline, method=method, calibration=calibration) as record:
            found = run(pipeline, prompts)
        assert [image.fired for image in record.runs[0].images] == fires
        assert torch.equal(found[spared], plain[spared])
        assert (found[acted] - plain[acted]).abs().max() > 1e-3
        assert method.starts[0].prompts == (prompts[acted],)
    changed = [REWORDED[p] if fire else p for p, fire in zip(prompts, fires, strict=True)]
    expected = run(pipeline, changed)
    with guard(pipeline, method=rewording(), calibration=calibration):
        torch.testing.assert_close(run(pipeline, prompts), expected, rtol=1e-3, atol=1e-4)


def test_several_images_per_prompt_are_probed_once(pipeline):
    prompts, calibration = parted(pipeline, [False, True])
    kwargs = {"seeds": range(4), "num_images_per_prompt": 2}
    calls = Calls(network_of(pipeline))
    plain, without = run(pipeline, prompts, **kwargs), calls.taken()
    with guard(pipeline, method=unguided(), calibration=calibration) as record:
        found = run(pipeline, prompts, **kwargs)
    # Two seeds of the empty prompt and of two prompts, and two images for Start.x0_uncond.
    assert sorted(calls.taken()) == sorted([2, 4, 2, *without])
    assert torch.equal(found[:2], plain[:2])
    assert ((found[2:] - plain[2:]).flatten(1).abs().amax(1) > 1e-3).all()
    assert [image.prompt for image in record.runs[0].images] == [
        prompts[0], prompts[0], prompts[1], prompts[1],
    ]  # fmt: skip
    assert [image.fired for image in record.runs[0].images] == [False, False, True, True]


def test_a_calibration_of_another_size_is_probed_at_that_size(pipeline):
    wide = PipelineDenoiser(pipeline, resolution=(64, 96))
    config = DetectionConfig(seeds=(0,))
    scores = detect(wide, PROMPTS, config).scores
    calibration = calibrated_at(wide, config, [scores.max().item() * 2])
    plain = run(pipeline)
    with guard(pipeline, method=unguided(), calibration=calibration) as record:
        assert torch.equal(run(pipeline), plain)
    found = torch.tensor([image.score_before for image in record.runs[0].images])
    torch.testing.assert_close(found.double(), scores, rtol=1e-4, atol=1e-6)


def test_a_calibration_of_something_else_is_refused_or_its_caveat_kept(sd1):
    prompts, calibration = parted(sd1, [False, True])
    with pytest.raises(CalibrationMismatch, match="calibrated abc, now def"):
        guard(sd1, method=unguided(), calibration=calibration, model="def").__enter__()
    with guard(sd1, method=unguided(), calibration=calibration, model="abc") as record:
        assert record.caveat == ""
    other = replace(calibration, settings={**calibration.settings, "dtype": "float16"})
    with pytest.raises(CalibrationMismatch, match="dtype: calibrated float16, now float32"):
        guard(sd1, method=unguided(), calibration=other).__enter__()
    with guard(sd1, method=unguided(), calibration=other, force=True) as record:
        run(sd1, prompts)
    assert "dtype: calibrated float16" in record.caveat
    assert [image.fired for image in record.runs[0].images] == [False, True]
    with pytest.raises(ValueError, match="unmemorize calibrate"):
        guard(sd1, method=unguided()).__enter__()


def test_an_observer_around_and_inside_a_guard(sd1):
    prompts, calibration = parted(sd1, [False, True])
    with observe(sd1) as plain:
        run(sd1, prompts)
    with (
        observe(sd1) as around,
        guard(sd1, method=unguided(), calibration=calibration),
        observe(sd1) as inside,
    ):
        run(sd1, prompts)
    assert len(around.runs) == len(inside.runs) == 1  # probes are no runs and no steps
    for record in (around, inside):
        assert record.runs[0].l2.shape == (2, STEPS)
        assert torch.equal(record.runs[0].l2[0], plain.runs[0].l2[0])
    assert (around.runs[0].l2[1] > 0).all()
    assert (inside.runs[0].l2[1] == 0).all()  # both rows say what the method says
