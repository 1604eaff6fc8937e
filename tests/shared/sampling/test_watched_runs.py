"""Runs that a host reports: scores by noise level, verdicts at one seed, the right run found."""

import math
from dataclasses import replace

import pytest
import torch
from runs_to_watch import SHAPE, add, calibration, calibration_of_images, run
from unmemorize.shared.mitigation.gate import GuardedImage
from unmemorize.shared.sampling.watched_runs import (
    KEPT_RUNS,
    WatchedRun,
    WatchRecord,
    guard_lines,
    headline,
    image_line,
    judge,
    metadata,
    verdict_text,
)
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.clips import ClipNorms
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import Detection


def test_scores_are_norms_over_sigma_image_by_image():
    made = run([3.0, 0.5], levels=4)
    assert made.sigmas == pytest.approx(torch.linspace(14.6, 0.1, 4).tolist())
    torch.testing.assert_close(
        made.traces, torch.tensor([[3.0] * 4, [0.5] * 4], dtype=torch.float64),
        rtol=1e-6, atol=0,
    )  # fmt: skip


def test_the_last_evaluation_of_a_level_counts_and_levels_come_noisiest_first():
    made = WatchedRun()
    for sigma, score in [(14.0, 1.0), (7.0, 2.0), (7.0000001, 3.0), (1.0, 4.0), (0.0, 9.0)]:
        add(made, sigma, [score])
    assert made.sigmas == pytest.approx((14.0, 7.0, 1.0))
    assert made.traces[0].tolist() == pytest.approx([1.0, 3.0, 4.0])


def test_a_verdict_is_that_of_the_controls_at_one_seed():
    made, cal = run([2.9, 3.5]), calibration()
    verdict = judge(made, cal)
    first = sorted(scores[0] for scores in cal.control_scores)
    assert verdict.threshold == first[math.ceil(121 * 0.99) - 1]  # the order statistic at 1 %
    assert verdict.threshold < cal.threshold  # which is for the mean over all seeds
    assert [image.memorized for image in verdict.images] == [False, True]
    at_least = sum(score >= verdict.images[0].score for score in first)
    assert verdict.images[0].p_value == pytest.approx((1 + at_least) / 121)
    assert verdict.images[1].p_value == pytest.approx(1 / 121)
    assert verdict.hits == 1
    assert verdict.caveats == ()


def test_the_calibration_decides_how_many_steps_count():
    made = WatchedRun()
    for sigma, score in [(14.0, 1.0), (7.0, 5.0), (1.0, 9.0)]:
        add(made, sigma, [score])
    assert judge(made).images[0].score == pytest.approx(1.0)
    assert judge(made, steps=2).images[0].score == pytest.approx(3.0)
    verdict = judge(made, calibration(steps=2), steps=1)
    assert verdict.images[0].score == pytest.approx(3.0)
    assert verdict.images[0].per_element == pytest.approx(3.0 / math.sqrt(math.prod(SHAPE)))


def test_what_does_not_fit_is_told_and_there_is_no_verdict():
    cal = calibration(steps=3)
    assert judge(run([1.0]), calibration()).caveats == ()
    short = judge(run([9.0], levels=2, from_noise=False), cal)
    assert [c.split()[0] for c in short.caveats] == ["Sampling", "The"]
    assert judge(run([1.0]), calibration(), model="m").caveats == ()
    assert "weights are others" in judge(run([1.0]), cal, model="n").caveats[0]
    other = run([9.0])
    other.latent_shape = (4, 16, 16)
    verdict = judge(other, cal)
    assert "4 x 16 x 16" in verdict.caveats[0]
    assert "No verdict, because" in verdict_text(verdict, cal, 0)
    assert "Memorization Check judges the prompt" in verdict_text(verdict, cal, 0)


def test_steps_after_the_first_are_judged_at_the_levels_of_the_controls_alone():
    made, cal = run([9.0]), calibration(steps=3)
    cal.settings["sigmas"] = list(made.sigmas[:3])
    assert judge(made, cal).hits == 1
    cal.settings["sigmas"][2] *= 1.2
    assert judge(made, cal).hits == 0


