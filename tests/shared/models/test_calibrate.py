"""A calibration in one call is the one made step by step, bound to the model's own weights."""

import pytest
import tiny
import torch
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.calibrate import calibrate
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.controls import load_controls
from unmemorize.shared.score.detection import control_differences, detect
from unmemorize.shared.score.pooled_basis import pooled
from unmemorize.shared.score.rates import NotEnoughControls

CONFIG = DetectionConfig(seeds=(3,))
PROMPTS = [f"a {color} {thing}" for color in ("red", "green", "old") for thing in ("cat", "dog")]


@pytest.fixture(scope="module")
def model():
    return PipelineDenoiser(tiny.PIPELINES["sd1"]())


def test_own_controls_are_scored_with_the_config(model):
    found = calibrate(model, PROMPTS, CONFIG, false_positive_rate=0.2)
    made = Calibration.from_controls(
        detect(model, PROMPTS, CONFIG),
        model=PipelineDenoiser(model.pipeline).fingerprint,
        settings=settings_of(model, CONFIG),
        name="given prompts",
        false_positive_rate=0.2,
    )
    told = [14]  # of 50
    differences = control_differences(model, PROMPTS, CONFIG, told)
    assert found == made.with_residual(differences, settings_of(model, CONFIG, told))
    assert not found.differences(model.fingerprint, settings_of(model, CONFIG))


def test_two_seeds_judge_images_from_the_same_forward_passes(model):
    two, rows = DetectionConfig(seeds=(3, 4)), []
    hook = model.pipeline.unet.register_forward_hook(lambda m, a, out: rows.append(len(out[0])))
    found = calibrate(model, PROMPTS, two, false_positive_rate=0.2)
    hook.remove()
    assert sum(rows) == 2 * (len(two.seeds) * len(PROMPTS) + len(two.seeds))  # at two levels
    first = control_differences(model, PROMPTS, two, [0, 0])
    basis, scores = pooled(first)
    torch.testing.assert_close(found.observed.basis.mean, basis.mean, rtol=1e-3, atol=1e-5)
    highest = scores.amax(1)
    torch.testing.assert_close(found.observed.seed_scores[:, 0], highest, rtol=1e-3, atol=1e-5)
    assert found.judge is found.residual


def test_several_steps_have_a_magnitude_alone(model):
    several = DetectionConfig(seeds=(3,), steps=2)
    found = calibrate(model, PROMPTS, several, false_positive_rate=0.2)
    assert found.residual is None
    assert found.observed is None
    assert found.settings["steps"] == 2


def test_a_bundled_list_is_the_default_and_supports_one_percent(model):
    counts = []
    found = calibrate(model, config=CONFIG, progress=counts.append)
    assert found.controls == "photographs"
    assert len(found.control_scores) == sum(counts) == len(load_controls("photographs"))
    assert found.false_positive_rate == 0.01


def test_too_few_controls_and_unknown_lists_are_refused(model):
    with pytest.raises(NotEnoughControls):
        calibrate(model, PROMPTS, CONFIG)
    with pytest.raises(ValueError, match="no list of controls 'paintings'"):
        calibrate(model, "paintings", CONFIG)
