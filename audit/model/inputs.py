"""What an audit looks at: its prompts, what is known about them, and its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import demo
from ...shared.files.prompts import Prompt, PromptSet, clean, read_prompts
from ...shared.score.controls import CONTROLS, load_controls
from .config import AuditConfig


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
    is_demo = config.model in demo.BUNDLED
    prompts = read_named(config.prompts, texts, is_demo=is_demo, groups=groups)
    known = {caption.text: caption.group for caption in demo.captions()} if is_demo else {}
    name, controls = "", ()
    if config.calibration is None:
        name, controls = read_controls(config.controls, is_demo=is_demo)
    return Inputs(
        prompts=prompts, groups=tuple(known.get(text) for text in prompts.prompts),
        controls_name=name, controls=controls,
    )  # fmt: skip


def read_named(
    files: Sequence[Path],
    texts: Sequence[str],
    *,
    is_demo: bool,
    groups: Mapping[str, int] | None = None,
) -> PromptSet:
    """Return prompts from the command line and from files; none for the demo means its own.

    Raises:
        ValueError: There are none.
        PromptError: A file is missing, of another kind, or holds no prompts.
    """
    prompts = [Prompt(text=text, source="command line") for text in texts]
    prompts += [prompt for path in files for prompt in read_prompts(path)]
    if not prompts and is_demo:
        prompts = _demo_prompts(groups)
    distinct = clean(prompts)
    if not distinct.prompts:
        raise ValueError(
            "No prompts were named. Give the captions that the model was trained on: "
            "--prompts FILE (.txt, .csv, .jsonl, .parquet) or --prompts TRAINING_FOLDER."
        )
    return distinct


def _demo_prompts(groups: Mapping[str, int] | None) -> list[Prompt]:
    """Return captions an audit of the demo looks at: all, or the first so many of each group."""
    captions = demo.audited()
    if groups is not None:
        captions = [caption for group, count in groups.items()
                    for caption in [c for c in captions if c.group == group][:count]]  # fmt: skip
    return [Prompt(text=caption.text, source="demo") for caption in captions]


def read_controls(name: str, *, is_demo: bool) -> tuple[str, tuple[str, ...]]:
    """Return the name and the prompts of the controls.

    Args:
        name: Of a bundled list, `demo`, or a file; empty for the demo's own or photographs.
        is_demo: The model is a bundled one.
    """
    name = name or (demo.NAME if is_demo else CONTROLS[0])
    if name == demo.NAME:
        return name, tuple(demo.controls())
    if name in CONTROLS:
        return name, tuple(load_controls(name))
    return Path(name).name, clean(read_prompts(Path(name))).prompts