def test_a_run_that_fits_is_judged_by_what_its_first_prediction_adds_beyond_the_controls():
    made, cal = run([2.0, 9.0]), calibration_of_images()
    verdict = judge(made, cal, model="m")
    assert (verdict.measure, verdict.reason, verdict.caveats) == ("residual", "", ())
    difference = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).flatten(1)
    difference *= torch.tensor([[2.0], [9.0]]) / difference.norm(dim=1, keepdim=True)
    expected = cal.observed.basis.residual(difference, [0, 0])
    assert [image.score for image in verdict.images] == pytest.approx(expected.tolist(), rel=1e-5)
    assert [image.magnitude for image in verdict.images] == pytest.approx([2.0, 9.0])
    assert [image.memorized for image in verdict.images] == [False, True]
    assert verdict.images[1].p_value == pytest.approx(1 / 121)
    assert verdict.threshold == cal.observed.threshold
    made.end()  # as after sampling
    assert judge(made, cal, model="m") == verdict
    text = verdict_text(verdict, cal, 0)
    assert "Score: residual" in text
    assert "magnitude 9  ·  p = 0.0083  ·  looks memorized" in text
    assert metadata(verdict)["measure"] == "residual"
    assert metadata(verdict)["magnitude"] == pytest.approx([2.0, 9.0])


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({}, "n", "weights are others"),
        ({"from_noise": False}, "m", "did not begin at pure noise"),
        ({"begins": 20.0}, "m", "first step, at noise level 20, was not measured"),
        ({"unlike": "a prompt has area"}, "m", "texts alone, and here a prompt has area"),
        ({"negative": "another"}, "m", "negative prompt is another one"),
        ({"levels": 1, "first": 11.0}, "m", "noise level 11, the controls were measured at 14.6"),
        ({"size": (4, 8, 16)}, "m", "latents are 4 x 8 x 16, those of the controls 4 x 8 x 8"),
    ],
)
def test_a_run_that_does_not_fit_has_no_verdict_and_says_why(changes, model, words):
    made, cal = run([9.0]), calibration_of_images()
    assert judge(made, cal, model="m").measure == "residual"
    changes = dict(changes)
    if first := changes.pop("first", None):
        made = WatchedRun()
        add(made, first, [9.0])
    levels, size = changes.pop("levels", 5), changes.pop("size", SHAPE)
    made.latent_shape = size
    for name, value in changes.items():
        setattr(made, name, value)
    verdict = judge(made, cal, model=model)
    assert verdict.measure == "magnitude"
    (reason,) = verdict.caveats
    assert words in reason[0].lower() + reason[1:]
    assert verdict.images[0].score == verdict.images[0].magnitude == pytest.approx(9.0)
    assert (verdict.threshold, verdict.hits) == (None, 0)
    assert (verdict.images[0].p_value, verdict.images[0].memorized) == (None, None)
    assert headline(verdict) == "No verdict: scores only"
    assert reason in verdict_text(verdict, cal, 0)
    assert len(made.sigmas) == levels


@pytest.mark.parametrize(
    ("share", "fits"), [(0.97, False), (0.985, True), (1.0, True), (1.114, True), (1.13, False)]
)
def test_samplers_may_begin_a_little_above_the_level_of_the_controls(share, fits):
    """1.114 is the end of Stable Diffusion's schedule over the first of 50 DDIM steps."""
    made = WatchedRun()
    add(made, share * 14.6, [9.0])
    assert (judge(made, calibration_of_images()).measure == "residual") == fits


def test_a_calibration_without_residuals_of_images_says_what_makes_them():
    verdict = judge(run([9.0]), calibration())
    assert "two seeds or more and one step" in verdict.reason
    assert judge(run([9.0])).reason == ""  # without any, there is nothing to say


def test_a_calibration_of_prompts_alone_judges_no_image():
    """Its scores are 1 where ordinary, and magnitudes are not: any image would be flagged."""
    images = calibration_of_images()
    prompts = replace(images.observed, residual=None, observed=None, settings=images.settings)
    verdict = judge(run([9.0]), prompts)
    assert verdict.hits == 0
    assert "judges prompts and no sampled images" in verdict.caveats[0]


def test_the_run_of_a_latent_is_found_and_old_runs_are_let_go():
    record = WatchRecord()
    assert record.find("a") is None
    record.start(run([1.0], latent_id="a"))
    assert record.find("of an unwatched sampler") is None  # though there is no other run
    again = run([2.0], latent_id="a")
    record.start(again)
    record.start(run([3.0], latent_id="b"))
    assert record.find("a") is again
    for number in range(2 * KEPT_RUNS):
        record.start(run([1.0], latent_id=str(number)))
    assert len(record.runs) == KEPT_RUNS
    assert record.find("a") is None


