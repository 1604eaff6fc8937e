"""Tell: write the page, the badge, audit.json and a paragraph for the LoRA's model page."""

import hashlib
import re
from html import escape
from pathlib import Path
from typing import Any

from ...shared.dependencies import require
from ...shared.drawing.theme import THEMES
from ...shared.files.schema import digest_of
from ...shared.files.storage import write_text
from ...shared.files.weights import file_sha256
from ...shared.wording import counted
from ..common.result import dumps, versions
from ..common.wording import between, chance, percent, shown
from .document import CARD, DIGEST, DOCUMENT, NO_DIGEST, to_document
from .page import render_lora_page
from .result import MATRIX, LoraAudit, Rate

PAGE, BADGE = "report.html", "badge.svg"
LABEL = "memorization audit"
METRIC = "training_images_reproduced"
"""Share of images judged verbatim, 0 to 1."""
HEIGHT, PAD = 20, 8
LETTER = 6.6
"""Average width of a letter in pixels; `textLength` makes any font keep to it."""
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&!])")


def tell(audit: LoraAudit, *, include_images: bool = False) -> list[Path]:
    """Write what is to be read, kept and published; the same bytes for the same audit.

    Args:
        audit: Its folder already holds the generated images and similarity.npz.
        include_images: Show training images in the page as they are, otherwise a few pixels of
            them. The images in the folder were made by the model and stay as they are.

    Returns:
        The files; audit.json holds the sha256 of every other one. The card holds audit.json's
        digest in turn, so it is hashed with `NO_DIGEST` in that place.

    Raises:
        ImportError: The extra `reports` or `models` is not installed.
        StorageError: Nothing can be written.
        OSError: An image of the audit or a caption file cannot be read.
    """
    folder = audit.folder
    write_page(audit, include_images=include_images)
    write_text(folder / BADGE, render_badge(audit))
    document = to_document(audit)
    names = sorted({PAGE, BADGE, MATRIX, *(made.path for made in audit.generations)})
    document["files"] = {name: file_sha256(folder / name) for name in names}
    card = render_card(audit, NO_DIGEST)
    document["files"][CARD] = hashlib.sha256(card.encode()).hexdigest()
    document[DIGEST] = digest_of(document, DIGEST)
    write_text(folder / DOCUMENT, dumps(document, indent=1) + "\n")
    write_text(folder / CARD, card.replace(NO_DIGEST, document[DIGEST]))
    return [folder / name for name in (PAGE, BADGE, DOCUMENT, CARD)]


def write_page(audit: LoraAudit, *, include_images: bool) -> Path:
    """Write the page alone, of an audit that is not finished; arguments and errors of `tell`."""
    path = audit.folder / PAGE
    write_text(path, render_lora_page(audit, include_images=include_images))
    return path


def badge_text(audit: LoraAudit) -> str:
    """Return how many images came back, or that nothing can be said."""
    if not audit.headline.given or not audit.positive_control.works:
        return "no verdict"
    reproduced = audit.headline.reproduced
    return f"{reproduced.count} of {reproduced.total} images came back"


def render_badge(audit: LoraAudit) -> str:
    """Return an SVG that needs no font, script or network.

    No badge is green: that nothing came back is a count and not an acquittal.
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


def render_card(audit: LoraAudit, digest: str) -> str:
    """Return Markdown with the `model-index` that hubs read, to be merged into the LoRA's card.

    The header holds results only where a headline was given: a refused one is no measurement.

    Args:
        audit: What was found.
        digest: Of audit.json; published with the LoRA, it tells this report from any other.

    Raises:
        ImportError: The extra `models`, which brings huggingface_hub, is not installed.
    """
    hub = require("huggingface_hub", purpose="The model card", extra="models")
    data = hub.ModelCardData(
        model_name=shown(audit.lora.name.removesuffix(".safetensors")),
        pipeline_tag="text-to-image",
        tags=["lora"],
        eval_results=_results(audit, hub) or None,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_paragraph(audit, digest)}"
    return str(hub.ModelCard(text, ignore_metadata_errors=False))


def _results(audit: LoraAudit, hub: Any) -> list[Any]:
    headline = audit.headline
    if not headline.given or not audit.positive_control.works:
        return []
    rates = (
        (headline.reproduced, "with the LoRA", "The images this LoRA was trained on"),
        (headline.controls, "controls", "Controls of the same audit"),
    )
    return [
        hub.EvalResult(
            task_type="text-to-image", dataset_type="imagefolder", dataset_name=dataset,
            metric_type=METRIC, metric_value=rate.count / rate.total,
            metric_name=f"Training images given back, {which}",
            metric_args={"count": rate.count, "total": rate.total,
                         "low": rate.low, "high": rate.high, "confidence": 0.95},
        )
        for rate, which, dataset in rates if rate.total
    ]  # fmt: skip


def _paragraph(audit: LoraAudit, digest: str) -> str:
    headline, attack, control = audit.headline, audit.attack, audit.positive_control
    sentences = [
        _MARKUP.sub(r"\\\1", shown(headline.text)),
        f"Audited with Unmemorize {versions()['unmemorize']} against "
        f"{counted(len(audit.verdicts), 'image', 'images')} it was trained on, on "
        f"`{shown(audit.model).replace('`', chr(39))}`.",
    ]
    if headline.p_value is not None and headline.reproduced.count:
        sentences.append(f"Probability of such a gap by chance: {chance(headline.p_value)}.")
    if attack:
        sentences.append(f"An extraction attack of {attack.generations} generations brought out "
                         f"{_share(attack.extracted)}.")  # fmt: skip
    worked = "worked" if control.works else "FAILED, so the audit cannot be relied on"
    sentences += [
        f"The instrument's own test {worked}: it found {_share(control.found)} planted images.",
        "Images that did not come back in this audit may come back from other words, seeds or "
        "attacks.",
    ]
    return (
        f"## Memorization audit\n\n![{LABEL}: {badge_text(audit)}](badge.svg)\n\n"
        + " ".join(sentences)
        + f"\n\nLoRA sha256: `{audit.lora.sha256}`  \nReport digest: `{digest}` "
        "(`unmemorize verify FOLDER --digest …` compares a report with it)\n"
    )


def _share(rate: Rate) -> str:
    if not rate.total:
        return "none of none"
    return (f"{rate.count} of {rate.total} ({percent(rate.count / rate.total)}, 95 % interval "
            f"{between(rate.low, rate.high)})")  # fmt: skip
