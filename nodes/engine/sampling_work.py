"""Work on a MODEL done where ComfyUI samples, so that ComfyUI loads, patches and prepares it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...shared.score.detection import DetectionConfig
from .comfy_denoiser import NEGATIVE, ModelDenoiser, Prompt, guider_keys
from .differentiable import differentiable, writes_in_place
from .live_progress import OnPrediction, live_progress
from .noise_levels import noise_levels, parametrization_of

Result = TypeVar("Result")
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
        ValueError: A kind of model or latent that cannot be measured.
    """
    sampling = model.get_model_object("model_sampling")
    parametrization_of(sampling)
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 4:
        raise ValueError("Only images can be measured: connect an empty latent image.")
    # Newer versions say in the LATENT how many pixels a place stands for.
    scales = {key: value for key, value in latent.items() if key.startswith("downscale_ratio_")}
    samples = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(samples), **scales)
    noise = torch.zeros(ROWS, *samples.shape[1:])
    conds = {name: prompt.entries for name, prompt in prompts.items()} | {NEGATIVE: negative}
    if not all(conds.values()):
        raise ValueError("A conditioning is empty: connect an encoded text.")
    guider = comfy.samplers.CFGGuider(model.clone())
    guider.inner_set_conds({key: conds[name] for name, key in guider_keys(prompts).items()})
    levels = noise_levels(sampling, DetectionConfig().schedule_steps)
    sampler = _Work(work, prompts, live_progress(model, forward_rows), gradients)
    guider.sample(noise, noise.clone(), sampler, levels, disable_pbar=True, seed=0)
    return sampler.result


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
