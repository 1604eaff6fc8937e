"""What an audit looks at: its prompts, what is known about them, and its controls."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..shared.controls import load_controls
from ..shared.prompts import Prompt, PromptSet, clean, read_prompts
from .config import DEMO, AuditConfig

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


def read_inputs(config: AuditConfig) -> Inputs:
    """Read prompts and controls, and refuse what cannot be used.

    Raises:
        PromptError: A file is missing, of another kind, or holds no prompts.
        ValueError: No prompts were named for a model of the user's own.
    """
    if not config.prompts and config.model != DEMO:
        raise ValueError(
            "No prompts were named. Give the captions that the model was trained on: "
            "--prompts FILE (.txt, .csv, .jsonl, .parquet) or --prompts TRAINING_FOLDER."
        )
    if config.prompts:
        prompts = clean(prompt for path in config.prompts for prompt in read_prompts(path))
        groups = _demo_groups() if config.model == DEMO else {}
    else:
        groups = _demo_groups()
        prompts = clean(demo_prompts())
    name = config.controls or (DEMO if config.model == DEMO else BUNDLED_CONTROLS[0])
    return Inputs(
        prompts=prompts,
        groups=tuple(groups.get(text) for text in prompts.prompts),
        controls_name=name if name in (DEMO, *BUNDLED_CONTROLS) else Path(name).name,
        controls=() if config.calibration else tuple(read_controls(name)),
    )


def read_controls(name: str) -> Sequence[str]:
    """Return control prompts: a bundled list, the demo's held-out captions, or those of a file."""
    if name == DEMO:
        from .. import demo

        return demo.controls()
    if name in BUNDLED_CONTROLS:
        return load_controls(name)
    return clean(read_prompts(Path(name))).prompts


def demo_prompts() -> list[Prompt]:
    """Return the captions an audit of the demo looks at."""
    from .. import demo

    return [Prompt(text=caption.text, source="demo") for caption in demo.audited()]


def _demo_groups() -> dict[str, str]:
    from .. import demo

    return {caption.text: caption.group for caption in demo.captions()}
