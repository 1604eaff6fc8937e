"""The page of a concept audit: what each way of asking brings, with the LoRA and without."""

from typing import Any

from ..common.pages import Embedder, render_page
from .appearance import TITLES, Appearance, Asked, Drawn

TILES = 16
"""Images of a row, at most: those that show the concept first."""


def render_check(result: Appearance) -> str:
    """Return the page as HTML, the same text for the same result and images.

    Raises:
        ImportError: The extra `reports` is not installed.
    """
    embed = Embedder(result.folder)

    def tiles(images: tuple[Drawn, ...]) -> list[dict[str, Any]]:
        ordered = sorted(images, key=lambda image: -image.gain)[:TILES]
        return [{"uri": embed(image.path), "gain": f"{image.gain:+.4f}", "prompt": image.prompt,
                 "shown": image.shown, "seed": image.seed} for image in ordered]  # fmt: skip

    def row(each: Asked) -> dict[str, Any]:
        low, high = each.interval
        return {
            "title": TITLES[each.way], "on": each.counts[0], "off": each.counts[1],
            "n": len(each.on), "low": low, "high": high, "p": each.p_value,
            "appears": each.appears and result.can_judge, "tiles_on": tiles(each.on),
            "tiles_off": tiles(each.off), "example": each.on[0].prompt,
        }  # fmt: skip

    return render_page(
        "concept_check.html.j2",
        result=result,
        rows=[row(each) for each in result.asked],
        positive=tiles(result.positive),
        line=f"{result.line:+.4f}",
        made=result.concept.account["made"],
    )
