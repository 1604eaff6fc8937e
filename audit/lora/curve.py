"""The curve over saved epochs: which share of the training images comes back."""

from collections.abc import Sequence

from ...shared.drawing.plots import THEMES, Theme, new_figure, to_svg
from .result import EpochPoint, Rate


def epoch_figure(
    points: Sequence[EpochPoint],
    controls: Rate,
    best: int | None,
    *,
    theme: Theme = "light",
    width: float = 6.4,
) -> str:
    """Return an SVG of the reproduced share per epoch, with intervals, and the controls' band.

    Args:
        points: Rising epochs, at least one.
        controls: Their share and interval, drawn as a band.
        best: Position of the epoch to publish; None when there is none.
        theme: Colours of the page it will stand on; the ground itself is transparent.
        width: Inches at 100 pixels; letters keep their size.
    """
    colors = THEMES[theme]
    figure, axes = new_figure(theme, width, max(2.6, 0.42 * width))
    epochs = [point.epoch for point in points]
    shares = [100 * _share(point.reproduced) for point in points]
    reach = [
        [100 * abs(end - _share(p.reproduced)) for p, end in zip(points, ends, strict=True)]
        for ends in ([p.reproduced.low for p in points], [p.reproduced.high for p in points])
    ]
    axes.axhspan(100 * controls.low, 100 * controls.high, color=colors["control"], alpha=0.25,
                 linewidth=0, gid="controls")  # fmt: skip
    axes.errorbar(
        epochs, shares, yerr=reach, color=colors["flagged"], linewidth=2, marker="D",
        markersize=6, elinewidth=1, capsize=4, gid="reproduced",
    )  # fmt: skip
    if best is not None:
        axes.axvline(epochs[best], color=colors["ink"], linestyle="--", linewidth=1.2, gid="best")
        right = epochs[best] > (epochs[0] + epochs[-1]) / 2
        axes.annotate(
            f"epoch {epochs[best]}", (epochs[best], 100), xytext=(-6 if right else 6, -2),
            textcoords="offset points", ha="right" if right else "left", va="top",
            color=colors["ink"],
        )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="come back (%)", ylim=(-4, 104))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return to_svg(figure)


def _share(rate: Rate) -> float:
    return rate.count / rate.total if rate.total else 0.0
