"""Words of messages that depend on a number."""


def counted(n: int, one: str, many: str) -> str:
    """Return `n` before the words that fit it: `one` for exactly 1, `many` for all else."""
    return f"{n} {one if n == 1 else many}"
