"""Which image stands behind each row of a batch of ai-toolkit, and what captions there are."""

import copy
from typing import Any

from ...shared.training.filter.sample_log import Sample


def samples_of(batch: Any) -> list[Sample]:
    """Return the samples of a batch, in its order.

    The caption is the one of the file: the batch's own may be shuffled, dropped or have a trigger
    word, which would make many samples of one.
    """
    return [Sample(file=str(i.path), caption=i.raw_caption or "") for i in batch.file_items]


def captions_of(*loaders: Any) -> list[str]:
    """Return every caption of the datasets of some data loaders once; a loader may be None."""
    captions: dict[str, None] = {}
    for loader in filter(None, loaders):
        groups = getattr(loader.dataset, "datasets", [loader.dataset])
        for dataset in groups:
            for item in dataset.file_list:
                item = copy.copy(item)  # reading sets the caption that the training would draw
                item.load_caption(dataset.caption_dict)
                captions[item.raw_caption] = None
    return list(captions)
