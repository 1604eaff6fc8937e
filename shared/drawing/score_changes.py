"""What a LoRA does to the scores of its training captions, next to ordinary prompts, as a table."""

from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from ..wording import counted, visible
from .theme import THEMES, Theme
from .typeset import fitting, write

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, LINE, LETTERS, TITLE, PAD = 640, 34, 20, 26, 10
OFF, ON, CHANGE = 430, 520, 620
"""Right ends of the columns of numbers, pixels."""
TEXT = 350
"""Right end of the captions and of the bars behind them, pixels."""
LISTED = 12
"""At most so many captions are drawn, greatest increase first."""


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """The score of one prompt without and with a LoRA."""

    prompt: str
    off: float
    """L2 norm, latent units, mean over seeds and steps."""
    on: float

    @property
    def increase(self) -> float:
        """Return by how much the LoRA raises the score (L2 norm, latent units)."""
        return self.on - self.off


@dataclass(frozen=True, kw_only=True)
class LoraScores:
    """Scores of captions and of ordinary prompts, without and with a LoRA."""

    captions: tuple[ScoreChange, ...]
    """Greatest increase first."""
    controls: tuple[ScoreChange, ...]
    """Of ordinary prompts, which show what the LoRA does to every prompt; may be empty."""

    @classmethod
    def of(
        cls, prompts: list[str], off: list[float], on: list[float], captions: int
    ) -> "LoraScores":
        """Sort scores of which the first `captions` are of captions, the others of controls."""
        changes = [
            ScoreChange(prompt=prompt, off=before, on=after)
            for prompt, before, after in zip(prompts, off, on, strict=True)
        ]
        ranked = sorted(changes[:captions], key=lambda change: -change.increase)
        return cls(captions=tuple(ranked), controls=tuple(changes[captions:]))

    @property
    def mean_increase(self) -> float:
        """Return the mean over the captions (L2 norm, latent units)."""
        return mean(change.increase for change in self.captions)

    @property
    def mean_control_increase(self) -> float | None:
        """Return the mean over the ordinary prompts, None when there are none."""
        return mean(c.increase for c in self.controls) if self.controls else None

    def __str__(self) -> str:
        """Return the result in words, a line per caption at the end."""
        lines = [f"The LoRA raises the scores of its captions by {self.mean_increase:+.3g} (mean)."]
        if self.controls:
            greatest = max(change.increase for change in self.controls)
            above = sum(change.increase > greatest for change in self.captions)
            lines.append(
                f"{counted(len(self.controls), 'ordinary prompt', 'ordinary prompts')}: "
                f"{self.mean_control_increase:+.3g} (mean), {greatest:+.3g} at most; {above} of "
                f"{counted(len(self.captions), 'caption lies', 'captions lie')} above that."
            )
        lines += [
            f"{change.increase:+.3g}: {change.off:.3g} to {change.on:.3g}, {change.prompt}"
            for change in self.captions
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "mean_increase": self.mean_increase,
            "mean_control_increase": self.mean_control_increase,
            "captions": [asdict(c) | {"increase": c.increase} for c in self.captions],
            "controls": [asdict(c) | {"increase": c.increase} for c in self.controls],
        }


def draw_score_changes(scores: LoraScores, *, theme: Theme = "dark") -> "Image":
    """Return the table as an RGB image, `WIDTH` pixels wide."""
    from PIL import Image, ImageDraw

    colors, shown = THEMES[theme], scores.captions[:LISTED]
    more = len(scores.captions) - len(shown)
    notes = [f"and {counted(more, 'more caption', 'more captions')}"] if more else []
    if scores.controls:
        mean = f"{scores.mean_control_increase:+.3g}"
        prompts = counted(len(scores.controls), "ordinary prompt", "ordinary prompts")
        notes.append(f"{prompts}: {mean} in the mean")
    height = LINE * (len(shown) + len(notes) + 2) + 3 * LETTERS
    image = Image.new("RGB", (WIDTH, height), colors["page"])
    draw = ImageDraw.Draw(image)
    title = f"With the LoRA: {scores.mean_increase:+.3g} in the mean"
    write(draw, (LETTERS, 2 * LETTERS), title, size=TITLE, fill=colors["ink"])
    base = 2 * LETTERS + LINE + 6
    greatest = max((abs(change.increase) for change in shown), default=0.0) or 1.0
    _write_row(draw, base, "caption", ("off", "on", "change"), colors["muted"])
    for change in shown:
        base += LINE
        length = (TEXT - PAD) * max(0.0, change.increase) / greatest
        bar = [PAD, base - 24, PAD + length, base + 8]
        draw.rounded_rectangle(bar, 4, fill=colors["strong"])
        numbers = (f"{change.off:.2f}", f"{change.on:.2f}", f"{change.increase:+.2f}")
        _write_row(draw, base, visible(change.prompt), numbers, colors["ink"])
    for note in notes:
        base += LINE
        write(draw, (LETTERS, base), note, size=LETTERS, fill=colors["muted"])
    return image


def _write_row(draw: Any, base: int, text: str, numbers: tuple[str, str, str], fill: str) -> None:
    """Write the cells of one line."""
    fitted = fitting(text, LETTERS, TEXT - LETTERS - PAD)
    write(draw, (LETTERS, base), fitted, size=LETTERS, fill=fill)
    for right, number in zip((OFF, ON, CHANGE), numbers, strict=True):
        write(draw, (right, base), number, size=LETTERS, fill=fill, anchor="right")
