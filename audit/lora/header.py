"""What a LoRA file says of its own training: text that anybody can write into it, read as data."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...shared.files.weights import read_header as read_shapes
from ...shared.files.weights import read_metadata
from ...shared.wording import visible

LONGEST = 200
"""Characters that are kept of a text."""
LARGEST = 10**9
"""A count above it is no count."""
OURS = "unmemorize."
"""How the keys begin that our trainer flags write."""
REPAIR = "repair"
"""How the rest of the keys begins that `unmemorize repair` writes."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of training images as the trainer counted it."""

    repeats: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The head of a LoRA file; what is missing in its metadata or makes no sense is None or empty.

    It holds the shapes of the weights and, as text, what the trainer wrote.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    folders: Mapping[str, Folder] = field(default_factory=dict)
    """By name, without its parents."""
    regularisation: frozenset[str] = frozenset()
    """Names of the folders of images of the class, which are not to be learnt."""
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Per folder, how many of its captions hold each tag, in lower case, in order of appearance."""
    images: int | None = None
    """Training images times repeats."""
    epoch: int | None = None
    epochs: int | None = None
    steps: int | None = None
    rank: int | None = None
    base_name: str | None = None
    base_sha256: str | None = None
    """Of the base model's file."""
    base_hash: str | None = None
    """Its old short hash, 8 hexadecimal digits."""
    architecture: str | None = None
    module: str | None = None
    """Import name of the network that was trained."""
    ours: Mapping[str, str] = field(default_factory=dict)
    """What our trainer flags and `unmemorize repair` wrote, without the prefix."""

    def regularises(self, folder: str) -> bool:
        """Return whether a folder holds images of the class alone, by its name."""
        return folder in self.regularisation and folder not in self.folders

    @property
    def learnt_tags(self) -> dict[str, Mapping[str, int]]:
        """Return the tags of the folders that are to be learnt."""
        return {name: tags for name, tags in self.tags.items() if not self.regularises(name)}

    def tag_counts(self) -> Counter[str]:
        """Return how many captions of all these folders hold each tag, in order of appearance."""
        total = Counter[str]()
        for tags in self.learnt_tags.values():
            total.update(tags)
        return total


def read_header(path: Path) -> Header:
    """Return the head of a LoRA file; odd values are left out.

    Raises:
        ModelError: It is missing, a pickle, cut off, or not safetensors.
    """
    shapes = {key: shape for key, (_, shape) in read_shapes(path).items()}
    return replace(parse_metadata(read_metadata(path)), shapes=shapes)


def parse_metadata(metadata: Mapping[str, str]) -> Header:
    """Return what the metadata of a safetensors file says, whatever it holds."""
    subsets = list(_subsets(metadata))
    learnt = {}
    for name, about, regularises in subsets:
        repeats, images = _count(about, "n_repeats"), _count(about, "img_count")
        if not regularises and repeats is not None and images is not None:
            learnt[name] = Folder(repeats=repeats, images=images)
    return Header(
        folders=learnt,
        regularisation=frozenset(name for name, _, regularises in subsets if regularises),
        tags=_tags(metadata),
        images=_count(metadata, "ss_num_train_images"),
        epoch=_count(metadata, "ss_epoch"),
        epochs=_count(metadata, "ss_num_epochs"),
        steps=_count(metadata, "ss_steps"),
        rank=_count(metadata, "ss_network_dim"),
        base_name=_text(metadata, "ss_sd_model_name"),
        base_sha256=_hash(metadata, "ss_new_sd_model_hash", 64),
        base_hash=_hash(metadata, "ss_sd_model_hash", 8),
        architecture=_text(metadata, "modelspec.architecture")
        or _text(metadata, "ss_base_model_version"),
        module=_text(metadata, "ss_network_module"),
        ours={visible(key.removeprefix(OURS)[:LONGEST]): visible(value[:LONGEST])
              for key, value in metadata.items() if key.startswith(OURS)},
    )  # fmt: skip


def _subsets(metadata: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield name, counts and whether it regularises, of every folder a kohya script read."""
    for key, regularises in (("ss_dataset_dirs", False), ("ss_reg_dataset_dirs", True)):
        for name, about in _json(metadata, key, dict).items():
            if isinstance(about, dict):
                yield name, about, regularises
    for dataset in _json(metadata, "ss_datasets", list):  # written with --dataset_config
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for about in subsets if isinstance(subsets, list) else ():
            if isinstance(about, dict) and isinstance(about.get("image_dir"), str):
                counts = about | {"n_repeats": about.get("num_repeats")}
                yield about["image_dir"], counts, about.get("is_reg") is True


def _tags(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Return the tag counts of all folders."""
    tables = [_json(metadata, "ss_tag_frequency", dict)]
    tables += [
        dataset["tag_frequency"]
        for dataset in _json(metadata, "ss_datasets", list)
        if isinstance(dataset, dict) and isinstance(dataset.get("tag_frequency"), dict)
    ]
    return {
        name: {
            tag: count
            for tag in counts
            if (count := _count(counts, tag)) is not None and visible(tag[: LONGEST + 1]) == tag
        }
        for table in tables
        for name, counts in table.items()
        if isinstance(counts, dict)
    }


def _json(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """Return a value written as JSON, or an empty one of its kind."""
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _count(values: Mapping[str, Any], key: str) -> int | None:
    """Return a whole number from 0 to `LARGEST`, written as one or as text."""
    value = values.get(key)
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    return value if good else None


def _text(metadata: Mapping[str, str], key: str) -> str | None:
    """Return a text that may be shown, None for none."""
    value = visible(metadata.get(key, "").strip()[:LONGEST])
    return None if value in ("", "None") else value


def _hash(metadata: Mapping[str, str], key: str, digits: int) -> str | None:
    """Return a hash in hexadecimal; kohya writes words in its place for what it could not read."""
    value = metadata.get(key, "").strip().lower()
    whole = len(value) == digits and not set(value) - set("0123456789abcdef")
    return value if whole else None
