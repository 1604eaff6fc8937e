"""What ai-toolkit makes of prompts and batches, and how its prediction in a step is made again."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.score.noise_levels import nearest_timestep, sigma_of
from ...shared.training.concept.text_states import TextPath, TextStates, read_states
from ...shared.training.filter.sample_log import Sample
from ...shared.training.layers.regions import still_noise
from ...shared.training.protection import Protection
from ..step import Call


class StepAdapter:
    """Makes the extra passes of a step; a `TrainerAdapter`.

    For base targets the network must predict noise: the noise that the trainer's loss is computed
    with is the target.
    """

    repeats_rows = False

    def __init__(self, process: Any, protection: Protection):
        """Encode the empty prompt, while the text encoders are there.

        Args:
            process: The training, with its network; its text encoders are not trained.
            protection: Fitted already.
        """
        sd = process.sd
        self._process, self._sd, self._protection = process, sd, protection
        self._empty = sd.encode_prompt([""]).detach()
        self.device: torch.device = process.device_torch
        velocity = not sd.is_flow_matching and sd.prediction_type == "v_prediction"
        self.signal = sd.noise_scheduler.alphas_cumprod.cpu().sqrt() if velocity else None
        """By timestep sqrt(abar), for networks that predict velocities of a noise schedule."""

    def without_text(self, call: Call, rows: Tensor | None) -> Tensor:
        return call.again(conditional_embeds=self._without_text(len(call.samples)))

    def with_text(self, call: Call, rows: Tensor | None) -> Tensor:
        return call.again()

    def network(self, call: Call) -> nn.Module:
        return self._process.accelerator.unwrap_model(self._sd.unet)

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        network = self._process.network
        before, network.is_active = network.is_active, False
        try:
            yield
        finally:
            network.is_active = before

    def base(self, call: Call, rows: Tensor) -> Tensor:
        return call.again()[rows]

    def look(self, call: Call, rows: Tensor, latents: Tensor) -> None:
        sigmas = sigma_of(self._sd.noise_scheduler.alphas_cumprod)
        nearest = nearest_timestep(sigmas, self._protection.base_targets.regions.sigma)
        timesteps = torch.full((len(latents),), nearest, device=latents.device)
        call.only(rows, len(call.given["noisy_latents"])).again(
            noisy_latents=self._sd.add_noise(latents, still_noise(latents), timesteps),
            timesteps=timesteps,
            conditional_embeds=self._without_text(len(latents)),
        )

    def _without_text(self, rows: int) -> Any:
        """Return the empty prompt's conditioning for a batch."""
        from toolkit.prompt_utils import concat_prompt_embeds

        return concat_prompt_embeds([self._empty] * rows)


def samples_of(batch: Any) -> dict[int, Sample]:
    """Return the samples of a batch by row.

    The caption is the one of the file: the batch's own may be shuffled, dropped or have a trigger
    word, which would make many samples of one.
    """
    items = enumerate(batch.file_items)
    return {row: Sample(file=str(i.path), caption=i.raw_caption or "") for row, i in items}


def captions_of(*loaders: Any) -> list[str]:
    """Return every caption of the datasets of some data loaders once; a loader may be None."""
    captions: dict[str, None] = {}
    for dataset in _datasets(loaders):
        for item in dataset.file_list:
            item = copy.copy(item)  # reading sets the caption that the training would draw
            item.load_caption(dataset.caption_dict)
            captions[item.raw_caption] = None
    return list(captions)


def files_of(*loaders: Any) -> list[str]:
    """Return every image of the datasets of some data loaders; a loader may be None."""
    return [str(item.path) for dataset in _datasets(loaders) for item in dataset.file_list]


def _datasets(loaders: Sequence[Any]) -> Iterator[Any]:
    for loader in filter(None, loaders):
        yield from getattr(loader.dataset, "datasets", [loader.dataset])


def text_path(sd: Any) -> TextPath:
    """Return the text path of ai-toolkit's model, for SD 1, SD 2 and SDXL.

    Args:
        sd: Its text encoders are there and not trained.
    """

    def encode(prompts: Sequence[str]) -> TextStates:
        # Where a model has one of a part, it stands alone and not in a list.
        tokenizer, encoders = (
            part if isinstance(part, list) else [part] for part in (sd.tokenizer, sd.text_encoder)
        )
        widths = [encoder.config.hidden_size for encoder in encoders]
        states = sd.encode_prompt(list(prompts)).text_embeds.detach()
        return read_states(states.split(widths, dim=-1), tokenizer[0], prompts)

    return encode
