"""The images in the page: small copies, training images only where their owner wants them; curves.

Without the owner's leave, training images are reduced to `BLURRED` pixels before they are enlarged
again: the detail is not hidden but gone. The same holds for generations that are as near to a
training image as only copies are, since they show it too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...shared.drawing.chart import Axis, Chart, round_ticks
from ...shared.drawing.score_charts import LETTERS
from ...shared.drawing.theme import Theme
from ...shared.files.images import read_frames, read_image
from ..common.pages import image_uri
from .result import EpochPoint, LoraAudit, Rate

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE, SMALL = 320, 144
"""Longer side in pixels: of images to compare, and of images that only help to find them."""
SHOWN = 4
"""Frames of a clip that are shown side by side."""
BLURRED = 8
"""Pixels of the longer side that are left of an image that is not to be shown."""


class Thumbnails:
    """Images of an audit as data URIs; None where a file cannot be read."""

    def __init__(self, audit: LoraAudit, *, include_images: bool):
        self._audit, self._include = audit, include_images
        self._positions = {g.path: n for n, g in enumerate(audit.generations)}

    def training(self, index: int, side: int = SMALL) -> str | None:
        """Return a training image by position."""
        training = self._audit.training
        path = training.path_of(training.images[index])
        return self._uri(path, side, blurred=not self._include)

    def generation(self, index: int, side: int = SMALL) -> str | None:
        """Return a generation by position."""
        path = self._audit.folder / self._audit.generations[index].path
        return self._uri(path, side, blurred=self.blurs(index))

    def blurs(self, index: int) -> bool:
        """Return whether a generation is shown blurred."""
        unknown = not self._audit.thresholds.enough
        return not self._include and (unknown or self._audit.generations[index].mark != "")

    def member(self, path: str) -> str | None:
        """Return a generation by its path."""
        return self.generation(self._positions[path])

    def _uri(self, path: Path, side: int, *, blurred: bool) -> str | None:
        try:
            frames = read_frames(path, SHOWN) if self._audit.video else [read_image(path)]
        except ValueError:
            return None
        each = side if len(frames) == 1 else side // 2
        return image_uri(_sheet([_small(f, each, blurred=blurred) for f in frames]), quality=85)


def _small(image: "Image", side: int, *, blurred: bool) -> "Image":
    from PIL.Image import Resampling

    if blurred:
        return _blur(image, side)
    image.thumbnail((side, side), Resampling.LANCZOS)
    return image


def _sheet(frames: "Sequence[Image]") -> "Image":
    """Return frames of one size two in a row, in the order of reading; one alone as it is."""
    from PIL import Image

    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    sheet = Image.new("RGB", (2 * width, height * -(-len(frames) // 2)))
    for place, frame in enumerate(frames):
        sheet.paste(frame, (place % 2 * width, place // 2 * height))
    return sheet


def _blur(image: "Image", side: int) -> "Image":
    """Return what is left of an image after `BLURRED` pixels, enlarged softly."""
    from PIL.Image import Resampling

    longer = max(image.size)
    few, many = (
        tuple(max(round(pixels * length / longer), 1) for length in image.size)
        for pixels in (BLURRED, side)
    )
    return image.resize(few, Resampling.BOX).resize(many, Resampling.BICUBIC)


def epoch_chart(
    points: Sequence[EpochPoint],
    controls: Rate,
    best: int | None,
    *,
    theme: Theme = "light",
    width: int = 1760,
) -> "Image":
    """Return the reproduced share per epoch, with intervals, and the controls' band.

    Args:
        points: Rising epochs, at least one.
        controls: Their share and interval, drawn as a band.
        best: Position of the epoch to publish; None when there is none.
        theme: Colours.
        width: Pixels.
    """
    epochs = [float(point.epoch) for point in points]
    margin = 0.04 * (epochs[-1] - epochs[0]) or 1.0
    x = Axis(label="epoch", low=epochs[0] - margin, high=epochs[-1] + margin,
             ticks=round_ticks(epochs[0], epochs[-1], 10, whole=True))  # fmt: skip
    y = Axis(label="come back (%)", low=-4, high=111, ticks=round_ticks(0, 100, 5))
    height = max(640, round(0.42 * width))
    chart = Chart(x, y, width=width, height=height, size=LETTERS, theme=theme)
    chart.band(100 * controls.low, 100 * controls.high, "control", until=x.high, opacity=0.25)
    if best is not None:
        chart.upright(epochs[best], f"epoch {points[best].epoch}")
    shares = []
    for epoch, point in zip(epochs, points, strict=True):
        rate = point.reproduced
        chart.error_bar(epoch, 100 * rate.low, 100 * rate.high, "flagged")
        shares.append((epoch, 100 * rate.count / rate.total if rate.total else 0.0))
    chart.line(shares, "flagged")
    chart.dots(shares, "flagged", shape="diamond")
    return chart.image()
