"""The gate decides as detection would, once per prompt, at all seeds of the calibration."""

from dataclasses import replace

import pytest
import torch
import toy
from unmemorize.shared.mitigation.gate import AppliedGate, Decision, Gate
from unmemorize.shared.score.calibration import Calibration, CalibrationMismatch, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import told_steps
from unmemorize.shared.score.denoiser import concatenate
from unmemorize.shared.score.detection import control_differences, detect
from unmemorize.shared.score.trajectory import PredictionError

SEEDS = (3, 5, 8)
CONTROLS = [f"a {a} {b}" for a in ("red", "old") for b in ("cat", "dog", "boat", "river", "snow")]
PROMPTS = ["lighthouse under snow", "umbrella", "strawberry near a boat", "old mountain"]


@pytest.fixture(scope="module")
def denoiser():
    return toy.ToyDenoiser()


def calibrate(denoiser, rate=0.3, **settings):
    config = DetectionConfig(seeds=SEEDS, **settings)
    return Calibration.from_controls(
        detect(denoiser, CONTROLS, config),
        model="abc",
        settings=settings_of(denoiser, config),
        name="toy",
        false_positive_rate=rate,
    )


@pytest.fixture(scope="module")
def calibration(denoiser):
    return calibrate(denoiser)


@pytest.mark.parametrize("steps", [1, 2])
def test_decisions_are_those_of_detection(denoiser, steps):
    calibration = calibrate(denoiser, steps=steps, cond_scale=4.0)
    applied = AppliedGate(Gate(calibration=calibration), denoiser)
    decisions = applied.decide(denoiser.encode(CONTROLS + PROMPTS))
    config = DetectionConfig(seeds=SEEDS, steps=steps, cond_scale=4.0)
    scores = detect(denoiser, CONTROLS + PROMPTS, config).scores
    found = torch.tensor([decision.score for decision in decisions], dtype=torch.float64)
    torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-7)
    threshold = sorted(scores[: len(CONTROLS)].tolist())[7]  # ceil(11 * .7) = 8th of ten
    assert applied.gate.threshold == pytest.approx(threshold)
    assert [decision.fired for decision in decisions] == (found > applied.gate.threshold).tolist()
    # The control at the threshold may fall on either side: other batches, other last digits.
    assert sum(decision.fired for decision in decisions[: len(CONTROLS)]) in (2, 3)
    assert [decision.fired for decision in decisions] == calibration.flags(found).tolist()


def test_the_gate_opens_for_what_the_residual_verdict_flags_and_for_nothing_else(denoiser):
    told, config = told_steps(len(SEEDS), 50), DetectionConfig(seeds=SEEDS)
    differences = control_differences(denoiser, CONTROLS, config, told)
    calibration = calibrate(denoiser).with_residual(
        differences, settings_of(denoiser, config, told)
    )
    prompts = CONTROLS + PROMPTS
    verdict = detect(denoiser, prompts, config, basis=calibration.judge.basis)
    flags = calibration.judge.flags(verdict.scores).tolist()
    assert {True, False} == set(flags)  # the case is not trivial
    decisions = AppliedGate(Gate(calibration=calibration), denoiser).decide(
        denoiser.encode(prompts)
    )
    assert [decision.fired for decision in decisions] == flags
    found = torch.tensor([decision.score for decision in decisions], dtype=torch.float64)
    torch.testing.assert_close(found, verdict.scores, rtol=1e-4, atol=1e-6)


def test_the_threshold_of_the_controls_fires_only_above_itself(denoiser, calibration):
    gate = Gate(calibration=calibration)
    means = calibration.seed_scores.mean(1)
    at = means.tolist().index(gate.threshold)
    applied = AppliedGate(gate, denoiser)
    cond = denoiser.encode(CONTROLS)
    applied.scores(cond)
    applied._scores = {key: means[i].item() for i, key in enumerate(applied._scores)}
    fired = [decision.fired for decision in applied.decide(cond)]
    assert not fired[at]
    assert sum(fired) == 2


