"""Ways in which files go wrong: cut, flipped, doubled, edited by hand."""

import json
import random
import re
from collections.abc import Callable

STRANGE = (
    "null", "true", "-1", "0", "1e400", "NaN", "1e-320", "9" * 400, '""', '"x"', '"\\ud800"',
    "[]", "[[]]", "{}", '{"a": 1}', "[" * 3000, '"' + "y" * 3000 + '"',
)  # fmt: skip
"""Values that may stand where another is expected."""
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')
Mutation = Callable[[bytes, random.Random], bytes]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Return data with one to three faults, never without one; of text more often its tokens."""
    ways = [*BYTEWISE, *(TOKENWISE * 2 if TOKEN.search(data[:4096]) else ())]
    spoilt = data
    while spoilt == data:
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            spoilt = draw.choice(ways)(spoilt, draw) if spoilt else b"\0"
    return spoilt


def _flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _without(data: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(data)), draw.choice((1, 2, 8, 100))
    return data[:start] + data[start + length :]


def _doubled(data: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(data)), draw.choice((1, 8, 100))
    return data[: start + length] + data[start:]


def _foreign(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    noise = draw.choice((b"\0", b"\xff\xfe", b"\r\n", b'"', b",", b"\xe2\x80\xa8", bytes(64)))
    return data[:place] + noise + data[place + draw.choice((0, len(noise))) :]


def _largest(data: bytes, draw: random.Random) -> bytes:
    """Return data in which a number of some bytes is the largest, or the smallest, there is."""
    place, width = draw.randrange(len(data)), draw.choice((2, 4, 8))
    return data[:place] + draw.choice((b"\xff", b"\0", b"\x7f")) * width + data[place + width :]


def _replaced(data: bytes, draw: random.Random) -> bytes:
    found = [*TOKEN.finditer(data)]
    if not found:
        return data + b"x"
    token = draw.choice(found)
    other = draw.choice(STRANGE).encode()
    return data[: token.start()] + other + data[token.end() :]


def _swapped(data: bytes, draw: random.Random) -> bytes:
    found = [*TOKEN.finditer(data)]
    if len(found) < 2:
        return data + b"x"
    one, other = sorted(draw.sample(found, 2), key=lambda token: token.start())
    return b"".join((data[: one.start()], other[0], data[one.end() : other.start()], one[0],
                     data[other.end() :]))  # fmt: skip


def _nudged(data: bytes, draw: random.Random) -> bytes:
    """Return data in which one number is another, or one text has another letter."""
    found = [*TOKEN.finditer(data)]
    if not found:
        return data + b"x"
    token = draw.choice(found)
    try:
        value = json.loads(token[0])
    except ValueError:
        return data + b"x"
    if isinstance(value, bool | None):
        other = json.dumps(not value)
    elif isinstance(value, int | float):
        small = abs(value) < 2**53
        other = json.dumps(value + draw.choice((1, -1, 0.5, 1e-9)) if small else -value)
    else:
        other = json.dumps(value[:-1] + draw.choice("xé0 "))
    return data[: token.start()] + other.encode() + data[token.end() :]


BYTEWISE: tuple[Mutation, ...] = (_flip, _cut, _without, _doubled, _foreign, _largest)
TOKENWISE: tuple[Mutation, ...] = (_replaced, _swapped, _nudged)