def test_wording_follows_the_numbers():
    cal = calibration()
    one, none, some = (judge(run(s), cal) for s in ([9.0], [1.0, 1.5], [9.0, 1.0]))
    assert headline(one) == "Looks memorized"
    assert headline(none) == "None of 2 images looks memorized"
    assert headline(some) == "1 of 2 images looks memorized"
    assert headline(judge(run([9.0]))) == "Scores only: no calibration"
    assert image_line(some, 0) == "image 1  ·  score 9  ·  p = 0.0083  ·  looks memorized"
    assert "120 controls (made up)" in verdict_text(some, cal, 0)
    assert "7 additional passes" in verdict_text(judge(run([9.0])), None, 7)
    assert metadata(some)["memorized"] == [True, False]


def test_what_a_guard_decided_is_told_image_by_image():
    shut = GuardedImage(prompt=None, fired=False, threshold=2.0, score_before=1.25)
    acted = GuardedImage(
        prompt=None, fired=True, threshold=None, score_before=None, noise_before=9.0,
        noise_after=1.5, method="initial_noise",
    )  # fmt: skip
    assert guard_lines([shut, acted]) == [
        "image 1  ·  guard did not act  ·  prompt scores 1.25, threshold 2",
        "image 2  ·  guard acted by initial_noise  ·  initial noise 9 to 1.5",
    ]
    assert guard_lines(run([1.0]).guarded) == []


CLIP = (4, 3, 8, 8)


def moving(content: float, motion: float) -> WatchedRun:
    """Return a run of one clip whose D has these parts at both of its levels."""
    made, generator = WatchedRun(), torch.Generator().manual_seed(0)
    noise = torch.randn(1, *CLIP, generator=generator, dtype=torch.float64)
    shared = noise.mean(2, keepdim=True).expand_as(noise)
    rest = noise - shared
    d = content * shared / shared.norm() + motion * rest / rest.norm()
    for sigma in (14.6, 3.0):
        made.add(torch.zeros_like(d), sigma * d, torch.full((1,), sigma))
    made.end()
    return made


def of_clips() -> Calibration:
    """Return a calibration whose controls have content of 1 to 3 and half as much motion."""
    spread = torch.linspace(1, 3, 120, dtype=torch.float64)[:, None, None].expand(-1, 2, 1)
    frames = (spread * math.sqrt(1.25 / 3))[..., None].expand(-1, -1, -1, 3)
    detection = Detection(
        prompts=tuple(map(str, range(120))), traces=spread * math.sqrt(1.25), latent_elements=768,
        config=DetectionConfig(seeds=(0, 1)), clips=ClipNorms(frames, spread, spread / 2),
    )  # fmt: skip
    settings = {"steps": 1, "latent_shape": list(CLIP), "sigmas": [14.6]}
    return Calibration.from_controls(detection, model="m", settings=settings, name="made up")


def test_content_and_motion_of_a_clip_stand_beside_its_score():
    made = moving(3.0, 4.0)
    assert made.traces[0].tolist() == pytest.approx([5.0, 5.0])
    assert made.clips.content[0].tolist() == pytest.approx([3.0, 3.0])
    assert made.clips.motion[0].tolist() == pytest.approx([4.0, 4.0])
    verdict = judge(made)
    assert [part.memorized for part in verdict.images[0].parts] == [None, None]
    assert "content 3  ·  motion 4" in image_line(verdict, 0)
    assert "No verdict on content and motion" in verdict_text(verdict, None, 0)
    assert metadata(verdict)["clips"][0]["motion"]["score"] == pytest.approx(4.0)
    still = run([1.0])
    assert still.clips is None
    assert judge(still).images[0].parts == ()
    assert metadata(judge(still))["clips"] == []


@pytest.mark.parametrize(
    ("content", "motion", "looks"),
    [(2.0, 1.0, (False, False)), (3.5, 1.0, (True, False)), (2.0, 1.7, (False, True))],
)
def test_each_part_is_judged_by_the_same_part_of_the_controls(content, motion, looks):
    verdict = judge(moving(content, motion), of_clips(), model="m")
    assert verdict.caveats == ()
    parts = verdict.images[0].parts
    assert tuple(part.memorized for part in parts) == looks
    assert verdict.hits == any(looks)
    assert parts[1].p_value == pytest.approx((1 / 121) if looks[1] else (1 + 60) / 121, abs=0.01)


def test_parts_are_not_judged_where_the_calibration_does_not_fit():
    other = moving(3.5, 1.7)
    other.from_noise = False
    verdict = judge(other, of_clips(), model="m")
    assert verdict.caveats
    assert [part.memorized for part in verdict.images[0].parts] == [None, None]
