"""The second stage: what collapses, and how often two stages together flag ordinary prompts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import ToyDenoiser, prompts
from unmemorize.shared.score import collapse as stage
from unmemorize.shared.score.calibration import Calibration, CalibrationError
from unmemorize.shared.score.collapse import CONTROLS, SHARE, collapse_of, collapses
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import Detection
from unmemorize.shared.score.rates import NotEnoughControls
from unmemorize.shared.score.trajectory import PredictionError


def latents(seed=0, *shape):
    return torch.randn(*(shape or (3, 4, 8, 8)), generator=torch.Generator().manual_seed(seed))


def test_it_is_the_variance_of_the_mean_over_that_between_seeds():
    rows = latents().double().numpy()
    _, channels, height, width = rows.shape
    within = [np.var([rows[:, c, y, x].mean() for y in range(height) for x in range(width)], ddof=1)
              for c in range(channels)]  # fmt: skip
    between = [np.var(rows[:, c, y, x], ddof=1)
               for c in range(channels) for y in range(height) for x in range(width)]  # fmt: skip
    expected = np.mean(within) / np.mean(between)
    assert collapse_of(torch.from_numpy(rows)) == pytest.approx(expected, rel=1e-12)


def test_neither_contrast_nor_colour_moves_it():
    rows = latents().double()
    moved = 7 * rows + torch.tensor([3.0, -2.0, 0.0, 9.0]).double()[:, None, None]
    assert collapse_of(moved) == pytest.approx(collapse_of(rows), rel=1e-9)
    assert collapse_of(latents(1, 3, 4, 5, 8, 8)) > 0  # frames


class Remembering(ToyDenoiser):
    """Draws one image for "memorized" and for no text, whatever it starts from."""

    def encode(self, texts):
        cond = super().encode(texts)
        told = torch.tensor([text in ("memorized", "") for text in texts])
        return dataclasses.replace(cond, pooled=told[:, None].to(self.dtype))

    def denoise(self, x, sigma, cond):
        image = latents(5, *self.latent_shape).to(x)
        told = cond.pooled[:, :, None, None]
        return told * image + (1 - told) * super().denoise(x, sigma, cond)


def test_seeds_of_a_memorized_prompt_collapse_and_others_do_not():
    toy = Remembering()
    others = [prompt for prompt in prompts(12) if prompt]
    found = collapses(toy, [*others, "memorized"])
    assert found[-1] > 10 * max(found[:-1])
    alone = [collapses(toy, [prompt])[0] for prompt in others]
    assert found[:-1] == pytest.approx(alone, rel=1e-3)


def test_it_costs_two_passes_a_step_and_a_network_that_guides_itself_one():
    toy = ToyDenoiser()
    collapses(toy, ["a prompt", "another"])
    assert toy.rows == [2 * len(stage.SEEDS)] * 2 * stage.STEPS
    toy.rows, toy.guidance_distilled = [], True
    collapses(toy, ["a prompt"])
    assert toy.rows == [len(stage.SEEDS)] * stage.STEPS


def test_a_latent_that_is_not_finite_names_its_prompt():
    class Broken(ToyDenoiser):
        def denoise(self, x, sigma, cond):
            return torch.cat([super().denoise(x, sigma, cond)[:-1], x[-1:] / 0])

    with pytest.raises(PredictionError, match="a broken prompt"):
        collapses(Broken(), ["a prompt", "a broken prompt"])


def world(number, seed):
    """Scores [prompt] and collapses of ordinary prompts, related to each other."""
    rng = np.random.default_rng(seed)
    scores = rng.lognormal(size=number)
    return scores.tolist(), (scores**0.5 * rng.lognormal(size=number)).tolist()


def calibrated(controls, rate):
    """A calibration of scores and of the collapses of suspicious controls."""
    scores, collapses = controls
    found = Detection(
        prompts=tuple(map(str, range(len(scores)))),
        traces=torch.tensor(scores, dtype=torch.float64)[:, None, None],
        latent_elements=1, config=DetectionConfig(seeds=(0,)),
    )  # fmt: skip
    made = Calibration.from_controls(
        found, model="m", settings={}, name="c", false_positive_rate=rate
    )
    return made.with_second({i: collapses[i] for i in made.suspicious(scores)})


def sampled(made, world):
    """Collapses as a run has them: NaN where a prompt is not suspicious."""
    scores, collapses = world
    chosen = set(made.suspicious(scores))
    return [c if i in chosen else np.nan for i, c in enumerate(collapses)]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.09])
def test_flags_are_the_p_values_up_to_the_rate_and_p_values_are_counts(rate):
    controls, more = world(200, 1), world(60, 2)
    made = calibrated(controls, rate)
    of_controls, of_more = (sampled(made, each) for each in (controls, more))

    def scale(values):
        median = sorted(values)[(len(values) - 1) // 2]
        return median, sorted(abs(v - median) for v in values)[(len(values) - 1) // 2]

    score_scale = scale([math.log(s) for s in controls[0]])
    collapse_scale = scale([math.log(c) for c in of_controls if not math.isnan(c)])

    def rank(score, value):  # sampled ones above all others
        if math.isnan(value):
            return (0, score)
        return (1, (math.log(score) - score_scale[0]) / score_scale[1]
                + (math.log(value) - collapse_scale[0]) / collapse_scale[1])  # fmt: skip

    known = [rank(*c) for c in zip(controls[0], of_controls, strict=True)]
    slow = [(1 + sum(c >= rank(*p) for c in known)) / 201
            for p in zip(more[0], of_more, strict=True)]  # fmt: skip
    assert made.p_values(more[0], of_more).tolist() == pytest.approx(slow)
    flags = made.flags(more[0], of_more).tolist()
    assert flags == [p <= rate for p in slow]
    assert not any(f for f, value in zip(flags, of_more, strict=True) if math.isnan(value))


def test_both_stages_together_flag_ordinary_prompts_at_the_rate():
    hits = alone = 0
    for seed in range(300):
        made, more = calibrated(world(99, seed), 0.05), world(40, 10_000 + seed)
        hits += int(made.flags(more[0], sampled(made, more)).sum())
        # Negative control: prompts that are suspicious are flagged far more often than others.
        chosen = made.suspicious(more[0])
        everything = made.flags([more[0][i] for i in chosen], [more[1][i] for i in chosen])
        alone += everything.double().mean().item() if chosen else 0.0
    assert hits / 12_000 == pytest.approx(0.05, abs=0.01)
    assert alone / 300 > 0.2


def test_a_share_of_controls_is_sampled_and_more_cannot_be_flagged():
    made = calibrated(world(399, 3), 0.01)
    assert len(made.second.control_evidence) == 399 - math.ceil(400 * (1 - SHARE))
    with pytest.raises(ValueError, match="got a rate of 20"):
        calibrated(world(99, 3), 0.2)
    assert len(calibrated(world(CONTROLS, 3), 0.05).second.control_evidence) == 3
    with pytest.raises(NotEnoughControls, match="at least 39 controls, found 38"):
        calibrated(world(CONTROLS - 1, 3), 0.05)


@pytest.mark.parametrize("weak", ["score", "collapse"])
def test_either_measure_is_enough_where_the_other_is_weak(weak):
    """A memorized prompt, far out in one measure and among the suspicious ordinary in the other."""
    controls = world(200, 6)
    made = calibrated(controls, 0.01)
    ordinary = [c for c in sampled(made, controls) if not math.isnan(c)]
    score, far = 1.05 * made.suspicion, 1e4
    pair = (score, far) if weak == "score" else (far, sorted(ordinary)[len(ordinary) // 2])
    assert made.flags([pair[0]], [pair[1]]).tolist() == [True]
    assert made.flags([score], [sorted(ordinary)[len(ordinary) // 2]]).tolist() == [False]


def test_it_is_kept_in_the_file(tmp_path):
    made = calibrated(world(120, 4), 0.02)
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == made
    with pytest.raises(CalibrationError, match="calibrate --collapse"):
        dataclasses.replace(made, second=None).flags([1.0], [2.0])


def test_equal_images_are_no_infinity():
    assert math.isfinite(collapse_of(torch.ones(3, 4, 8, 8) * latents(2, 1, 4, 8, 8)))
