"""Where a LoRA's header differs from the training folder and the base model, in sentences.

Headers are text that anybody can write or remove: a difference is a reason to look, agreement is no
proof, and where nothing is said nothing is compared.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...shared.files.weights import READER, ModelError, file_sha256, read_header
from ...shared.wording import counted, name_some, visible
from .header import REPAIR, Header
from .result import TrainingSet

ARCHITECTURES = (
    ("SDXL", r"stable-?diffusion-?xl|sdxl"),
    ("SD 3", r"stable-?diffusion-?(v-?)?3|sd3"),
    ("Flux", r"flux"),
    ("SD 2", r"stable-?diffusion-?v?-?2|sd_v2"),
    ("SD 1", r"stable-?diffusion-?v?-?1|sd_v1"),
)
"""Names, and how modelspec, kohya's scripts and diffusers' classes write them."""
KEYS = {
    "SDXL": "conditioner.embedders.1.", "SD 2": "cond_stage_model.model.",
    "SD 1": "cond_stage_model.transformer.", "SD 3": "model.diffusion_model.joint_blocks.",
    "Flux": "model.diffusion_model.double_blocks.",
}  # fmt: skip
"""What the keys of a single file begin with."""
SD_WIDTHS = {768: "SD 1", 1024: "SD 2"}
"""Width of the text's embeddings, where the pipeline's class is the same."""
OLD_HASH = (0x100000, 0x10000)
"""Start and length of the bytes that the short hash of web user interfaces covers."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model from outside: what a LoRA's header can be compared with."""

    name: str
    file: Path | None = None
    """Of a single-file checkpoint."""
    architecture: str | None = None
    text_width: int | None = None
    """Numbers a token has where its network reads the text."""

    def sha256(self) -> str | None:
        """Return the sha256 of a single file; reads all of it."""
        return file_sha256(self.file) if self.file else None

    def old_hash(self) -> str | None:
        """Return the short hash of a single file, 8 hexadecimal digits."""
        if self.file is None:
            return None
        start, length = OLD_HASH
        with self.file.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(length)).hexdigest()[:8]


def read_base(location: str | Path) -> BaseModel:
    """Return a diffusers folder or a single file; of anything else only the name is known."""
    path = Path(location).expanduser()
    name = path.name or str(location)
    if path.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/...
        name = path.parent.parent.name.rpartition("--")[2]
    if path.is_dir():
        index = _read_json(path / "model_index.json")
        width = _read_json(path / "unet" / "config.json").get("cross_attention_dim")
        width = width if isinstance(width, int) else None
        pipeline = str(index.get("_class_name", ""))
        named = named_architecture(pipeline)
        if pipeline == "StableDiffusionPipeline":
            named = SD_WIDTHS.get(width or 0)
        return BaseModel(name=name, architecture=named, text_width=width)
    if not path.is_file():
        return BaseModel(name=name)
    try:
        shapes = {key: shape for key, (_, shape) in read_header(path).items()}
    except ModelError:  # loading the model will say what is wrong with it
        return BaseModel(name=name, file=path)
    starts = (n for n, start in KEYS.items() if any(key.startswith(start) for key in shapes))
    widths = (shape[1] for key, shape in shapes.items()
              if key.endswith("attn2.to_k.weight") and len(shape) == 2)  # fmt: skip
    return BaseModel(
        name=name, file=path, architecture=next(starts, None), text_width=next(widths, None)
    )


def named_architecture(text: str | None) -> str | None:
    """Return the architecture that a header or a pipeline's class names; None if not known."""
    names = (n for n, pattern in ARCHITECTURES if text and re.match(pattern, text.casefold()))
    return next(names, None)


