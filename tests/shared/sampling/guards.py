"""Small methods, calibrations and calls for the tests of the guard."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from unmemorize.shared.mitigation.method import Method, Mitigation, Start, Step
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import ControlBasis, told_steps
from unmemorize.shared.score.detection import control_differences, detect

PROMPTS = ["a red cat", "tall tree"]
CONTROLS = ["sea", "a mat on the tree", "dog and cat", "green"]
OTHERS = ["a green dog", "sea on the mat"]
REWORDED = dict(zip(PROMPTS, OTHERS, strict=True))
STEPS = 3


def run(pipeline: Any, prompts: Any = PROMPTS, seeds: Sequence[int] = (0, 1), **kwargs: Any) -> Any:
    """Return images [image 3 height width], sampled with guidance where the family can."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt"}
    if is_flux(pipeline) and isinstance(prompts, list):
        settings |= {"negative_prompt": [""] * len(prompts), "true_cfg_scale": 5.0}
        settings["guidance_scale"] = 3.5
    settings["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipeline(prompts, **settings | kwargs).images


def is_flux(pipeline: Any) -> bool:
    return type(pipeline).__name__ == "FluxPipeline"


def scale_of(pipeline: Any) -> str:
    """Return the name of the argument that sets guidance."""
    return "true_cfg_scale" if is_flux(pipeline) else "guidance_scale"


def network_of(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


class Calls:
    """Counts the rows of each network call."""

    def __init__(self, network: Any):
        self.rows: list[int] = []
        network.register_forward_hook(lambda m, a, o: self.rows.append(len(o[0])))

    def taken(self) -> list[int]:
        rows, self.rows = self.rows, []
        return rows


def parted(pipeline: Any, fires: Sequence[bool]) -> tuple[list[str], Calibration]:
    """Return PROMPTS, in an order, and a calibration at whose threshold one of them fires.

    Args:
        pipeline: Decides which of them scores higher.
        fires: Per place, one of them True.
    """
    denoiser = PipelineDenoiser(pipeline)
    for first in range(20):
        config = DetectionConfig(seeds=(first, first + 20))
        scores = detect(denoiser, PROMPTS, config).traces.mean(2)
        leads = bool(scores[0, 0] > scores[1, 0])
        high, low = scores if leads else scores.flip(0)
        if (high > 1.02 * low).all():  # at both seeds, and clear in half precision
            prompts = PROMPTS if leads == fires[0] else PROMPTS[::-1]
            return prompts, calibrated_at(denoiser, config, ((high + low) / 2).tolist())
    raise AssertionError("no seeds tell the prompts apart")


def parted_by_residual(pipeline: Any, fires: Sequence[bool]) -> tuple[list[str], Calibration]:
    """Return what `parted` does, of a calibration that judges by the residual.

    Both prompts' residuals are far above those of its controls.
    """
    denoiser = PipelineDenoiser(pipeline)
    for first in range(20):
        config = DetectionConfig(seeds=(first, first + 20))
        told = told_steps(2, config.schedule_steps)
        differences = control_differences(denoiser, CONTROLS, config, told)
        basis = ControlBasis.fit(differences, 1, told)
        scores = detect(denoiser, PROMPTS, config, basis=basis).traces.mean(2)
        leads = bool(scores[0, 0] > scores[1, 0])
        high, low = scores if leads else scores.flip(0)
        if (high > 1.05 * low).all():
            basis = basis.in_units_of((0.1 * low)[None] * torch.tensor([[0.8], [1.0], [1.2]]))
            prompts = PROMPTS if leads == fires[0] else PROMPTS[::-1]
            levels = detect(denoiser, PROMPTS, config, basis=basis).scores
            judge = calibrated_at(denoiser, config, [float(levels.mean())] * 2)
            settings = settings_of(denoiser, config, told)
            judge = replace(judge, settings=settings, basis=basis)
            return prompts, replace(calibrated_at(denoiser, config, [1.0, 1.0]), residual=judge)
    raise AssertionError("no seeds tell the prompts apart")


def calibrated(pipeline: Any, fires: bool) -> Calibration:
    """Return a calibration at whose threshold all of PROMPTS fire, or none."""
    denoiser, config = PipelineDenoiser(pipeline), DetectionConfig(seeds=(0, 1))
    scores = detect(denoiser, PROMPTS, config).traces.mean(2)
    return calibrated_at(
        denoiser, config, ((scores.amin(0) / 2) if fires else (scores.amax(0) * 2)).tolist()
    )


def calibrated_at(denoiser: Any, config: DetectionConfig, levels: list[float]) -> Calibration:
    """Return a calibration whose controls all score the same, one level per seed."""
    return Calibration(
        model="abc",
        settings=settings_of(denoiser, config),
        controls="made up",
        controls_sha256="",
        control_scores=(tuple(levels),) * 19,
        false_positive_rate=0.05,
        threshold=sum(levels) / len(levels),
        interval=(0.0, 0.2),
    )


class Scripted(Method):
    """Does what it is given, and keeps what it was told."""

    name = "scripted"

    def __init__(
        self,
        begin: Callable[[Start], Mitigation] | None = None,
        guide: Callable[[Step], Tensor | None] | None = None,
        needs_guidance: bool = False,
    ):
        self.begin, self.guide, self.needs_guidance = begin, guide, needs_guidance
        self.starts: list[Start] = []
        self.steps: list[Step] = []
        self.closed = 0

    def start(self, start: Start) -> Mitigation:
        self.starts.append(start)
        made = self.begin(start) if self.begin else Mitigation()
        if self.guide is None:
            return made
        return _Guiding(self, made)


class _Guiding(Mitigation):
    def __init__(self, method: Scripted, made: Mitigation):
        super().__init__(cond=made.cond, x=made.x)
        self.method = method

    def guide(self, step: Step) -> Tensor | None:
        self.method.steps.append(step)
        return self.method.guide(step)

    def close(self) -> None:
        self.method.closed += 1


def rewording() -> Scripted:
    """Return a method that puts other prompts in the place of PROMPTS."""

    def begin(start: Start) -> Mitigation:
        # All are encoded together, as the pipeline would: the bits depend on the batch.
        cond = start.denoiser.encode(OTHERS)
        return Mitigation(
            cond=cond[[PROMPTS.index(prompt) for prompt in start.prompts]],
            changes=tuple(f"now {REWORDED[prompt]}" for prompt in start.prompts),
        )

    return Scripted(begin)


def unguided() -> Scripted:
    """Return a method that takes the prediction of the prompt alone."""
    return Scripted(guide=lambda step: step.guided(1.0))


def renoising(noise: Tensor) -> Scripted:
    """Return a method that starts from `noise` [image *latent] of std 1."""

    def begin(start: Start) -> Mitigation:
        scale = start.denoiser.schedule.latent_scale(float(start.sigma))
        return Mitigation(x=noise[: len(start.x)] * scale)

    return Scripted(begin)


def trace_of(pipeline: Any) -> tuple:
    """Return everything a guard could leave behind."""
    network = network_of(pipeline)
    scheduler = pipeline.scheduler
    return (
        {k: id(v) for k, v in vars(pipeline).items() if not k.startswith("_")},
        {name: list(getattr(network, name)) for name in vars(network) if "hooks" in name},
        [name for name in vars(scheduler) if callable(getattr(scheduler, name))],
        [id(processor) for processor in network.attn_processors.values()],
        network.forward.__func__,
    )
