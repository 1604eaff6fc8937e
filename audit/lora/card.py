"""A paragraph for the model's page, with the `model-index` that hubs read."""

import re
from typing import Any

from ...shared.dependencies import require
from ...shared.wording import counted
from ..common.wording import between, chance, percent, shown
from ..model.summary import versions
from .badge import LABEL, badge_text
from .result import LoraAudit, Rate

METRIC = "training_images_reproduced"
"""Share of images judged verbatim, 0 to 1."""
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&!])")


def render_card(audit: LoraAudit, digest: str) -> str:
    """Return Markdown with a YAML header, to be merged into the card of the LoRA.

    The header holds results only where a headline was given: a refused one is no measurement.

    Args:
        audit: What was found.
        digest: Of audit.json; published with the LoRA it tells this report from any other.

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
    said = audit.headline
    if not said.given or not audit.positive_control.works:
        return []

    def result(rate: Rate, kind: str, name: str) -> Any:
        return hub.EvalResult(
            task_type="text-to-image", dataset_type="imagefolder", dataset_name=name,
            metric_type=METRIC, metric_value=rate.count / rate.total,
            metric_name=f"Training images given back, {kind}",
            metric_args={"count": rate.count, "total": rate.total,
                         "low": rate.low, "high": rate.high, "confidence": 0.95},
        )  # fmt: skip

    rates = (
        (said.reproduced, "with the LoRA", "The images this LoRA was trained on"),
        (said.controls, "controls", "Controls of the same audit"),
    )
    return [result(*each) for each in rates if each[0].total]


def _paragraph(audit: LoraAudit, digest: str) -> str:
    said, attack = audit.headline, audit.attack
    sentences = [
        _plain(said.text),
        f"Audited with Unmemorize {versions()['unmemorize']} against "
        f"{counted(len(audit.verdicts), 'image', 'images')} it was trained on, on "
        f"{_code(audit.model)}.",
    ]
    if said.p_value is not None and said.reproduced.count:
        sentences.append(f"Probability of such a gap by chance: {chance(said.p_value)}.")
    if attack:
        sentences.append(f"An extraction attack of {attack.generations} generations brought out "
                         f"{_rate(attack.extracted)}.")  # fmt: skip
    control = audit.positive_control
    worked = "worked" if control.works else "FAILED, so the audit cannot be relied on"
    sentences += [
        f"The instrument's own test {worked}: it found {_rate(control.found)} planted images.",
        "Images that did not come back in this audit may come back from other words, seeds or "
        "attacks.",
    ]
    return (
        f"## Memorization audit\n\n![{LABEL}: {badge_text(audit)}](badge.svg)\n\n"
        + " ".join(sentences)
        + f"\n\nLoRA sha256: `{audit.lora.sha256}`  \nReport digest: `{digest}` "
        "(`unmemorize verify FOLDER --digest …` compares a report with it)\n"
    )


def _rate(rate: Rate) -> str:
    if not rate.total:
        return "none of none"
    return (f"{rate.count} of {rate.total} ({percent(rate.count / rate.total)}, 95 % interval "
            f"{between(rate.low, rate.high)})")  # fmt: skip


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\1", shown(text))


def _code(text: str) -> str:
    """Return text as code, in which nothing but a backtick means anything."""
    return f"`{shown(text).replace('`', chr(39))}`"
