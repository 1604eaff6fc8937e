"""Words of messages: what depends on a number, and text of others that is safe to print."""

import unicodedata
from collections.abc import Iterable


def counted(n: int, one: str, many: str) -> str:
    """Return `n` before the words that fit it: `one` for exactly 1, `many` for all else."""
    return f"{n} {one if n == 1 else many}"


def name_some(keys: Iterable[str], most: int = 5) -> str:
    """Return the first keys, and how many more there are."""
    keys = sorted(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def bare(word: str) -> str:
    """Return a word as a sentence quotes it, without the comma or full stop that follows it."""
    return word.strip(",.;:") or word


def visible(text: str) -> str:
    """Return `text` with everything that does not print shown as a sign.

    Control characters become their Unicode pictures, direction overrides, unpaired surrogates and
    noncharacters ``<U+202E>``; letters of any script, joiners of emoji and Persian stay.
    """
    # Printable text holds none of these, and nearly all text is printable.
    return text if text.isprintable() else "".join(map(_sign, text))


def tells_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is full; on a CPU PyTorch has no class for it."""
    full = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return full or "can't allocate memory" in str(error)


def _sign(char: str) -> str:
    """Return a character, or the sign that stands for it."""
    code = ord(char)
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    spoofs = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x2028, 0x2029)
    absent = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
    hidden = unicodedata.category(char) in ("Cc", "Cs") or spoofs or absent
    return f"<U+{code:04X}>" if hidden else char
