"""Numbers and text as reports show them."""

import math
from typing import Any

from ...shared.wording import visible

MISSING = "\u2013"
PERCENT = "\u00a0%"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people, to so many significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    if 10**digits <= abs(value) < 1e6:
        return f"{value:.0f}"
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


def near_ones(near: int, hits: int) -> str:
    """Return the clause that follows a number of flagged prompts, empty when none is near one."""
    if near == 0:
        return ""
    return ", near a memorized one" if hits == 1 else f", {near} of them near a memorized one"


def shown(value: Any) -> str:
    """Return any value as text without characters that do not print; not yet escaped."""
    return visible(str(value))
