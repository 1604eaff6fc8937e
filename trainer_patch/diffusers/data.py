"""What a training with diffusers reads: its text side, and the samples in a script's batches.

Scripts pass on pixels and tokens alone. So the data loader's examples are numbered on their way
into a batch, the batch carries its samples out of the worker processes, and they are taken off
again before the script sees the batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ...shared.models.adapter import PipelineDenoiser
from ...shared.models.calls.quiet import quiet
from ...shared.models.families import (
    Flux,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    family_of,
)
from ...shared.models.folder import UNUSED, dtype_argument
from ...shared.training.filter.sample_log import Sample
from ...shared.training.projection.factors import UnsupportedTraining
from ..step import repeated

TEXT, POOLED = "encoder_hidden_states", "pooled_projections"
"""Arguments of a network's forward that carry text; SDXL has the pooled one in `ADDED`."""
ADDED, ADDED_TEXT = "added_cond_kwargs", "text_embeds"
MASK = "encoder_attention_mask"
COVERED = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
"""Families whose networks read text and time as `EmptyPrompt` puts them."""


class Outline(nn.Module):
    """A network's configuration without its weights.

    Nothing is denoised by a text side. With the real network, which stands on the accelerator, the
    pipeline would encode there, and its text encoders do not.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.config, self.dtype, self.device = network.config, network.dtype, torch.device("cpu")
        self._outlined = [network]  # in a list, so that its weights are no weights of this module

    def __getattr__(self, name: str) -> Any:
        """Read of the network what pipelines ask besides its configuration: sizes of layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_outlined"][0], name)

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        """Name what the pipelines of U-Nets pass without a name; nobody calls it."""
        raise NotImplementedError("An outline has no weights.")


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


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """Return a pipeline's text encoders."""
    parts = getattr(pipeline, "components", {}).items()
    return [part for name, part in parts
            if name.startswith("text_encoder") and isinstance(part, nn.Module)]  # fmt: skip


def complete(denoiser: PipelineDenoiser, network: nn.Module) -> None:
    """Make a text side whose prompts are all encoded denoise with the network that is trained."""
    pipeline = denoiser.pipeline
    setattr(pipeline, denoiser.family.network_name, network)
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipeline, name):
            setattr(pipeline, name, None)  # gigabytes that no step needs


@dataclass(frozen=True, kw_only=True)
class EmptyPrompt:
    """What a network reads in place of a prompt, and the units of its timesteps and output."""

    embeddings: Tensor
    """[1 token width]."""
    pooled: Tensor | None
    """[1 pooled_width], for networks that read one."""
    timestep_unit: float
    """Training timesteps in one unit of the network's timestep."""
    signal: Tensor | None
    """[timestep] sqrt(abar), which turns velocities into noise; None where scores need none."""

    @classmethod
    def of(cls, denoiser: PipelineDenoiser, prediction_type: str | None = None) -> "EmptyPrompt":
        """Encode the empty prompt.

        Args:
            denoiser: Whose text encoders are not trained.
            prediction_type: Of the training, where it is not the scheduler's.
        """
        if type(denoiser.family) not in COVERED:
            raise UnsupportedTraining(
                f"A {type(denoiser.pipeline).__name__} is not covered by the filter; SD 1, SD 2, "
                "SDXL, SD3 and Flux.1 are. Leave the filter out."
            )
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
        return with_text(call, self.embeddings, self.pooled)

    def timesteps(self, call: Mapping[str, Any], rows: int) -> Tensor:
        """Return the training timesteps of the rows of a call, [row]."""
        timesteps = torch.as_tensor(call["timestep"])
        return (timesteps if timesteps.ndim else timesteps.expand(rows)) * self.timestep_unit


