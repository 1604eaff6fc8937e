"""Which samples the batch of a training script holds: scripts themselves pass on pixels and tokens.

The data loader's examples are numbered on their way into a batch, the batch carries who is in it
out of the worker processes, and that is taken off again before the script sees the batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from ...shared.training.filter.sample_log import Sample


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

    The file is the path of its image where the example or the dataset tells it, else its number.
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
        found = [each for row in rows for each in ([row] if isinstance(row, str) else row)]
    else:
        found = getattr(dataset, "custom_instance_prompts", None) or [
            getattr(dataset, "instance_prompt", "")
        ]
    return [caption for caption in dict.fromkeys(found) if caption]


def _caption_column(dataset: Any, asked: str | None) -> str | None:
    """Return the column of captions as the scripts choose it, None where there are no columns."""
    names = getattr(dataset, "column_names", None) or []  # of the library `datasets`
    return asked or names[1] if len(names) > 1 else None


def _path(value: Any) -> str:
    """Return the path of an image that was opened, or a path itself; empty for anything else."""
    return str(value) if isinstance(value, Path) else getattr(value, "filename", None) or ""
