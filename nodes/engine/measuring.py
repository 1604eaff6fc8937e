"""Work on a MODEL done where ComfyUI samples, so that ComfyUI loads, patches and prepares it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ...shared.score.calibration import Calibration
from ...shared.score.config import DetectionConfig
from ...shared.score.control_basis import ControlBasis, told_steps
from ...shared.score.detection import Detection, OnResult, control_differences, detect
from .comfy_denoiser import (
    NEGATIVE,
    ModelDenoiser,
    OnPrediction,
    Prompt,
    guider_keys,
    noise_levels,
    parametrization_of,
)
from .differentiable import differentiable, writes_in_place
from .model_identity import settings

Result = TypeVar("Result")
SHARED_WITH_NEGATIVE = ("area", "control", "gligen")
ROWS = 4
"""Rows of one forward pass, at most; ComfyUI frees the memory for as many."""


def with_denoiser(
    model: ModelPatcher,
    prompts: Mapping[str, Prompt],
    negative: list,
    latent: Mapping[str, Any],
    work: Callable[[ModelDenoiser], Result],
    *,
    forward_rows: int,
    gradients: bool = False,
) -> Result:
    """Return `work(denoiser)`, done where ComfyUI's sampler would sample.

    ComfyUI loads the model as memory allows, applies LoRA and hooks and prepares conditionings.
    Nothing else may be loaded in `work`: encode all text before.

    Args:
        model: Stays as it is.
        prompts: By the name that `work` will use, at least one.
        negative: CONDITIONING that guidance moves away from.
        latent: LATENT of the size to measure at; nothing but its size is read.
        work: Called once.
        forward_rows: Rows of all forward passes together, for the progress bar.
        gradients: Let `work` differentiate; inference mode is off then.

    Raises:
        ValueError: The model or the latent cannot be measured.
    """
    sampling = model.get_model_object("model_sampling")
    parametrization_of(sampling)
    noise = torch.zeros(ROWS, *latent_shape(model, latent))
    conds = {name: prompt.entries for name, prompt in prompts.items()} | {NEGATIVE: negative}
    if not all(conds.values()):
        raise ValueError("A conditioning is empty: connect an encoded text.")
    guider = comfy.samplers.CFGGuider(model.clone())
    guider.inner_set_conds({key: conds[name] for name, key in guider_keys(prompts).items()})
    levels = noise_levels(sampling, DetectionConfig().schedule_steps)
    show, tell = live_progress(model, forward_rows), progress_text(forward_rows)

    def on_prediction(x: Tensor, x0: Tensor) -> None:
        show(x, x0)
        tell(len(x0))

    sampler = _Work(work, prompts, on_prediction, gradients)
    guider.sample(noise, noise.clone(), sampler, levels, disable_pbar=True, seed=0)
    return sampler.result


def latent_shape(model: ModelPatcher, latent: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of one latent of this LATENT's size as the network reads it.

    Raises:
        ValueError: It is no image.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 4:
        raise ValueError("Only images can be measured: connect an empty latent image.")
    # Newer versions say in the LATENT how many pixels a place stands for.
    scales = {key: value for key, value in latent.items() if key.startswith("downscale_ratio_")}
    fixed = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(samples), **scales)
    return tuple(fixed.shape[1:])


class _Work(comfy.samplers.Sampler):
    """Does any work on a network that ComfyUI has loaded, patched and prepared for sampling."""

    def __init__(self, work: Callable[[ModelDenoiser], Any], prompts: Mapping[str, Prompt],
                 on_prediction: OnPrediction, gradients: bool):  # fmt: skip
        self.work, self.prompts, self.gradients = work, prompts, gradients
        self.on_prediction, self.result = on_prediction, None

    def sample(self, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
               latent_image: Any = None, denoise_mask: Any = None,
               disable_pbar: bool = False) -> Tensor:  # fmt: skip
        """Do the work; the latent returned is not used."""
        options = extra_args["model_options"]
        with ExitStack() as undo:
            if self.gradients:
                in_place = writes_in_place(guider, options)
                undo.enter_context(differentiable(guider.inner_model, in_place=in_place))
            self.result = self.work(
                ModelDenoiser(guider, self.prompts, options, noise, self.on_prediction)
            )
        return torch.zeros_like(noise)


def live_progress(model: ModelPatcher, rows: int) -> OnPrediction:
    """Return what shows the first x0-prediction of each forward pass, as KSampler would.

    ComfyUI's own previewer draws, in the way that the user has chosen for previews; where they are
    off, only the progress bar moves.

    Args:
        model: MODEL whose latents are drawn.
        rows: Of all forward passes together: where the bar ends.
    """
    show, done = latent_preview.prepare_callback(model, rows), 0

    @torch.no_grad()  # a previewer's own weights are inference tensors, which autograd refuses
    def on_prediction(x: Tensor, x0: Tensor) -> None:
        nonlocal done
        done += len(x0)
        show(done - 1, x0.detach(), x, rows)

    return on_prediction


def progress_text(rows: int) -> Callable[[int], None]:
    """Return what tells on the running node how many predictions are done and how long it takes.

    Args:
        rows: Of all forward passes together.
    """
    context = get_executing_context()
    done, start = 0, time.monotonic()

    def tell(further: int) -> None:
        nonlocal done
        done += further
        if context is None:  # a function that calls a node outside of ComfyUI's queue
            return
        left = (time.monotonic() - start) * max(rows - done, 0) / done
        text = f"{done} of {rows} predictions, {left:.0f} s left"
        PromptServer.instance.send_progress_text(text, context.node_id)

    return tell


def scores(
    model: ModelPatcher,
    prompts: Mapping[str, Prompt],
    negative: list,
    latent: Mapping[str, Any],
    config: DetectionConfig,
    *,
    basis: ControlBasis | None = None,
    known: Mapping[int, torch.Tensor] | None = None,
    on_result: OnResult | None = None,
    on_difference: OnResult | None = None,
) -> tuple[Detection, dict]:
    """Return the scores of prompts, and the settings that a calibration of them is bound to.

    Args:
        model: MODEL.
        prompts: By name.
        negative: CONDITIONING.
        latent: LATENT of the size to measure at.
        config: What to measure.
        basis: As for `detect`.
        known: As for `detect`.
        on_result: As for `detect`.
        on_difference: As for `detect`.
    """

    def work(denoiser: ModelDenoiser) -> tuple[Detection, dict]:
        detection = detect(
            denoiser, [*prompts], config, basis=basis, known=known, on_result=on_result,
            on_difference=on_difference,
        )  # fmt: skip
        return detection, settings(denoiser, config, basis.steps if basis else None)

    rows = forward_rows(len(prompts) - len(known or {}), config)
    return with_denoiser(model, prompts, negative, latent, work, forward_rows=rows)


def control_differences_of(
    model: ModelPatcher,
    prompts: Mapping[str, Prompt],
    negative: list,
    latent: Mapping[str, Any],
    config: DetectionConfig,
    *,
    known: Mapping[int, torch.Tensor],
    on_result: OnResult,
) -> tuple[torch.Tensor, dict]:
    """Return D of control prompts at the told levels, and the settings that it is bound to.

    Args:
        model: MODEL.
        prompts: By name.
        negative: CONDITIONING.
        latent: LATENT of the size to measure at.
        config: Gives the seeds.
        known: As for `control_differences`.
        on_result: As for `control_differences`.
    """

    def work(denoiser: ModelDenoiser) -> tuple[torch.Tensor, dict]:
        told = told_steps(len(config.seeds), config.schedule_steps)
        differences = control_differences(
            denoiser, [*prompts], config, told, known=known, on_result=on_result
        )
        return differences, settings(denoiser, config, told)

    rows = forward_rows(len(prompts) - len(known), config)
    return with_denoiser(model, prompts, negative, latent, work, forward_rows=rows)


def scores_in_order(
    model: ModelPatcher,
    conditionings: Sequence[list],
    negative: list,
    latent: Mapping[str, Any],
    config: DetectionConfig,
    basis: ControlBasis | None = None,
) -> tuple[list[tuple[float, float]], dict]:
    """Return the score of each CONDITIONING as L2 norm and per element, and the settings.

    With a basis the scores are those that it gives.
    """
    prompts = {str(i): Prompt(entries=entries) for i, entries in enumerate(conditionings, 1)}
    measured, settings = {}, {}
    for group in share_negative(prompts):
        detection, made = scores(model, group, negative, latent, config, basis=basis)
        settings = settings or made  # of the first group
        pairs = zip(detection.scores.tolist(), detection.scores_per_element.tolist(), strict=True)
        measured |= zip(group, pairs, strict=True)
    return [measured[name] for name in prompts], settings


def share_negative(prompts: Mapping[str, Prompt]) -> list[dict[str, Prompt]]:
    """Return groups of prompts whose negative is the same prediction.

    ComfyUI gives the negative the areas, ControlNets and GLIGEN of a positive, so a prompt that has
    one is measured by itself.
    """
    shared, alone = {}, []
    for name, prompt in prompts.items():
        if any(key in entry for _, entry in prompt.entries for key in SHARED_WITH_NEGATIVE):
            alone.append({name: prompt})
        else:
            shared[name] = prompt
    return [group for group in (shared, *alone) if group]


def forward_rows(prompts: int, config: DetectionConfig) -> int:
    """Return how many rows `detect` sends through the network."""
    seeds = len(config.seeds)
    return seeds + prompts * seeds * (2 * config.steps - 1)


def caveat_of(calibration: Calibration, model: str, settings: dict, force: bool) -> str:
    """Return "" for a calibration that fits, else a caveat to print with every verdict.

    Raises:
        ValueError: It does not fit and `force` is not set; names what differs.
    """
    differing = calibration.differences(model, settings)
    if differing and not force:
        raise ValueError(
            f"This calibration does not fit: {differing}. Run Calibrate on this model with these "
            "settings, or turn on `force` to use it all the same."
        )
    return calibration.check(model, settings, force=True)


def encoded(clip: Any, text: str) -> list:
    """Return the CONDITIONING of a text, as CLIPTextEncode makes it."""
    if clip is None:
        raise ValueError("There is no text encoder: the checkpoint has none, load one with it.")
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
