"""What the figures of families count, on a model of which it is written down what prompts add."""

import dataclasses

import pytest
from bench_models import Caption
from families import measure_families
from scripted import ScriptedDenoiser, noise
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import control_differences, detect

CONFIG = DetectionConfig(seeds=(0, 1), schedule_steps=5)
FOX, HEN, CAT = (4 * row for row in noise(1, 3))
TRUTH = {
    Caption("a red fox on green grass", "verbatim"): FOX * 1.5,
    Caption("a red fox on blue grass", "held_out", "a red fox on green grass"): FOX,
    Caption("a red hen on sand", "verbatim"): HEN,
    Caption("a red hen on snow", "held_out", "a red hen on sand"): CAT,  # of another image
    Caption("a red cat on green grass", "verbatim"): FOX * 1.2 + noise(7)[0],  # taken for near
    Caption("a castle", "learnt"): 4 * noise(8)[0],  # a false alarm that is near nobody
    Caption("a calm sea", "learnt"): noise(9)[0] / 2,  # not flagged
}


def calibrated() -> Calibration:
    controls = {f"control {k}": row for k, row in enumerate(noise(5, 60))}
    denoiser = ScriptedDenoiser(controls)
    magnitudes = Calibration.from_controls(
        detect(denoiser, [*controls], CONFIG), model="", settings=settings_of(denoiser, CONFIG),
        name="", false_positive_rate=0.05,
    )  # fmt: skip
    told = [2] * len(CONFIG.seeds)
    differences = control_differences(denoiser, [*controls], CONFIG, told)
    return magnitudes.with_residual(differences, settings_of(denoiser, CONFIG, told))


def test_near_captions_count_when_they_are_grouped_with_their_own_member():
    denoiser = ScriptedDenoiser({c.text: added for c, added in TRUTH.items()})
    figures = measure_families(denoiser, calibrated(), [*TRUTH])
    counts = {name: (round(f.value * f.n), f.n) for name, f in figures.items()}
    assert counts == {
        "family_recall": (1, 2),
        "family_planted_near": (1, 3),
        "family_other_near": (0, 1),
        "family_planted_pairs": (0, 2),  # the third pair shares its words
    }
    alone = [caption for caption in TRUTH if caption.group == "learnt"]
    figures = measure_families(denoiser, calibrated(), alone)
    assert figures["family_recall"] == (None, None, None, 0)


def test_a_calibration_without_a_limit_is_refused():
    made = calibrated()
    for short in (
        dataclasses.replace(made, residual=None),
        dataclasses.replace(made, residual=dataclasses.replace(made.residual, family_cosine=None)),
    ):
        with pytest.raises(ValueError, match="from 50 controls"):
            measure_families(ScriptedDenoiser({}), short, [*TRUTH])
