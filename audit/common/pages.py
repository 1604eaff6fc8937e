"""Pages that need nothing else: one file, everything escaped, nothing foreign runs in it."""

import base64
import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...shared.dependencies import require
from ...shared.drawing.theme import Theme
from ...shared.files.images import read_image
from .wording import between, chance, number, percent, shown

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
FOLD = 240
"""Characters of a prompt that are shown before it folds."""
LONGEST = 100_000
"""Characters of a prompt that are shown when it is unfolded."""
SIDE = 384
"""Pixels of the longer side of an embedded image, at most."""


def render_page(template: str, *, script: str = "", style: str = "", **values: Any) -> str:
    """Return a page as HTML, the same text for the same values.

    Args:
        template: File in `templates`; it escapes everything that is not marked safe.
        script: File in `templates` that the page runs, the only one a browser lets it run.
        style: Further rules, besides those all pages share.
        values: For the template.

    Raises:
        ImportError: The extra `reports` is not installed.
    """
    jinja2 = require("jinja2", purpose="The report", extra="reports")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown, "number": number, "percent": percent, "between": between, "chance": chance
    }  # fmt: skip
    environment.globals |= {"fold": FOLD, "longest": LONGEST}
    css = (TEMPLATES / "report.css").read_text("utf-8") + style
    js = (TEMPLATES / script).read_text("utf-8") if script else ""
    return environment.get_template(template).render(
        css=safe(css),
        js=safe(js),
        # The browser runs and applies nothing but these two texts, whatever a prompt contains.
        css_hash=_source_hash(css),
        js_hash=_source_hash(js),
        **values,
    )


def safe(markup: str) -> Any:
    """Return markup of our own making, which templates must not escape."""
    return require("markupsafe", purpose="The report", extra="reports").Markup(markup)


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Embedder:
    """Images of one folder as data URIs, each read once."""

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        self._uris: dict[str, str | None] = {}

    def __call__(self, name: str | None) -> str | None:
        """Return the image as a data URI, None when there is none of that name in the folder."""
        if name is None:
            return None
        if name not in self._uris:
            self._uris[name] = self._read(name)
        return self._uris[name]

    def _read(self, name: str) -> str | None:
        from PIL.Image import Resampling

        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder):
            return None
        try:
            image = read_image(path)
        except ValueError:  # missing or damaged: the page says so
            return None
        image.thumbnail((SIDE, SIDE), Resampling.LANCZOS)
        return image_uri(image, quality=88)


def embedded_chart(
    draw: Callable[[Theme, int], "Image"], *, desk: int, phone: int | None = None
) -> dict[str, Any]:
    """Return a chart for light and dark, as the templates' macro `chart` shows it.

    Args:
        draw: Called with the theme and a width in pixels; shown at half of that, for sharp letters
            on dense screens.
        desk: Width on wide screens.
        phone: Width on narrow ones, where it is another.
    """

    def uri(theme: Theme, width: int) -> str:
        return image_uri(draw(theme, width), lossless=True)

    narrow, dark = "(max-width: 40rem)", "screen and (prefers-color-scheme: dark)"
    sources = [{"media": dark, "uri": uri("dark", desk)}]
    if phone:  # a browser takes the first that fits
        sources = [
            {"media": f"{dark} and {narrow}", "uri": uri("dark", phone)},
            {"media": narrow, "uri": uri("light", phone)},
            *sources,
        ]
    return {"uri": uri("light", desk), "width": desk // 2, "sources": sources}


def image_uri(image: "Image", **options: Any) -> str:
    """Return an image as a data URI of WebP, with Pillow's options for the format."""
    stream = BytesIO()
    image.save(stream, "webp", **options)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