def with_text(call: Mapping[str, Any], embeddings: Tensor, pooled: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a network's forward, by name, with other text in them.

    Args:
        call: The arguments.
        embeddings: [row token width], or one row for all.
        pooled: [row pooled_width], or one row for all; for networks that read one.

    Raises:
        UnsupportedTraining: The training encodes text to another shape.
    """
    changed = dict(call) | {TEXT: repeated(embeddings, call[TEXT])}
    if call.get(POOLED) is not None:
        changed[POOLED] = repeated(pooled, call[POOLED])
    if ADDED_TEXT in (added := call.get(ADDED) or {}):
        changed[ADDED] = {**added, ADDED_TEXT: repeated(pooled, added[ADDED_TEXT])}
    return changed


class Signed(NamedTuple):
    """A batch with its samples."""

    samples: tuple[Sample, ...]
    batch: Any


class Numbered:
    """A dataset whose examples come with their samples."""

    def __init__(self, dataset: Any, caption_column: str | None):
        self.dataset, self.caption_column = dataset, caption_column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet while a worker process unpickles this
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> tuple[Sample, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Sample, Any]]:
        # Together where the dataset can: transforms then draw random numbers in the same order.
        together = getattr(self.dataset, "__getitems__", None)
        examples = together(indices) if together else [self.dataset[index] for index in indices]
        return [
            (sample_of(self.dataset, index, example, self.caption_column), example)
            for index, example in zip(indices, examples, strict=True)
        ]


class Signing:
    """A function that makes batches, and signs them."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, pairs: Sequence[tuple[Sample, Any]]) -> Signed:
        """Return the batch of the examples."""
        samples, examples = zip(*pairs, strict=True)
        return Signed(samples, self.collate(list(examples)))


class BatchSamples:
    """The samples of the batch that a training works on now."""

    def __init__(self) -> None:
        self.now: tuple[Sample, ...] = ()

    def __call__(self) -> Sequence[Sample]:
        """Return them; empty where a loader was not signed."""
        return self.now

    def sign(self, loader: DataLoader, caption_column: str | None) -> None:
        """Let the batches of a loader carry their samples, before it is prepared by accelerate."""
        if not isinstance(loader.dataset, (Numbered, IterableDataset)):
            column = _caption_column(loader.dataset, caption_column)
            # Loaders refuse a new dataset by assignment. Another loader would have to be built from
            # every argument of this one, which differ between releases.
            vars(loader)["dataset"] = Numbered(loader.dataset, column)
            loader.collate_fn = Signing(loader.collate_fn)

    def unsigned(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches as their collate function made them."""
        for batch in batches:
            signed = isinstance(batch, Signed)
            self.now = batch.samples if signed else ()
            yield batch.batch if signed else batch


def sample_of(dataset: Any, index: int, example: Any, caption_column: str | None) -> Sample:
    """Return who an example of a training script's dataset is.

    The file is the path of its image where the example or the dataset has it, else its number.
    The caption is empty where a script draws one of several at random.
    """
    fields = example if isinstance(example, Mapping) else {}
    file = next((name for value in fields.values() if (name := _path(value))), None)
    for name in ("instance_images_path", "instance_images"):
        if images := getattr(dataset, name, ()):
            file = file or _path(images[index % len(images)])
    captions = getattr(dataset, "custom_instance_prompts", None)
    if captions:
        caption = captions[index % len(captions)]
    else:
        caption = fields.get(caption_column, getattr(dataset, "instance_prompt", ""))
    return Sample(
        file=file or f"number {index}", caption=caption if isinstance(caption, str) else ""
    )


def captions_of(dataset: Any, caption_column: str | None) -> list[str]:
    """Return the captions of a training script's dataset, each once; its images are not read."""
    if column := _caption_column(dataset, caption_column):
        rows = dataset.with_format(None)[column]
        captions = [each for row in rows for each in ([row] if isinstance(row, str) else row)]
    else:
        captions = getattr(dataset, "custom_instance_prompts", None) or [
            getattr(dataset, "instance_prompt", "")
        ]
    return [caption for caption in dict.fromkeys(captions) if caption]


def _caption_column(dataset: Any, wanted: str | None) -> str | None:
    """Return the column of captions as the scripts choose it, None where there are no columns."""
    names = getattr(dataset, "column_names", None) or []  # of the library `datasets`
    return wanted or names[1] if len(names) > 1 else None


def _path(value: Any) -> str:
    """Return the path of an image that was opened, or a path itself; empty for anything else."""
    return str(value) if isinstance(value, Path) else getattr(value, "filename", None) or ""
