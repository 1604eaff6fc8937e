"""A small picture for a model page that says what was counted, never that a LoRA is harmless."""

from html import escape

from ...shared.drawing.plots import THEMES
from .result import LoraAudit

LABEL = "memorization audit"
HEIGHT, PAD = 20, 8
LETTER = 6.6
"""Pixels of a letter on average; `textLength` makes any font keep to it."""


def badge_text(audit: LoraAudit) -> str:
    """Return what was counted, or that nothing can be said."""
    if not audit.headline.given or not audit.positive_control.works:
        return "no verdict"
    reproduced = audit.headline.reproduced
    return f"{reproduced.count} of {reproduced.total} images came back"


def render_badge(audit: LoraAudit) -> str:
    """Return an SVG that needs no font, script or network.

    There is no green one: that nothing came back is a count, not an acquittal.
    """
    text = badge_text(audit)
    back = audit.headline.given and audit.headline.reproduced.count > 0
    color = THEMES["light"]["flagged" if back else "other"]
    left, right = (round(LETTER * len(words)) for words in (LABEL, text))
    middle = left + 2 * PAD
    width = middle + right + 2 * PAD
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" role="img" \
aria-label="{escape(LABEL)}: {escape(text)}">
<title>{escape(LABEL)}: {escape(text)}</title>
<clipPath id="r"><rect width="{width}" height="{HEIGHT}" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{middle}" height="{HEIGHT}" fill="#3b3f45"/>\
<rect x="{middle}" width="{width - middle}" height="{HEIGHT}" fill="{color}"/></g>
<g fill="#fff" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" aria-hidden="true">
<text x="{PAD}" y="14" textLength="{left}">{escape(LABEL)}</text>
<text x="{middle + PAD}" y="14" textLength="{right}">{escape(text)}</text>
</g>
</svg>
"""
