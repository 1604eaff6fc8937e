"""The page an audit ends with: one HTML file that needs nothing else, safe to open and to send.

No sentence calls a model or a prompt safe.
"""

import math
import shlex
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ... import demo
from ...shared.drawing.heatmap import heatmap_css, prompt_heatmap_html
from ...shared.drawing.score_charts import score_distribution, score_traces
from ...shared.wording import bare, counted
from ..common.pages import FOLD, Embedder, embedded_chart, render_page, safe
from ..common.wording import MISSING, near_ones, number, percent
from .config import AuditConfig
from .result import AuditEntry, AuditResult, GeneratedImage

CHANCE = 0.05
"""Probability of so many flags without memorization from which on the headline holds back."""
CARDS = 60
"""Flagged prompts that are shown in full, highest score first."""
UNFOLDED = 4
"""Of these, so many without a click."""
WORDS = 16
"""Words whose numbers are listed, strongest first."""
RUN, RUNS = 12, 24
"""Words in a row, and such rows, that are shown of how two prompts differ."""
OPTIONS = (
    "strength", "score", "false_positive_rate", "explain", "images_per_prompt", "flagged_pictured",
    "sample", "generation_steps", "revision", "resolution", "dtype", "quantize",
)  # fmt: skip
"""Settings that are options of the same name."""


def render_report(result: AuditResult, folder: Path) -> str:
    """Return the report as HTML, the same text for the same result and images.

    Args:
        result: Of the audit.
        folder: With its images.

    Raises:
        ImportError: The extra `reports` is not installed.
    """
    summary, model = result.summary, result.model
    rate, calibration = summary["flagged_rate"], summary["calibration"]
    flagged, near = result.families, summary["counts"]["near"]
    threshold, embed = result.calibration.judge.threshold, Embedder(folder)
    others = [entry for entry in result.entries if entry.images and not entry.memorized]
    return render_page(
        "report.html.j2",
        script="report.js",
        style=heatmap_css(),
        model=model,
        demo=result.config.model in demo.BUNDLED,
        version=summary["unmemorize"],
        headline=headline_of(result),
        near=near,
        near_rate=summary["near_rate"],
        near_clause=near_ones(near, rate["hits"]),
        lead=lead(result),
        open=result.open,
        caveats=summary["caveats"],
        warnings=summary["warnings"],
        flagged_rate=rate,
        expected=summary["expected_by_chance"],
        chance=summary["chance_p_value"],
        calibration=calibration,
        smallest_p=1 / (calibration["n"] + 1),
        similarity=summary["similarity"],
        groups=[
            (name, group, near_ones(group["near"], group["hits"]))
            for name, group in summary["groups"].items()
        ],
        cards=[_card(entry, threshold, embed) for entry in flagged[:CARDS]],
        unfolded=UNFOLDED,
        cards_left=len(flagged[CARDS:]),
        samples=[_card(entry, threshold, embed) for entry in others],
        truth_known=any(image.nearest for entry in flagged for image in entry.images),
        **_distribution(result),
        rows=sorted(result.entries, key=lambda entry: (-entry.score, entry.index)),
        facts=_facts(result),
        command=reproduce(result),
    )


def _distribution(result: AuditResult) -> dict[str, Any]:
    """Return the distribution of scores as a chart, and in words."""
    calibration, entries = result.calibration.judge, result.entries
    scores = [entry.score for entry in entries]
    flags = [entry.memorized for entry in entries]
    controls = calibration.sorted_scores.tolist()
    return {
        "distribution": embedded_chart(
            lambda theme, width: score_distribution(
                scores, flags, controls, calibration.threshold, theme=theme, width=width
            ),
            desk=1760,
            phone=720,
        ),
        "distribution_alt": (
            f"Scores of {counted(len(scores), 'audited prompt', 'audited prompts')} and "
            f"{counted(len(controls), 'control', 'controls')}; "
            f"{counted(sum(flags), 'lies', 'lie')} above the threshold of "
            f"{number(calibration.threshold)}."
        ),
    }


def _trace(entry: AuditEntry, threshold: float) -> dict[str, Any] | None:
    """Return the score per step as a chart, None when only one step was measured."""
    if len(entry.trace[0]) < 2:
        return None
    rows = [[math.nan if v is None else v for v in seed] for seed in entry.trace]
    return embedded_chart(
        lambda theme, width: score_traces(rows, threshold=threshold, theme=theme, width=width),
        desk=800,
    )


