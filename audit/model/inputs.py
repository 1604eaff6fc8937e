"""What an audit looks at: its prompts, what is known about them, and its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import demo
from ...shared.files.prompts import Prompt, PromptSet, clean, read_prompts
from ...shared.score.controls import load_controls
from .config import AuditConfig

BUNDLED_CONTROLS = ("photographs", "art")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything read from files before the model is touched."""

    prompts: PromptSet
    groups: tuple[str | None, ...]
    """Known truth per prompt; None where nobody knows."""
    controls_name: str
    controls: tuple[str, ...]
    """Ordinary prompts; empty when a finished calibration is given."""


def read_inputs(
    config: AuditConfig, texts: Sequence[str] = (), groups: Mapping[str, int] | None = None
) -> Inputs:
    """Read prompts and controls, and refuse what cannot be used.

    Args:
        config: Names the files.
        texts: Prompts besides those in files.
        groups: Of the demo, where no prompts are named: how many captions of each group; None
            takes all that an audit looks at.

    Raises:
        PromptError: A file is missing, of another kind, or holds no prompts.
        ValueError: No prompts were named for a model of the user's own.
    """
    prompts = read_named(config.prompts, texts, demo=config.model == demo.NAME, groups=groups)
    known = _demo_groups() if config.model == demo.NAME else {}
    name = config.controls or (demo.NAME if config.model == demo.NAME else BUNDLED_CONTROLS[0])
    return Inputs(
        prompts=prompts,
        groups=tuple(known.get(text) for text in prompts.prompts),
        controls_name=name if name in (demo.NAME, *BUNDLED_CONTROLS) else Path(name).name,
        controls=() if config.calibration else tuple(read_controls(name)),
    )


def read_named(
    files: Sequence[Path],
    texts: Sequence[str],
    *,
    demo: bool,
    groups: Mapping[str, int] | None = None,
) -> PromptSet:
    """Return prompts from the command line and from files; none for the demo means its own.

    Raises:
        ValueError: There are none.
        PromptError: A file is missing, of another kind, or holds no prompts.
    """
    prompts = [Prompt(text=text, source="command line") for text in texts]
    prompts += [prompt for path in files for prompt in read_prompts(path)]
    if not prompts and demo:
        prompts = demo_prompts(groups)
    found = clean(prompts)
    if not found.prompts:
        raise ValueError(
            "No prompts were named. Give the captions that the model was trained on: "
            "--prompts FILE (.txt, .csv, .jsonl, .parquet) or --prompts TRAINING_FOLDER."
        )
    return found


def read_controls(name: str) -> Sequence[str]:
    """Return control prompts: a bundled list, the demo's own, or those of a file."""
    if name == demo.NAME:
        return demo.controls()
    if name in BUNDLED_CONTROLS:
        return load_controls(name)
    return clean(read_prompts(Path(name))).prompts


def demo_prompts(groups: Mapping[str, int] | None = None) -> list[Prompt]:
    """Return captions an audit of the demo looks at: all, or the first so many of each group."""
    captions = demo.audited()
    if groups is not None:
        captions = [caption for group, count in groups.items()
                    for caption in [c for c in captions if c.group == group][:count]]  # fmt: skip
    return [Prompt(text=caption.text, source="demo") for caption in captions]


def _demo_groups() -> dict[str, str]:

    return {caption.text: caption.group for caption in demo.captions()}
