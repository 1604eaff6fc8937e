"""What a report says in words and numbers; no sentence ever calls a model or a prompt safe."""

import math
import shlex
from typing import TYPE_CHECKING, Any

from ..shared import pictures

if TYPE_CHECKING:
    from .result import AuditResult


def headline(hits: int, n: int) -> str:
    """Return the finding in plain words; it never calls anything safe."""
    prompts = "prompt" if n == 1 else "prompts"
    if hits == 0:
        return f"None of {n} {prompts} scored above the threshold"
    return f"{hits} of {n} {prompts} {'looks' if hits == 1 else 'look'} memorized"


def lead(result: "AuditResult") -> list[str]:
    rate = result.summary["flagged_rate"]
    expected = result.summary["expected_by_chance"]
    if rate["hits"] == 0:
        return [
            "That is no proof that the model has memorized nothing: only these prompts were looked "
            "at, and with these settings."
        ]
    lines = [
        f"They steer the model more strongly than {percent(1 - result.summary['calibration']['false_positive_rate'])} of ordinary "
        f"prompts do. By chance alone {_about(expected)} of {rate['n']} would be flagged."
    ]
    similarity = result.summary["similarity"]
    copies = (similarity or {}).get("copies")
    if copies:
        lines.append(
            f"Of {copies['n']} pictures made from flagged prompts and compared with the training "
            f"pictures, {copies['hits']} came out as copies. Look at them below."
        )
    return lines


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people, to so many significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:#.{digits}g}".rstrip(".") if value % 1 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(rate: float | None) -> str:
    """Return a share of 0..1 in percent: one decimal below ten, none where it would be false."""
    if rate is None or not math.isfinite(rate):
        return "–"
    value = 100 * rate
    text = f"{value:.1f}" if value < 10 or 99 < value < 100 else f"{value:.0f}"
    return f"{text.removesuffix('.0')}\u00a0%"


def chance(probability: float) -> str:
    """Return a probability for people; digits beyond a ten-thousandth would pretend too much."""
    return "below 0.0001" if probability < 1e-4 else number(probability, 2)


def _about(count: float) -> str:
    return "less than one" if count < 0.95 else f"about {count:.0f}"


def shown(value: Any) -> str:
    """Return any value as text without characters that do not print; not yet escaped."""
    return pictures.visible(str(value))


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
    """Return the command line of this audit, with file names in place of whole paths."""
    config, detection = result.config, result.config.detection
    words = ["unmemorize", "audit"]
    if config.model != "demo":
        words.append(result.model.name)
    options: list[tuple[str, Any, Any]] = [
        ("lora", result.model.lora, None),
        *(("prompts", path.name, None) for path in config.prompts),
        ("controls", config.controls, ""),
        ("calibration", config.calibration and config.calibration.name, None),
        ("false-positive-rate", config.false_positive_rate, 0.01),
        ("seeds", len(detection.seeds), 4),
        ("steps", detection.steps, 1),
        ("images-per-prompt", config.images_per_prompt, 2),
        ("flagged-pictured", config.flagged_pictured, 24),
        ("sample", config.sample, 8),
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
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)
