"""The contact sheet of a folder: which images show a concept, the strongest first."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.pages import Embedder, render_page

if TYPE_CHECKING:
    from .finding import Finding, FoundImage

SHOWN, OTHERS = 200, 24
"""Tiles of images that show the concept, and of those nearest below the line, at most."""


def render_find(finding: "Finding", folder: Path) -> str:
    """Return the page as HTML, the same text for the same finding.

    Args:
        finding: What was found.
        folder: Of the images.

    Raises:
        ImportError: The extra `reports` is not installed.
    """
    embed = Embedder(folder)

    def tile(image: "FoundImage") -> dict[str, Any]:
        name = image.path.relative_to(folder).as_posix()
        return {"uri": embed(name), "name": name, "gain": f"{image.gain:+.4f}",
                "caption": image.caption, "named": image.named}  # fmt: skip

    below = [image for image in finding.images if not image.shown]
    numbers = finding.concept.account["numbers"]
    return render_page(
        "concept_find.html.j2",
        finding=finding,
        numbers=numbers,
        made=finding.concept.account["made"],
        shown_images=[tile(image) for image in finding.shown[:SHOWN]],
        more=max(0, len(finding.shown) - SHOWN),
        others=[tile(image) for image in below[:OTHERS]],
        rest=max(0, len(below) - OTHERS),
        line=f"{finding.line:+.4f}",
        unnamed=sum(not image.named for image in finding.shown),
    )
