"""Read: the LoRA's file, its training folder, and its saved epochs, each once."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...shared.files.prompts import clean, read_prompts
from ...shared.files.weights import READER, ModelError, file_sha256, sha256_of
from ...shared.models.lora.dialects import EMBEDDING, FACTORS, MAGNITUDES, PEFT_PREFIX
from ...shared.wording import counted, name_some, visible
from .config import LoraAuditConfig
from .header import LONGEST, Header, read_header
from .remarks import compare_header, unknown_captions
from .result import LoraFacts, TrainingSet
from .training_set import TrainedWordsUnknown, read_training_set

Dialect = Literal["kohya", "peft", "diffusers", "lycoris", "comfyui"]
PARTS = ("unet.", "transformer.", "text_encoder")
"""How diffusers' keys begin."""
PRODUCTS = {"hada_": "loha", "lokr_": "lokr"}
"""Kind of a module by the start of a factor's name."""
DOWN = tuple(down for down, _ in FACTORS)
INNER = (*DOWN, ".hada_w1_b", ".lokr_w2_b", ".lokr_w1_b")
"""Endings of factors whose first dimension is the rank."""
ABSURD = 100.0
"""Of alpha / rank; trainers write 1 or a little more, down to the inverse of the rank."""
READS_TEXT = ("attn2_to_k", "attn2.to_k")
"""Layers whose inputs are the text's embeddings."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One saved file."""

    path: Path
    number: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Material:
    """What an audit starts from."""

    lora: LoraFacts
    training: TrainingSet
    epochs: tuple[Epoch, ...]
    unknown: tuple[int, ...] | None = None
    """Training images whose captions hold nothing that the LoRA's header counts; None where it
    counts no words."""
    prompts: tuple[str, ...] = ()
    """Besides the captions."""


def read(config: LoraAuditConfig, base: str | Path) -> Material:
    """Return what the files of an audit hold; nothing is computed.

    Args:
        config: Names the files.
        base: Diffusers folder, single-file checkpoint, or hub id, of which only the name is used.

    Raises:
        ModelError: The LoRA is missing, a pickle, cut off, not safetensors, or no LoRA.
        PromptError: The training folder or the prompts cannot be read, or nothing is known of the
            words that were trained.
        ValueError: The epochs cannot be read.
    """
    epochs = read_epochs(config.epochs)
    header = read_header(config.lora)
    training = read_training_set(
        config.images, header, instance_prompt=config.instance_prompt, trigger=config.trigger,
        held_out=config.held_out, reserve=config.reserve,
    )  # fmt: skip
    refuse_without_words(training)
    lora = lora_facts(config.lora, header, training, base)
    captions = {image.caption for image in training.images}
    examples = clean([prompt for path in config.prompts for prompt in read_prompts(path)]).prompts
    return Material(lora=lora, training=training, epochs=tuple(epochs),
                    unknown=unknown_captions(header, training),
                    prompts=tuple(text for text in examples if text not in captions))  # fmt: skip


def read_epochs(named: Sequence[Path]) -> list[Epoch]:
    """Return the LoRA files that were named, or lie in the named folders, by rising epoch.

    The number stands in the header (`ss_epoch`), else at the end of the name; a file with neither
    is taken for the last, as kohya's scripts name their final one.

    Raises:
        ValueError: There is no such file, or a folder holds none.
    """
    paths: list[Path] = []
    for path in named:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(each.is_file() for each in files):
            raise ValueError(f"--epochs: {path} is no .safetensors file and no folder of them.")
        paths += files
    numbers = {path: _epoch_of(path) for path in dict.fromkeys(path.resolve() for path in paths)}
    last = 1 + max((n for n in numbers.values() if n is not None), default=0)
    ordered = sorted(numbers, key=lambda path: (numbers[path] or last, path.name))
    return [Epoch(path=path, number=numbers[path] or last, sha256=sha256_of([path], path.parent))
            for path in ordered]  # fmt: skip


def _epoch_of(path: Path) -> int | None:
    written = read_header(path).epoch
    digits = re.search(r"(\d+)$", path.stem)
    return written if written is not None else int(digits[1]) if digits else None


def lora_facts(path: Path, header: Header, training: TrainingSet, base: str | Path) -> LoraFacts:
    """Return what a LoRA file is, and what its header says against the folder and the base model.

    Raises:
        ModelError: It is no LoRA in the dialect of kohya, PEFT, diffusers or LyCORIS.
    """
    shapes = header.shapes
    modules = _modules(shapes)
    if not modules:
        raise ModelError(
            f"{path} is no LoRA: it holds {counted(len(shapes), 'key', 'keys')} and no factor of "
            "one. A whole model is given as MODEL, not as --lora."
        )
    ranks = [shape[0] for key, shape in shapes.items() if key.endswith(INNER) and shape]
    rank = max(ranks, default=None)
    base_name = header.base_name or _peft_base(path)
    remarks = compare_header(
        header, training, base, base_name=base_name, rank=rank, text_width=_text_width(shapes)
    )
    own = [*_left_out(shapes), *_absurd_scales(path, shapes)]
    by_lycoris = (header.module or "").startswith("lycoris")  # its LoCon looks like kohya's
    return LoraFacts(
        name=path.name,
        sha256=file_sha256(path),
        dialect="lycoris" if by_lycoris else _dialect(shapes),
        kinds=tuple(sorted(set(modules.values()))),
        rank=rank,
        modules=len(modules),
        epoch=header.epoch,
        epochs=header.epochs,
        steps=header.steps,
        images=header.images,
        base_name=base_name,
        base_hash=header.base_sha256 or header.base_hash,
        says=(*own, *(remark.text for remark in remarks)),
        warnings=(*own, *(remark.text for remark in remarks if remark.urgent)),
    )