def test_nothing_is_computed_twice(denoiser, calibration):
    applied, seeds = AppliedGate(Gate(calibration=calibration), denoiser), len(SEEDS)
    cond = denoiser.encode(PROMPTS)
    denoiser.rows.clear()
    denoiser.encoded.clear()
    applied.decide(cond[[0, 1, 0, 0, 1]])
    assert denoiser.rows == [seeds, 2 * seeds]  # the empty prompt, then two prompts
    assert denoiser.encoded == [1]
    denoiser.rows.clear()
    first = applied.decide(cond[[0]])
    again = applied.decide(concatenate([cond[[1]], cond[[0]]]))
    assert denoiser.rows == []
    assert again[1] == first[0]
    applied.decide(cond)
    assert denoiser.rows == [2 * seeds]  # only what is new
    assert denoiser.encoded == [1]


def test_what_counts_is_the_whole_row(denoiser, calibration):
    """One changed number, another dtype, another pooled text: another prompt."""
    cond = denoiser.encode(PROMPTS[:1])
    applied = AppliedGate(Gate(calibration=calibration), denoiser)
    scores = applied.scores(cond)
    denoiser.rows.clear()
    changed = cond.embeddings.clone()
    changed[0, -1, -1] += 1e-3
    other = applied.scores(replace(cond, embeddings=changed))
    assert denoiser.rows == [len(SEEDS)]
    assert other != scores
    for pooled in (torch.zeros(1, 3), torch.ones(1, 3)):
        applied.scores(replace(cond, pooled=pooled))
    assert denoiser.rows == [len(SEEDS)] * 3


def test_always_and_never(denoiser, calibration):
    cond = denoiser.encode(PROMPTS)
    denoiser.rows.clear()
    for mode in ("always", "never"):
        fired = mode == "always"
        decisions = AppliedGate(Gate(mode=mode), denoiser).decide(cond)
        assert decisions == (Decision(fired=fired, score=None),) * len(PROMPTS)
        assert AppliedGate(Gate(mode=mode), denoiser).scores(cond) is None
    assert denoiser.rows == []
    expected = AppliedGate(Gate(calibration=calibration), denoiser).decide(cond)
    assert {decision.fired for decision in expected} == {True, False}  # the case is not trivial
    for mode in ("always", "never"):
        decisions = AppliedGate(Gate(mode=mode, calibration=calibration), denoiser).decide(cond)
        assert {decision.fired for decision in decisions} == {mode == "always"}
        assert [d.score for d in decisions] == [d.score for d in expected]  # recorded all the same


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="unmemorize calibrate"):
        Gate()
    with pytest.raises(ValueError, match="one of calibrated, always, never, got 'sometimes'"):
        Gate(mode="sometimes")


def test_the_calibration_must_fit(denoiser, calibration):
    gate = Gate(calibration=calibration)
    assert gate.check(denoiser) == ""
    assert gate.check(denoiser, model="abc") == ""
    with pytest.raises(CalibrationMismatch, match="model: calibrated abc, now def"):
        gate.check(denoiser, model="def")
    other = Gate(calibration=replace(calibration, settings={**calibration.settings, "dtype": "x"}))
    with pytest.raises(CalibrationMismatch, match="dtype: calibrated x, now float32"):
        other.check(denoiser)
    assert "dtype: calibrated x" in other.check(denoiser, force=True)
    assert Gate(mode="always").check(denoiser, model="def") == ""


def test_a_prediction_that_is_not_finite_names_the_prompt(denoiser, calibration):
    cond = denoiser.encode(PROMPTS)
    broken = cond.embeddings.clone()
    broken[1] = torch.nan
    applied = AppliedGate(Gate(calibration=calibration), denoiser)
    with pytest.raises(PredictionError, match="umbrella"):
        applied.decide(replace(cond, embeddings=broken), PROMPTS)
    with pytest.raises(PredictionError, match="given as embeddings"):
        applied.decide(replace(cond, embeddings=broken))


def test_half_precision_embeddings_have_content(calibration):
    denoiser = toy.ToyDenoiser(torch.bfloat16)
    cond = denoiser.encode(PROMPTS[:2])
    applied = AppliedGate(Gate(calibration=calibration), denoiser)
    one, two = applied.scores(cond)
    denoiser.rows.clear()
    assert applied.scores(cond[[1, 0]]) == (two, one)
    assert denoiser.rows == []


def test_gradients_are_neither_needed_nor_left(denoiser, calibration):
    cond = denoiser.encode(PROMPTS[:1])
    leaf = cond.embeddings.clone().requires_grad_()
    applied = AppliedGate(Gate(calibration=calibration), denoiser)
    assert applied.scores(replace(cond, embeddings=leaf)) == applied.scores(cond)
    assert leaf.grad is None
