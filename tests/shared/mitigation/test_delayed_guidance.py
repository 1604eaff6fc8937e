"""When guidance starts, image by image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import start_of, step_of, wide_toy
from unmemorize.shared.mitigation.delayed_guidance import Delay, DelayedGuidance


def first_minimum(magnitudes: list[float], percents: list[float], start_percent: float) -> int:
    """Return the step whose |D| is the first to rise after a fall, or the latest allowed."""
    for step, percent in enumerate(percents):
        if percent >= start_percent:
            return step
        if step >= 2 and magnitudes[step - 2] > magnitudes[step - 1] < magnitudes[step]:
            return step
    return len(percents)


def follow(method: DelayedGuidance, magnitudes: torch.Tensor, percents: list[float]) -> list:
    """Return what the method predicts at each step of one run, and the steps."""
    run, steps = Delay(method), []
    for index, (percent, magnitude) in enumerate(zip(percents, magnitudes, strict=True)):
        step = step_of(index, percent, images=len(magnitude), seed=index, magnitude=magnitude)
        steps.append((run.guide(step), step))
    return steps


@settings(max_examples=40, deadline=None)
@given(
    magnitudes=st.lists(
        st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=8
    ),
    start_percent=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
)
def test_dynamic_guidance_starts_at_each_images_own_minimum(magnitudes, start_percent):
    trace = torch.tensor(magnitudes, dtype=torch.float64)
    percents = [step / len(trace) for step in range(len(trace))]
    method = DelayedGuidance(start_percent=start_percent)
    starts = [
        first_minimum(trace[:, image].tolist(), percents, start_percent) for image in range(3)
    ]
    for index, (found, step) in enumerate(follow(method, trace, percents)):
        if all(index >= start for start in starts):
            assert found is None
            continue
        for image, start in enumerate(starts):
            expected = step.guided()[image] if index >= start else step.uncond[image]
            assert torch.equal(found[image], expected)


def test_a_minimum_is_found_by_hand():
    trace = torch.tensor([[5.0, 5.0], [4.0, 5.0], [3.0, 4.0], [3.5, 3.0], [3.0, 2.0]])
    found = [prediction for prediction, _ in follow(DelayedGuidance(), trace, [0.0] * 5)]
    assert found[2] is not None
    step = step_of(3, images=2, seed=3)
    assert torch.equal(found[3][0], step.guided()[0])
    assert torch.equal(found[3][1], step.uncond[1])


def test_an_image_does_not_depend_on_those_beside_it():
    trace = torch.tensor([[5.0, 1.0], [4.0, 2.0], [4.5, 3.0], [4.0, 2.0]])
    together = follow(DelayedGuidance(), trace, [0.0] * 4)
    for image in range(2):
        run = Delay(DelayedGuidance())
        for index, (prediction, step) in enumerate(together):
            alone = step_of(
                index, images=1, x=step.x[[image]], cond=step.cond[[image]],
                uncond=step.uncond[[image]], magnitude=trace[index, [image]],
            )  # fmt: skip
            found = run.guide(alone)
            expected = step.guided() if prediction is None else prediction
            assert torch.equal(alone.guided() if found is None else found, expected[[image]])


def test_static_guidance_starts_at_a_share_of_the_schedule():
    rising = torch.tensor([[3.0], [2.0], [4.0], [1.0], [2.0]])  # minima do not matter
    found = follow(DelayedGuidance(mode="static"), rising, [0.0, 0.2, 0.4, 0.5, 0.8])
    for prediction, step in found[:3]:
        assert torch.equal(prediction, step.uncond)
    assert [prediction for prediction, _ in found[3:]] == [None, None]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_no_delay_changes_nothing(mode):
    method = DelayedGuidance(mode=mode, start_percent=0.0, opposite_scale=-2.0)
    found = follow(method, torch.rand(6, 3), [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
    assert [prediction for prediction, _ in found] == [None] * 6


def test_opposite_guidance_comes_first():
    method = DelayedGuidance(mode="static", opposite_scale=-2.0)
    found = follow(method, torch.ones(4, 3), [0.0, 0.3, 0.35, 0.5])
    for prediction, step in found[:2]:
        torch.testing.assert_close(prediction, 3 * step.uncond - 2 * step.cond)
    prediction, step = found[2]
    assert torch.equal(prediction, step.uncond)
    assert found[3][0] is None


def test_the_papers_opposite_setting_goes_straight_to_guidance():
    method = DelayedGuidance(mode="static", opposite_scale=-2.0, start_percent=0.35)
    found = follow(method, torch.ones(2, 3), [0.34, 0.35])
    assert found[0][0] is not None
    assert found[1][0] is None


def test_scale_before_one_is_the_conditional_prediction():
    found = follow(DelayedGuidance(scale_before=1.0), torch.ones(1, 3), [0.0])
    prediction, step = found[0]
    torch.testing.assert_close(prediction, step.cond)


def test_it_starts_with_nothing_changed():
    method = DelayedGuidance(opposite_scale=-1.0)
    run = method.start(start_of(wide_toy()))
    assert (run.cond, run.x, run.settings) == (None, None, method)
    assert method.needs_guidance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "later"}, "`mode` must be one of dynamic, static, got 'later'."),
        ({"start_percent": 50.0}, r"`start_percent` must lie in 0..1, got 50.0."),
        ({"opposite_until": -0.1}, r"`opposite_until` must lie in 0..1, got -0.1."),
        ({"scale_before": float("nan")}, "`scale_before` must be finite, got nan."),
        ({"opposite_scale": 2.0}, "`opposite_scale` must be at most 0, got 2.0."),
        ({"opposite_scale": -float("inf")}, "`opposite_scale` must be at most 0, got -inf."),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DelayedGuidance(**settings)
