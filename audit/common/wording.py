"""What a report says in words and numbers; no sentence ever calls a model or a prompt safe."""

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...shared.wording import counted, visible

if TYPE_CHECKING:
    from ..model.result import AuditResult

MISSING = "\u2013"
PERCENT = "\u00a0%"


CHANCE = 0.05
"""Probability of so many flags without memorization from which on the headline holds back."""


def headline(rate: dict[str, Any], chance_p_value: float) -> str:
    """Return the finding in plain words; it never calls anything safe.

    Args:
        rate: `flagged_rate` of summary.json.
        chance_p_value: Probability of so many flags if no prompt were memorized.
    """
    hits, prompts = rate["hits"], counted(rate["n"], "prompt", "prompts")
    if hits == 0:
        return f"None of {prompts} scored above the threshold"
    if chance_p_value > CHANCE:
        return f"{hits} of {prompts} scored above the threshold, as chance alone might bring"
    return f"{hits} of {prompts} {'looks' if hits == 1 else 'look'} memorized"


def lead(result: "AuditResult") -> list[str]:
    """Return the sentences under the headline."""
    summary, rate = result.summary, result.summary["flagged_rate"]
    expected = _about(summary["expected_by_chance"])
    if rate["hits"] == 0:
        return [
            "That is no proof that the model has memorized nothing: only "
            f"{'this prompt was' if rate['n'] == 1 else 'these prompts were'} looked at, and with "
            "these settings."
        ]
    if summary["chance_p_value"] > CHANCE:
        lines = [
            f"Ordinary prompts do that too: {expected} of {rate['n']} would be flagged if none "
            "were memorized. The count alone is no sign of memorization; look at the pictures."
        ]
    else:
        ordinary = percent(1 - summary["calibration"]["false_positive_rate"])
        lines = [
            f"{'It steers' if rate['hits'] == 1 else 'They steer'} the model more strongly than "
            f"{ordinary} of ordinary prompts do. By chance alone {expected} of {rate['n']} would "
            "be flagged."
        ]
    if copies := (summary["similarity"] or {}).get("copies"):
        lines.append(
            f"Of {counted(copies['n'], 'picture', 'pictures')} made from flagged prompts and "
            "compared with the training pictures, "
            f"{counted(copies['hits'], 'came out as a copy', 'came out as copies')}. "
            "Look at them below."
        )
    return lines


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people, to so many significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:#.{digits}g}".rstrip(".") if value % 1 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(rate: float | None) -> str:
    """Return a share of 0..1 in percent; 0 and 100 only where they are true."""
    if rate is None or not math.isfinite(rate):
        return MISSING
    value = 100 * rate
    if value < 0.1 or 99.9 < value < 100:
        text = f"{value:.2g}" if value < 0.1 else "over 99.9"
    else:
        text = f"{value:.1f}".removesuffix(".0") if value < 10 or value > 99 else f"{value:.0f}"
    return f"{text}{PERCENT}"


def between(low: float, high: float) -> str:
    """Return two shares of 0..1 as one range in percent."""
    return f"{percent(low).removesuffix(PERCENT)} to {percent(high)}"


def chance(probability: float) -> str:
    """Return a probability for people; digits beyond a ten-thousandth would pretend too much."""
    return "below 0.0001" if probability < 1e-4 else number(probability, 2)


def _about(count: float) -> str:
    return "less than one" if count < 0.95 else f"about {count:.0f}"


def shown(value: Any) -> str:
    """Return any value as text without characters that do not print; not yet escaped."""
    return visible(str(value))


def facts(result: "AuditResult") -> list[tuple[str, str]]:
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
    rows += [(_title(name), value) for name, value in summary["counts"].items()]
    rows += [(_title(name), value) for name, value in summary["settings"].items()]
    rows += [(name, value) for name, value in summary["versions"].items()]
    return [(name, _plain(value)) for name, value in rows]


def reproduce(result: "AuditResult") -> str:
    """Return the command line of this audit, with file names in place of whole paths.

    Left out are defaults and what changes no result: device, batch size, where and how to write.
    """
    config, detection = result.config, result.config.detection
    words = ["unmemorize", "audit"]
    if config.model != "demo":
        words.append(result.model.name)
    options: list[tuple[str, Any, Any]] = [
        ("lora", result.model.lora, None),
        *(("prompts", path.name, None) for path in config.prompts),
        ("controls", config.controls and Path(config.controls).name, ""),
        ("calibration", config.calibration and config.calibration.name, None),
        ("false-positive-rate", config.false_positive_rate, 0.01),
        ("seeds", len(detection.seeds), 4),
        ("steps", detection.steps, 1),
        ("explain", config.explain, None),
        ("images-per-prompt", config.images_per_prompt, 2),
        ("flagged-pictured", config.flagged_pictured, 24),
        ("sample", config.sample, 8),
        ("generation-steps", config.generation_steps, 30),
        ("revision", config.revision, None),
        ("model-config", config.model_config and config.model_config.name, None),
        ("resolution", config.resolution, None),
        ("dtype", config.dtype, None),
    ]
    for name, value, default in options:
        if value != default:
            words += [f"--{name}", str(value)]
    words += ["--fast"] * config.sequential + ["--force"] * config.force
    return shlex.join(words)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


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