def _card(entry: AuditEntry, threshold: float, embed: Embedder) -> dict[str, Any]:
    """Return what one card shows; text still unescaped, except the coloured prompt."""
    known, copied = entry.explanation, [i.nearest.copied for i in entry.images if i.nearest]
    hits, left_out = sum(bool(value) for value in copied), known.occlusions if known else ()
    return {
        "index": entry.index,
        "prompt": entry.prompt,
        "near": entry.near,
        "differs": [*_differs(entry.near.prompt, entry.prompt)] if entry.near else (),
        "heatmap": known and safe(
            prompt_heatmap_html(known.words, known.significance, style=False, says=_says(entry))
        ),
        "long": len(entry.prompt) > FOLD,
        "score": entry.score,
        "ratio": number(entry.score / threshold, 2) if entry.memorized and threshold > 0 else "",
        "p_value": entry.p_value,
        "q_value": entry.q_value,
        "group": entry.group,
        "copies": f"{hits} of {len(copied)} {'is a copy' if hits == 1 else 'are copies'}"
        if hits else "",
        "suggestions": (*map(str, known.redrawn), *known.suggestions) if known else (),
        "notes": known.notes if known else (),
        "count": entry.count,
        "cut": entry.cut,
        "tiles": _tiles(entry, embed),
        "words": left_out[:WORDS],
        "whole": left_out[0].score_before if left_out else None,
        "trace": _trace(entry, threshold) if entry.memorized else None,
    }  # fmt: skip


def _differs(member: str, prompt: str) -> Iterator[tuple[str, str]]:
    """Yield how a prompt differs from the one it is near to: "del", "ins" or "", and the words."""
    old, new = member.split(), prompt.split()
    pairs = ([bare(word).lower() for word in words] for words in (old, new))
    codes = SequenceMatcher(None, *pairs).get_opcodes()
    for kind, first, last, start, end in codes[:RUNS]:
        if kind == "equal":
            yield "", _shortened(new[start:end])
            continue
        if last > first:
            yield "del", _shortened(old[first:last])
        if end > start:
            yield "ins", _shortened(new[start:end])
    if len(codes) > RUNS:
        yield "", "…"