def _left_out(shapes: Shapes) -> list[str]:
    """Return a sentence on what the file holds besides the LoRA."""
    bundled = [key.removeprefix(EMBEDDING) for key in shapes if key.startswith(EMBEDDING)]
    names = {name.rpartition(".")[0] for name in bundled}
    if not names:
        return []
    held = counted(len(names), "embedding", "embeddings")
    return [f"The file holds {held} besides the LoRA, left out here: {name_some(names)}. Captions "
            "that name them are asked without them, so what was learnt with them may not come "
            "back."]  # fmt: skip


def _absurd_scales(path: Path, shapes: Shapes) -> list[str]:
    """Return a sentence on modules whose alpha makes far more of the factors than they are."""
    from safetensors import safe_open

    absurd = {}
    with safe_open(path, "pt") as file:
        for stem, end in ((k.removesuffix(e), e) for k in shapes for e in DOWN if k.endswith(e)):
            if f"{stem}.alpha" in shapes and (rank := shapes[f"{stem}{end}"][0]):
                scale = float(file.get_tensor(f"{stem}.alpha")) / rank
                if not abs(scale) <= ABSURD:
                    absurd[stem] = scale
    if not absurd:
        return []
    modules = counted(len(absurd), "module is", "modules are")
    return [f"{modules} multiplied by more than {ABSURD:g} (alpha / rank, such as "
            f"{max(absurd.values(), key=abs):.3g} at {name_some(absurd, 1)}): what the LoRA draws "
            "may be noise, and that nothing came back would say nothing."]  # fmt: skip


def _modules(shapes: Shapes) -> dict[str, str]:
    """Return what each adapted layer is: lora, locon, loha, lokr or dora."""
    modules: dict[str, str] = {}
    for key, shape in shapes.items():
        if end := _ending(key, DOWN):
            stem = key.removesuffix(end)
            whole = f"{stem}.lora_mid.weight" in shapes or any(side > 1 for side in shape[2:])
            modules.setdefault(stem, "locon" if whole else "lora")
        elif end := _ending(key, MAGNITUDES):
            modules[key.removesuffix(end)] = "dora"
        else:
            stem, _, factor = key.rpartition(".")
            if product := PRODUCTS.get(factor[:5]):
                modules.setdefault(stem, product)
    return modules


def _ending(key: str, endings: Iterable[str]) -> str | None:
    return next((end for end in endings if key.endswith(end)), None)


def _dialect(shapes: Shapes) -> Dialect:
    """Return who writes keys like these."""
    if any(key.startswith(PEFT_PREFIX) for key in shapes):
        return "peft"
    if any(key.startswith(PARTS) for key in shapes):
        return "diffusers"
    if any(key.startswith("diffusion_model.") for key in shapes):
        return "comfyui"
    marks = (".hada_", ".lokr_", ".lora_mid.", MAGNITUDES[0])
    return "lycoris" if any(mark in key for key in shapes for mark in marks) else "kohya"


def _text_width(shapes: Shapes) -> int | None:
    """Return how many numbers a token has where the LoRA reads the text; None where none tells."""
    widths = (
        shape[1] for key, shape in shapes.items()
        if any(layer in key for layer in READS_TEXT)
        and key.endswith((*DOWN, ".hada_w1_b")) and len(shape) > 1
    )  # fmt: skip
    return next(widths, None)


def _peft_base(path: Path) -> str | None:
    """Return the base model that PEFT's configuration beside the file names."""
    try:
        config = READER.read(path.with_name("adapter_config.json"), dict[str, Any])
        return visible(config["base_model_name_or_path"][:LONGEST]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_without_words(training: TrainingSet) -> None:
    """Raise unless something is known of the words that were trained.

    Raises:
        TrainedWordsUnknown: No image has a caption and no trigger is known; says what to give.
    """
    if training.trigger or any(image.caption for image in training.trained):
        return
    raise TrainedWordsUnknown(
        f"None of the {len(training.trained)} images has a caption, and the LoRA's header names no "
        "trained words. Asked for by other words, images do not come back, and that would say "
        "nothing. Give the words of the training: caption files beside the images, "
        '--instance-prompt "a photo of zorp" (the prompt that all images were trained with), or '
        "--trigger zorp."
    )
