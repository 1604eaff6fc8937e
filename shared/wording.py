"""Words of messages that depend on a number."""

from collections.abc import Iterable


def counted(n: int, one: str, many: str) -> str:
    """Return `n` before the words that fit it: `one` for exactly 1, `many` for all else."""
    return f"{n} {one if n == 1 else many}"


def name_some(keys: Iterable[str], most: int = 5) -> str:
    """Return the first keys, and how many more there are."""
    keys = sorted(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