def _shortened(words: list[str]) -> str:
    """Return words as text, the middle of many left out."""
    if len(words) > RUN:
        words = [*words[: RUN // 2], "…", *words[-RUN // 2 :]]
    return " ".join(words)


def _says(entry: AuditEntry) -> dict[int, str]:
    """Return what striking a word does, by its index, as it was measured."""
    known = entry.explanation
    if known is None:
        return {}
    says = {
        each.index: f"Without “{bare(each.word)}”: magnitude {number(each.score_after)}, with it "
        f"{number(each.score_before)}."
        for each in known.occlusions
    }
    for image in known.redrawn:
        says[image.index] += f" There, {image.observation}."
    return says


def _tiles(entry: AuditEntry, embed: Embedder) -> list[dict[str, Any]]:
    """Return generated images, each group before its nearest training image, and the map."""
    groups: dict[tuple[str | None, str], list[GeneratedImage]] = {}
    for image in entry.images:
        key = (image.nearest.path, image.nearest.caption) if image.nearest else (None, "")
        groups.setdefault(key, []).append(image)
    tiles = []
    for images in groups.values():
        for image in images:
            tiles.append(_generated_tile(image, embed))
        if nearest := images[0].nearest:
            whose = "its own" if nearest.is_own else "nearest"
            tiles.append({
                "uri": embed(nearest.path), "truth": True,
                "alt": f"Training image: {nearest.caption}",
                "title": f"{whose} training image",
                "text": nearest.caption,
            })  # fmt: skip
    for redrawn in entry.explanation.redrawn if entry.explanation else ():
        similarity = number(redrawn.nearest.similarity, 2)
        tiles.append({
            "uri": embed(redrawn.path), "truth": False, "word": redrawn.index,
            "title": f"without “{bare(redrawn.word)}”",
            "text": f"seed {redrawn.seed}, similarity {similarity}"
            + (": a copy" if redrawn.outcome in ("back", "another") else ""),
            "alt": f"Image made by the model from this prompt without “{redrawn.word}”, seed "
            f"{redrawn.seed}",
        })  # fmt: skip
    if entry.map:
        tiles.append({
            "uri": embed(entry.map), "truth": False, "title": "where the text pulls",
            "alt": "Map of the score difference over the first image", "text": "",
        })  # fmt: skip
    return tiles


def _generated_tile(image: GeneratedImage, embed: Embedder) -> dict[str, Any]:
    text, nearest = f"seed {image.seed}", image.nearest
    if nearest:
        text += f", similarity {number(nearest.similarity, 2)}"
        text += ": a copy" if nearest.copied else ""
    return {"uri": embed(image.path), "truth": False, "title": "made by the model", "text": text,
            "alt": f"Image made by the model from this prompt, seed {image.seed}"}  # fmt: skip


def headline_of(result: AuditResult) -> str:
    """Return the finding of an audit, as `headline` puts it."""
    summary, counts = result.summary, result.summary["counts"]
    return headline(
        summary["flagged_rate"], summary["chance_p_value"], counts["near"], counts["copied"]
    )


def headline(rate: dict[str, Any], chance_p_value: float, near: int = 0, copied: int = 0) -> str:
    """Return the finding in plain words; it never calls anything safe.

    Args:
        rate: `flagged_rate` of summary.json.
        chance_p_value: Probability of so many flags if no prompt were memorized.
        near: How many of the flagged are near another flagged one.
        copied: How many prompts, flagged or not, gave a copy of a training image.
    """
    hits, prompts = rate["hits"], counted(rate["n"], "prompt", "prompts")
    if copied and (hits == 0 or chance_p_value > CHANCE):
        return f"{copied} of {prompts} came back as a copy of a training image"
    if hits == 0:
        return f"None of {prompts} scored above the threshold"
    if chance_p_value > CHANCE:
        return f"{hits} of {prompts} scored above the threshold, as chance alone might bring"
    stand = f", {counted(near, 'more is', 'more are')} near a memorized one" if near else ""
    return f"{hits - near} of {prompts} {'looks' if hits - near == 1 else 'look'} memorized{stand}"


def lead(result: AuditResult) -> list[str]:
    """Return the sentences under the headline."""
    summary, rate = result.summary, result.summary["flagged_rate"]
    expected = _about(summary["expected_by_chance"])
    if summary["counts"]["copied"] and rate["hits"] == 0:
        return ["No prompt scored above the threshold, but images show it. Look at them below."]
    if rate["hits"] == 0:
        return [
            "That is no proof that the model has memorized nothing: only "
            f"{'this prompt was' if rate['n'] == 1 else 'these prompts were'} looked at, and with "
            "these settings."
        ]
    if summary["chance_p_value"] > CHANCE:
        lines = [
            f"Ordinary prompts do that too: {expected} of {rate['n']} would be flagged if none "
            "were memorized. The count alone is no sign of memorization; the images decide."
        ]
    else:
        ordinary = percent(1 - summary["calibration"]["false_positive_rate"])
        lines = [
            f"{'It steers' if rate['hits'] == 1 else 'They steer'} the model more strongly than "
            f"{ordinary} of ordinary prompts do. By chance alone {expected} of {rate['n']} would "
            "be flagged."
        ]
    if near := summary["counts"]["near"]:
        lines.append(
            f"{counted(near, 'flagged prompt shares its', 'flagged prompts share their')} words "
            "with one that scores higher or was copied, and "
            f"{'pulls' if near == 1 else 'pull'} the model the same way: "
            f"{'it is' if near == 1 else 'they are'} near a memorized one."
        )
    if copies := (summary["similarity"] or {}).get("copies"):
        lines.append(
            f"Of {counted(copies['n'], 'image', 'images')} made from flagged prompts and "
            "compared with the training images, "
            f"{counted(copies['hits'], 'came out as a copy', 'came out as copies')}. "
            "Look at them below."
        )
    return lines


def _about(count: float) -> str:
    return "less than one" if count < 0.95 else f"about {count:.0f}"


def _facts(result: AuditResult) -> list[tuple[str, str]]:
    """Return names and values of the table of settings and versions."""
    model, summary = result.model, result.summary
    rows: list[tuple[str, Any]] = [
        ("Model", model.name),
        ("LoRA", model.lora or "none"),
        ("sha256", model.fingerprint),
        ("Prediction", model.parametrization),
        ("Latent shape", " x ".join(map(str, model.latent_shape))),
        ("Number format", model.dtype),
        ("Device", model.device),
    ]
    if model.guidance_distilled:
        rows.append(("Guidance", "distilled: scores are on a scale of their own"))
    for group in ("counts", "settings"):
        rows += [(n.replace("_", " ").capitalize(), value) for n, value in summary[group].items()]
    rows += summary["versions"].items()
    return [(name, _plain(value)) for name, value in rows]


def _plain(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)


def reproduce(result: AuditResult) -> str:
    """Return the command line of this audit, with file names in place of whole paths.

    Left out are defaults and what changes no result: device, batch size, where and how to write.
    """
    config, detection, usual = result.config, result.config.detection, AuditConfig()
    words = ["unmemorize", "audit", *([] if config.model == demo.NAME else [result.model.name])]
    options = [
        ("lora", config.lora and config.lora.name),
        *(("prompts", path.name) for path in config.prompts),
        ("controls", Path(config.controls).name if config.controls else None),
        ("calibration", config.calibration and config.calibration.name),
        ("model-config", config.model_config and config.model_config.name),
        ("seeds", len(detection.seeds)
         if len(detection.seeds) != len(usual.detection.seeds) else None),
        ("steps", detection.steps if detection.steps != usual.detection.steps else None),
        *((name.replace("_", "-"), getattr(config, name)) for name in OPTIONS
          if getattr(config, name) != getattr(usual, name)),
    ]  # fmt: skip
    for name, value in options:
        if value is not None:
            words += [f"--{name}", str(value)]
    switches = {"fast": config.sequential, "collapse": config.collapse, "force": config.force}
    words += [f"--{name}" for name, given in switches.items() if given]
    return shlex.join(words)
