"""What the measuring nodes have in common: their inputs, and scores through ComfyUI's sampler."""

from collections.abc import Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...shared.score.calibration import Calibration
from ...shared.score.detection import Detection, DetectionConfig, OnResult, detect
from .comfy_denoiser import ModelDenoiser, Prompt
from .model_identity import settings
from .sampling_work import ROWS, with_denoiser
from .schema import CalibrationSocket


def model_input() -> io.Model.Input:
    """Return the input of the model that is measured."""
    return io.Model.Input("model", tooltip="With its LoRA, as you sample with it.")


def latent_input() -> io.Latent.Input:
    """Return the input that says how large the images are."""
    return io.Latent.Input(
        "latent",
        tooltip="Empty latent of the image size to measure at; nothing but its size is read. "
        "Scores grow with it: use the size you sample at.",
    )


def negative_input() -> io.Conditioning.Input:
    """Return the input of what guidance moves away from."""
    return io.Conditioning.Input(
        "negative",
        tooltip="What the score is measured against: an empty text; for SDXL an empty text through "
        "ConditioningZeroOut to compare with the command line. Other negatives change the score.",
    )


def calibration_input() -> CalibrationSocket.Input:
    """Return the input of what turns scores into verdicts."""
    return CalibrationSocket.Input(
        "calibration",
        optional=True,
        tooltip="Of this very model and these settings; no verdict without it.",
    )


def seed_inputs() -> list[io.Int.Input]:
    """Return the inputs of a `DetectionConfig`."""
    return [
        io.Int.Input(
            "seeds", default=4, min=1, max=64,
            tooltip="Starting noises to average over, 1 to 64: seeds 0, 1, 2, ... More are slower "
            "and steadier.",
        ),
        io.Int.Input(
            "steps", default=1, min=1, max=50,
            tooltip="Denoising steps to average over, 1 to 50, from the noisiest of 50. One is "
            "enough as a rule.",
        ),
    ]  # fmt: skip


def config_of(seeds: int, steps: int) -> DetectionConfig:
    """Return what the widgets say."""
    return DetectionConfig(seeds=tuple(range(seeds)), steps=steps, batch_size=ROWS)


def scores(
    model: ModelPatcher,
    prompts: Mapping[str, Prompt],
    negative: list,
    latent: Mapping[str, Any],
    config: DetectionConfig,
    *,
    known: Mapping[int, torch.Tensor] | None = None,
    on_result: OnResult | None = None,
) -> tuple[Detection, dict]:
    """Return the scores of prompts, and the settings that a calibration of them is bound to.

    Args:
        model: MODEL.
        prompts: By name.
        negative: CONDITIONING.
        latent: LATENT of the size to measure at.
        config: What to measure.
        known: As for `detect`.
        on_result: As for `detect`.
    """

    def work(denoiser: ModelDenoiser) -> tuple[Detection, dict]:
        found = detect(denoiser, [*prompts], config, known=known, on_result=on_result)
        return found, settings(denoiser, config)

    missing = len(prompts) - len(known or {})
    return with_denoiser(
        model, prompts, negative, latent, work, forward_rows=forward_rows(missing, config)
    )


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
