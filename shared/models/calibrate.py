"""A calibration of a loaded model in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..score.calibration import Calibration, settings_of
from ..score.config import DetectionConfig
from ..score.control_basis import told_steps
from ..score.controls import load_controls
from ..score.detection import Progress, control_differences, detect
from .adapter import PipelineDenoiser


def calibrate(
    model: PipelineDenoiser,
    controls: str | Sequence[str] = "photographs",
    config: DetectionConfig | None = None,
    *,
    false_positive_rate: float = 0.01,
    progress: Progress | None = None,
) -> Calibration:
    """Score control prompts on a model, and return the thresholds that they support.

    They are measured at two noise levels. What they add at the first step gives the magnitude and,
    at two seeds or more, the residual outside of what they all add at any starting noise, by which
    images are judged that an observer sees. At later told levels they give the residual by which
    prompts are judged. With `steps` above 1 there is the magnitude alone.

    It holds for this model, with the LoRA that it carries, and for prompts of the same kind as the
    controls, which the model must not have memorized.

    Args:
        model: From `load`.
        controls: Prompts, or the name of a bundled list: "photographs" or "art".
        config: Seeds and steps, as in the detection that it is for.
        false_positive_rate: Highest share of ordinary prompts that may be flagged, in expectation,
            above 0 and below 1; a rate of .01 needs 99 controls.
        progress: Called with the number of controls scored since the last call.

    Raises:
        NotEnoughControls: The number of controls cannot support the rate.
        ValueError: There is no such list.
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    config = config or DetectionConfig()
    prompts, name = controls, "given prompts"
    if isinstance(controls, str):
        prompts, name = load_controls(controls), controls
    first: dict[int, Tensor] = {}
    keep = first.__setitem__ if config.steps == 1 else None
    magnitudes = Calibration.from_controls(
        detect(model, prompts, config, on_difference=keep, progress=progress),
        model=model.fingerprint,
        settings=settings_of(model, config),
        name=name,
        false_positive_rate=false_positive_rate,
    )
    if config.steps > 1:
        return magnitudes
    in_order = torch.stack([first.pop(index) for index in range(len(prompts))], dim=1)
    calibration = magnitudes.with_observed(in_order)
    told = told_steps(len(config.seeds), config.schedule_steps)
    differences = control_differences(model, prompts, config, told)
    return calibration.with_residual(differences, settings_of(model, config, told))
