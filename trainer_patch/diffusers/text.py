"""The text side of a training with diffusers: its encoders, and what the empty prompt is there."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.models.adapter import PipelineDenoiser
from ...shared.models.families import family_of
from ...shared.models.folder import dtype_argument
from ...shared.models.quiet import quiet
from ...shared.training.concept.text_states import TextPath, text_path_of
from ...shared.training.projection.factors import UnsupportedTraining

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that read no text, not to be loaded."""
TEXT, POOLED = "encoder_hidden_states", "pooled_projections"
"""Arguments of a network's forward that carry text; SDXL has the pooled one in `ADDED`."""
ADDED, ADDED_TEXT = "added_cond_kwargs", "text_embeds"
MASK = "encoder_attention_mask"


class Outline(nn.Module):
    """A network's configuration without its weights.

    Nothing is denoised by a text side. With the real network, which stands on the accelerator, the
    pipeline would encode there, and its text encoders do not.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.config, self.dtype, self.device = network.config, network.dtype, torch.device("cpu")


def load_text_side(
    path: str,
    network: nn.Module,
    *,
    revision: str | None = None,
    variant: str | None = None,
    max_sequence_length: int | None = None,
) -> PipelineDenoiser:
    """Load a model folder's text encoders, on the CPU and in the network's dtype.

    Args:
        path: Folder or hub id, as the training script was given.
        network: That is trained; only its configuration is used.
        revision: Of the hub id.
        variant: Of the weights.
        max_sequence_length: Tokens that T5 reads; None for the pipeline's own default.

    Raises:
        ValueError: The model is of no supported family.
    """
    from diffusers import DiffusionPipeline

    parts = DiffusionPipeline.load_config(path, revision=revision)
    name = "unet" if "unet" in parts else "transformer"
    given = {name: network, **{part: None for part in UNUSED if part in parts}}
    given[dtype_argument("diffusers")] = network.dtype
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(
            path, revision=revision, variant=variant, **given
        )
    setattr(pipeline, name, Outline(network))
    if max_sequence_length is not None and family_of(pipeline).network_name == "transformer":
        pipeline.encode_prompt = partial(
            pipeline.encode_prompt, max_sequence_length=max_sequence_length
        )
    denoiser = PipelineDenoiser(pipeline)
    if max_sequence_length is not None and hasattr(denoiser.family, "t5_length"):
        denoiser.family.t5_length = max_sequence_length
    return denoiser


def complete(denoiser: PipelineDenoiser, network: nn.Module) -> None:
    """Make a text side whose prompts are all encoded denoise with the network that is trained."""
    pipeline = denoiser.pipeline
    setattr(pipeline, denoiser.family.network_name, network)
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipeline, name):
            setattr(pipeline, name, None)  # gigabytes that no step needs


def text_path(denoiser: PipelineDenoiser) -> TextPath:
    """Return the way from prompts to what text-fed layers read, SDXL's two encoders told apart."""
    pipeline = denoiser.pipeline
    if denoiser.family.network_name != "unet" or not hasattr(pipeline, "text_encoder_2"):
        return text_path_of(denoiser)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    return text_path_of(denoiser, tuple(encoder.config.hidden_size for encoder in encoders))


@dataclass(frozen=True, kw_only=True)
class EmptyPrompt:
    """What a network is told in place of a prompt, and in which units it speaks."""

    embeddings: Tensor
    """[1 token width]."""
    pooled: Tensor | None
    """[1 pooled_width], for networks that read one."""
    timestep_unit: float
    """Training timesteps in one unit of what the network is told."""
    signal: Tensor | None
    """[timestep] sqrt(abar), which turns velocities into noise; None where scores need none."""

    @classmethod
    def of(cls, denoiser: PipelineDenoiser, prediction_type: str | None = None) -> "EmptyPrompt":
        """Encode the empty prompt.

        Args:
            denoiser: Whose text encoders are not trained.
            prediction_type: Of the training, where it is not the scheduler's.
        """
        cond = denoiser.encode([""])
        velocity = (prediction_type or denoiser.parametrization) == "v_prediction"
        return cls(
            embeddings=cond.embeddings.detach(),
            pooled=None if cond.pooled is None else cond.pooled.detach(),
            timestep_unit=denoiser.family.timestep_unit,
            signal=denoiser.schedule.signal() if velocity else None,
        )

    def in_place_of_prompt(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a network's forward, by name, with the empty prompt in them.

        Raises:
            UnsupportedTraining: The training hides tokens, or encodes text to another shape.
        """
        if call.get(MASK) is not None:
            raise UnsupportedTraining("The filter does not support masked text embeddings.")
        changed = dict(call) | {TEXT: _repeat(self.embeddings, call[TEXT])}
        if call.get(POOLED) is not None:
            changed[POOLED] = _repeat(self.pooled, call[POOLED])
        if ADDED_TEXT in (added := call.get(ADDED) or {}):
            changed[ADDED] = {**added, ADDED_TEXT: _repeat(self.pooled, added[ADDED_TEXT])}
        return changed

    def timesteps(self, call: Mapping[str, Any], rows: int) -> Tensor:
        """Return the training timesteps of the first rows of a call, [row]."""
        told = torch.as_tensor(call["timestep"])
        return (told[:rows] if told.ndim else told.expand(rows)) * self.timestep_unit

    def scale(self, timesteps: Tensor) -> Tensor | None:
        """Return the factor from the network's output to noise, [row]; None is 1."""
        return None if self.signal is None else self.signal[timesteps.cpu().long()]


def _repeat(empty: Tensor, text: Tensor) -> Tensor:
    """Return the empty prompt's row as often as there are rows of text."""
    if empty.shape[1:] != text.shape[1:]:
        raise UnsupportedTraining(
            f"The training's prompts are encoded to {tuple(text.shape[1:])}, the empty prompt to "
            f"{tuple(empty.shape[1:])}. The filter needs the model's own length of prompts."
        )
    return empty.to(text.device, text.dtype).expand_as(text)
