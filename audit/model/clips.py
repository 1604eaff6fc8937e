"""Content and motion of the clips that prompts ask for, each with a verdict of its own."""

from typing import Any

from ...shared.score.calibration import Calibration
from ...shared.score.config import CLIP_PARTS
from ..common.measure import Measured

NO_CLIP_CONTROLS = (
    "No verdict on content and motion: the calibration holds no controls of either. Make it again "
    "with `unmemorize calibrate`."
)


def clip_verdicts(measured: Measured, calibration: Calibration | None) -> list[dict[str, Any]]:
    """Return one row a prompt as JSON values; none at all for models of images.

    Content is compared with the controls' content alone, motion with their motion: a prompt may
    bring one back without the other. Each of the two has the calibration's false-positive rate.

    Args:
        measured: With `clips`, of the calibration's seeds.
        calibration: As it was loaded, its `content` and `motion` give the verdicts.
    """
    if measured.clips is None:
        return []
    frames = measured.clips.frames.mean(dim=(1, 2)).tolist()
    rows: list[dict[str, Any]] = [{"frames": each} for each in frames]
    for name in CLIP_PARTS:
        scores = getattr(measured.clips, name).mean(dim=(1, 2))
        controls: Calibration | None = calibration and getattr(calibration, name)
        none = [None] * len(rows)
        columns = {
            "magnitude": scores.tolist(),
            "p_value": controls.p_values(scores).tolist() if controls else none,
            "memorized": controls.flags(scores).tolist() if controls else none,
        }
        for row, values in zip(rows, zip(*columns.values(), strict=True), strict=True):
            row[name] = dict(zip(columns, values, strict=True))
    return rows
