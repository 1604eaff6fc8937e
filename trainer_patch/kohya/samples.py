"""Which image stands behind each row of a batch of sd-scripts."""

from collections.abc import Mapping
from typing import Any

from ...shared.training.filter.sample_log import Sample


class BatchSamples:
    """Names the samples of a batch by file, with the caption of the dataset.

    The batch's own caption may be shuffled or dropped, which would make many samples of one.
    """

    def __init__(self, dataset: Any):
        """Take the training dataset."""
        self._parts = getattr(dataset, "datasets", [dataset])
        self._samples: dict[str, Sample] = {}
        for part in self._parts:
            for key, info in getattr(part, "image_data", {}).items():
                caption = info.caption if isinstance(info.caption, str) else ""
                self._samples[key] = Sample(file=str(info.absolute_path), caption=caption)

    @property
    def captions(self) -> list[str]:
        """Every caption of the dataset once."""
        return list(dict.fromkeys(sample.caption for sample in self._samples.values()))

    def show(self) -> None:
        """Make the dataset's batches hold the keys of their images, in worker processes too."""
        for part in self._parts:
            part.debug_dataset = True  # after the start it does this and nothing else

    def of(self, batch: Mapping[str, Any]) -> list[Sample]:
        """Return the samples of a batch, in its order.

        Raises:
            ValueError: The batch names no images: it is of a dataset class of the user's own.
        """
        if not (keys := batch.get("image_keys")):
            raise ValueError("The dataset's batches have no `image_keys`: samples have no name.")
        return [self._samples.get(key, Sample(file=str(key))) for key in keys]
