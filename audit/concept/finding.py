"""What was found in a folder: its images with their gains, and the sentences about them."""

from dataclasses import dataclass
from pathlib import Path

from ...shared.training.concept.adapter import ConceptAdapter
from ...shared.wording import counted, name_some

LIST = "shown.txt"
"""The images that show the concept, one a line, as trainers take them."""


@dataclass(frozen=True, kw_only=True)
class FoundImage:
    """One image of the folder."""

    path: Path
    caption: str
    gain: float
    """By how much the adapter lowers its loss."""
    shown: bool
    """Whether it shows the concept: its gain is above the line."""
    named: bool
    """Whether its caption names the concept."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Which images show the concept, the largest gain first."""

    images: tuple[FoundImage, ...]
    concept: ConceptAdapter
    file: str
    """Name of the concept's file."""
    model: str
    line: float
    """Gain above which an image shows the concept."""
    controls: tuple[float, ...]
    """Gains of images that lack it."""
    own_controls: bool
    """Whether they are the user's, and not those of the concept's file."""
    folder: Path
    """Where the results stand."""

    @property
    def shown(self) -> tuple[FoundImage, ...]:
        """The images that show the concept."""
        return tuple(image for image in self.images if image.shown)

    @property
    def called(self) -> str:
        """How sentences call the concept."""
        return " / ".join(self.concept.names) or f"the concept of {self.file}"

    @property
    def headline(self) -> str:
        """Say what was found, or what was looked for."""
        total, numbers = (
            counted(len(self.images), "image", "images"),
            self.concept.account["numbers"],
        )
        if self.shown:
            show = "shows" if len(self.shown) == 1 else "show"
            return f"{len(self.shown)} of {total} {show} {self.called}"
        best = self.images[0]
        return (
            f"None of {total} shows {self.called}. Looked for: images whose loss the adapter in "
            f"{self.file} lowers by more than {self.line:.4f}, as it does for "
            f"{numbers['recall']:.0%} of the concept's own images. Nearest: {best.path.name} with "
            f"{best.gain:.4f}"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader should know beside the headline."""
        whose = "your controls" if self.own_controls else "controls of the concept's file"
        above = sum(gain > self.line for gain in self.controls)
        by_chance = len(self.images) * (above + 1) / (len(self.controls) + 1)
        lines = [
            f"The line {self.line:.4f} lies far above what is usual for {len(self.controls)} "
            f"{whose}, images without the concept: {above} of them lie above it. About "
            f"{by_chance:.1f} of {len(self.images)} images may do so by chance, if they resemble "
            "the controls."
        ]
        if not self.own_controls:
            lines.append(
                "Controls that resemble the folder make the line surer: name a folder of images "
                "that lack the concept with --controls."
            )
        unnamed = [image for image in self.shown if not image.named]
        if self.concept.names and unnamed:
            have = "has a caption that does" if len(unnamed) == 1 else "have captions that do"
            lines.append(f"{len(unnamed)} of those that show it {have} not name it.")
        if hidden := [image.path.name for image in self.images if image.named and not image.shown]:
            image = counted(len(hidden), "image is", "images are")
            lines.append(
                f"{image} below the line although the caption names the concept: "
                f"{name_some(hidden, 3)}. Look at them; add lines to {LIST} where they show it."
            )
        return tuple(lines)
