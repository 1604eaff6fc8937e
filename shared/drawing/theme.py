"""The colours that all charts share, by role, for light and dark pages.

Letters in `ink`, `muted` and `flagged` reach WCAG's contrast of 4.5 on the page, and `ink` does on
every mixture of `strong`; marks in `other` and `control` reach 3.
"""

from typing import Literal

Theme = Literal["light", "dark"]
THEMES: dict[Theme, dict[str, str]] = {
    "light": {
        "page": "#ffffff", "ink": "#1d1f21", "muted": "#5b6066", "line": "#d9d6d0",
        "strong": "#f0893a", "flagged": "#b8450c", "other": "#4f7fa8", "control": "#8b9096",
    },
    "dark": {
        "page": "#1d2024", "ink": "#f4f1ec", "muted": "#a9aeb5", "line": "#3a3f46",
        "strong": "#a04a08", "flagged": "#ff9a5c", "other": "#7fb2dc", "control": "#858b93",
    },
}  # fmt: skip
"""`strong` is the background of the most significant word."""


def mixed(theme: Theme, role: str, part: int | float) -> str:
    """Return a colour laid over the page with this opacity, #rrggbb: 0 is the page itself."""
    page, color = (
        [int(THEMES[theme][name][i : i + 2], 16) for i in (1, 3, 5)] for name in ("page", role)
    )
    channels = (round(a + (b - a) * part) for a, b in zip(page, color, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in channels)