def _read_json(path: Path) -> dict:
    """Return a JSON file that holds a mapping, or nothing."""
    try:
        value = READER.parse_file(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Remark:
    """The result of one comparison."""

    text: str
    urgent: bool = False
    """A user must act on it."""


def compare_header(
    header: Header,
    training: TrainingSet,
    base: str | Path,
    *,
    base_name: str | None,
    rank: int | None,
    text_width: int | None,
) -> list[Remark]:
    """Return what differs between a LoRA's header and everything else first, then what agrees.

    Args:
        header: Of the LoRA.
        training: The folder it is said to be trained on.
        base: Location of the base model that is used.
        base_name: Name of the base model, as the LoRA says.
        rank: Of the file.
        text_width: Numbers a token has where the LoRA reads the text.
    """
    remarks = [
        *_base_remarks(header, text_width, base_name, read_base(base)),
        *_count_remarks(header, training),
        *_caption_remarks(header, training),
        *_own_remarks(header, rank),
    ]
    return sorted(remarks, key=lambda remark: not remark.urgent)


def _base_remarks(
    header: Header, text_width: int | None, name: str | None, model: BaseModel
) -> Iterator[Remark]:
    """Compare the base model with the one the LoRA names: by its kind, by hash, or else by name."""
    architecture = named_architecture(header.architecture)
    if architecture and model.architecture and architecture != model.architecture:
        text = f"The LoRA was trained on {architecture}; {model.name} is {model.architecture}."
        yield Remark(text, urgent=True)
    if text_width and model.text_width and text_width != model.text_width:
        yield Remark(
            f"The LoRA reads text of {text_width} numbers a token, {model.name} of "
            f"{model.text_width}: it was made for another architecture.",
            urgent=True,
        )
    called = name or "a model without a name"
    if header.base_sha256:
        written, own = header.base_sha256, model.sha256()
    else:
        written, own = header.base_hash, model.old_hash() if header.base_hash else None
    if own and written == own:
        yield Remark(f"The LoRA was trained on {model.name}: the hash in its header is the file's.")
    elif own and written:
        yield Remark(
            f"The LoRA was trained on {called} (hash {written[:8]}), not on {model.name} (hash "
            f"{own[:8]}). What it does to another base model says little about it.",
            urgent=True,
        )
    elif name and Path(name).stem.casefold() != Path(model.name).stem.casefold():
        yield Remark(
            f"The LoRA's header names {called} as its base model, and {model.name} is used. There "
            "is no hash to compare: see that they are the same.",
            urgent=True,
        )
    elif name:
        yield Remark(f"The LoRA's header names {called} as its base model.")
    else:
        yield Remark("The LoRA does not say what base model it was trained on.")


def _count_remarks(header: Header, training: TrainingSet) -> Iterator[Remark]:
    """Compare the images and repeats that the header counts with those of the folder."""
    trained = training.trained
    reserved = 0 if training.held_out_folder else len(training.images) - len(trained)
    in_header = sum(folder.images for folder in header.folders.values())
    images = counted(in_header, "training image", "training images")
    if header.folders and reserved and in_header == len(trained) + reserved:
        yield Remark(
            f"The header counts {in_header} images, all that the folder holds: the {reserved} that "
            "count as not trained on were trained on, and are no controls.",
            urgent=True,
        )
    elif header.folders and in_header != len(trained):
        yield Remark(
            f"The header counts {images}, the folder holds {len(trained)}: it is not the folder of "
            "that training, or was changed since.",
            urgent=True,
        )
    elif header.folders:
        yield Remark(f"The header counts {images}, as many as the folder holds.")
    repeats = {(training.folder / image.name).parent.name: image.repeats for image in trained}
    for name in sorted(repeats.keys() & header.folders.keys()):
        if repeats[name] != header.folders[name].repeats:
            yield Remark(
                f"The images in {visible(name)} are shown "
                f"{counted(repeats[name], 'time', 'times')} an epoch by the folder's name, and "
                f"{counted(header.folders[name].repeats, 'time', 'times')} by the header.",
                urgent=True,
            )
    shown = sum(image.repeats for image in trained)
    if header.images is not None and header.images != shown:
        images = counted(header.images, "image", "images")
        yield Remark(f"An epoch shows {images} by the header, {shown} by the folder.")


def _caption_remarks(header: Header, training: TrainingSet) -> Iterator[Remark]:
    """Compare the tags that the header counts with those of the captions, as kohya counts them."""
    in_header = header.tag_counts()
    if not in_header:
        return
    in_captions = Counter(tag for image in training.trained for tag in _tags(image.caption))
    every = in_header.keys() | in_captions.keys()
    if differing := [tag for tag in every if in_header[tag] != in_captions[tag]]:
        yield Remark(
            f"{len(differing)} of {counted(len(every), 'tag', 'tags')} "
            f"{'is' if len(differing) == 1 else 'are'} not in as many captions as the header "
            f"counts ({name_some(map(visible, differing), 3)}): the captions were changed since.",
            urgent=True,
        )
    else:
        yield Remark(f"The captions hold the {len(in_header)} tags that the header counts.")


def unknown_captions(header: Header, training: TrainingSet) -> tuple[int, ...] | None:
    """Return the training images whose captions hold no tag that the header counts.

    None where the header counts no tags; an image without a caption is not among them.
    """
    if not (known := header.tag_counts()):
        return None
    tags = [_tags(image.caption) for image in training.trained]
    return tuple(i for i, own in enumerate(tags) if own and not any(tag in known for tag in own))


def _tags(caption: str) -> list[str]:
    """Return the comma-separated parts of a caption as kohya's scripts count them."""
    return [tag for part in caption.split(",") if (tag := part.strip().lower())]


def _own_remarks(header: Header, rank: int | None) -> Iterator[Remark]:
    """Name a rank that was changed afterwards, and what our trainer flags wrote."""
    if header.rank is not None and rank is not None and header.rank != rank:
        yield Remark(f"The header says rank {header.rank}, the file has {rank}.")
    trained = [name for name in header.ours if name.partition(".")[0] != REPAIR]
    if trained:
        yield Remark(f"It was trained with Unmemorize: {name_some(trained, 20)}.")
    if how := header.ours.get(REPAIR):
        about = {name: header.ours.get(f"{REPAIR}.{name}", "not said")
                 for name in ("source", "source_sha256", "came_back", "kept")}  # fmt: skip
        yield Remark(
            f"The header says that it was repaired with Unmemorize ({how}): made from "
            f"{about['source']} (sha256 {about['source_sha256']}), from which "
            f"{about['came_back']} training images came back, keeping {about['kept']} of what it "
            "does to other prompts. Whether it holds is what this audit asks."
        )
