"""JSON that is read back: parsed strictly, and every value checked against a type.

The types are annotations: plain ones, `Literal`, `Annotated` with a `Within`, and dataclasses,
which are made from objects. No library: what pydantic and msgspec bring besides would come into
every host, and neither names found and expected together.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = 1 << 30
"""Bytes of a file that is read: nothing that this package writes comes near."""
SHOWN = 60
"""Characters of a value in a message."""
WORDS = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text",
    NoneType: "null", list: "a list", tuple: "a list", dict: "an object", Any: "any value",
}  # fmt: skip
Json = dict[str, Any] | list | str | float | bool | None


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both allowed."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        if self.high >= 2**53:
            return f"of at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


Count = Annotated[int, Within(0.0, 2.0**53)]
"""A whole number from 0 that a float holds exactly."""
Share = Annotated[float, Within(0.0, 1.0)]


class Misfit(ValueError):
    """A value of another type than expected; says key, found and expected."""


@dataclass(frozen=True)
class Reader:
    """Reads JSON of one kind, and raises its kind's error with what to type next."""

    error: type[ValueError]
    what: str
    """It reads, as in "is not a calibration"."""
    remedy: str

    def read(self, path: Path, expected: Any, *, foreign: bool = False) -> Any:
        """Return the values of a file; arguments and errors of `check`."""
        return self.check(self.parse_file(path), expected, str(path), foreign=foreign)

    def parse_file(self, path: Path) -> Json:
        """Return what a file holds as JSON, its types unchecked.

        Raises:
            OSError: It is not there, or cannot be read.
            ValueError: Of the reader's class: no regular file, too large, or not JSON.
        """
        if path.exists() and not path.is_file():
            raise self.error(f"{path} is not {self.what}: it is no regular file. {self.remedy}")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        return self.parse(data, str(path))

    def parse(self, text: str | bytes, where: str) -> Json:
        """Return what a text in JSON holds, its types unchecked.

        Args:
            text: In UTF-8.
            where: It stands, for the message.

        Raises:
            ValueError: Of the reader's class: it is too large, not UTF-8 or not JSON, names a key
                twice (readers disagree which one counts), or holds NaN or an infinity.
        """
        try:
            if len(text) > LARGEST:
                raise ValueError(f"it has more than {LARGEST >> 20} MiB")
            if isinstance(text, bytes):
                text = text.decode("utf-8-sig")
            return json.loads(
                text, object_pairs_hook=_unrepeated, parse_float=_finite, parse_constant=_finite
            )
        except RecursionError as error:
            raise self._no_json(where, "it is nested too deeply") from error
        except ValueError as error:
            raise self._no_json(where, str(error)) from error

    def check(self, value: Any, expected: Any, where: str, *, foreign: bool = False) -> Any:
        """Return a value as the type that is expected: objects as its dataclasses.

        Args:
            value: From `parse`.
            expected: An annotation, or a dataclass.
            where: It stands, for the message.
            foreign: Objects may hold further fields, as those of other programs do.

        Raises:
            ValueError: Of the reader's class; names key, found and expected.
        """
        try:
            return conform(value, expected, foreign=foreign)
        except Misfit as error:
            raise self.error(f"{where} does not fit: {error} {self.remedy}") from error

    def _no_json(self, where: str, reason: str) -> ValueError:
        return self.error(
            f"{where} is not {self.what}: it cannot be read ({reason}); expected an object in "
            f"braces. {self.remedy}"
        )


def digest_of(document: Mapping[str, Any], key: str) -> str:
    """Return the sha256 of a JSON object without one of its keys, however it is laid out.

    What is hashed is one line of ASCII: keys sorted, no spaces, floats as Python writes them.
    """
    content = {name: value for name, value in document.items() if name != key}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def conform(value: Any, expected: Any, key: str = "", *, foreign: bool = False) -> Any:
    """Return a value as the type that is expected; see `Reader.check`.

    Raises:
        Misfit: It is of another type.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return value
    if origin is Annotated:
        try:
            inner = _scalar(value, arguments[0], key)
        except Misfit:
            raise _misfit(key, value, expected) from None
        if not arguments[1].low <= inner <= arguments[1].high:
            raise _misfit(key, value, expected)
        return inner
    if origin in (Union, UnionType):
        return _one_of(value, arguments, key, foreign)
    if origin is Literal:
        if not any(value == each and type(value) is type(each) for each in arguments):
            raise _misfit(key, value, expected)
        return value
    if is_dataclass(expected):
        return _object(value, expected, key, foreign)
    if origin in (list, tuple, dict):
        return _container(value, expected, key, foreign)
    return _scalar(value, expected, key)


def _scalar(value: Any, expected: Any, key: str) -> Any:
    if expected is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    elif type(value) is (NoneType if expected is None else expected):
        return value
    raise _misfit(key, value, expected)


def _one_of(value: Any, options: tuple, key: str, foreign: bool) -> Any:
    """Return a value as the first type that it fits; of one besides null its own misfit is told."""
    if value is None and NoneType in options:
        return None
    others = [option for option in options if option is not NoneType]
    if len(others) == 1:
        return conform(value, others[0], key, foreign=foreign)
    for option in others:
        try:
            return conform(value, option, key, foreign=foreign)
        except Misfit:
            continue
    raise _misfit(key, value, Union[options])  # noqa: UP007  # made of a tuple


def _container(value: Any, expected: Any, key: str, foreign: bool) -> Any:
    origin, arguments = get_origin(expected), get_args(expected)
    if type(value) is not (dict if origin is dict else list):
        raise _misfit(key, value, expected)
    if isinstance(value, dict):
        return {
            name: conform(each, arguments[1], _inside(key, name), foreign=foreign)
            for name, each in value.items()
        }
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise _misfit(key, value, expected)
    else:
        arguments = (arguments[0],) * len(value)
    return origin(
        conform(each, of, f"{key}[{place}]", foreign=foreign)
        for place, (each, of) in enumerate(zip(value, arguments, strict=True))
    )


def _object(value: Any, expected: Any, key: str, foreign: bool) -> Any:
    if not isinstance(value, dict):
        raise _misfit(key, value, expected)
    hints, needed = _shape(expected)
    if missing := sorted(needed - value.keys()):
        raise Misfit(f"{_named(key)} lacks the fields {missing}.")
    if not foreign and (unknown := sorted(value.keys() - hints.keys())):
        shown = [name[:SHOWN] for name in unknown]
        raise Misfit(f"{_named(key)} has unknown fields {shown}, expected {sorted(hints)}.")
    inner = {
        name: conform(value[name], hint, _inside(key, name), foreign=foreign)
        for name, hint in hints.items()
        if name in value
    }
    try:
        return expected(**inner)
    except Misfit:
        raise
    except ValueError as error:
        raise Misfit(f"{_named(key)}: {error}") from error


@cache
def _shape(expected: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the types of a dataclass's fields, and which of them have no default."""
    hints = get_type_hints(expected, include_extras=True)
    own = {each.name: each for each in fields(expected) if each.init}
    needed = (
        name for name, each in own.items()
        if each.default is MISSING and each.default_factory is MISSING
    )  # fmt: skip
    return {name: hints[name] for name in own}, frozenset(needed)


def _misfit(key: str, value: Any, expected: Any) -> Misfit:
    found = json.dumps(value)
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}…"
    return Misfit(f"{_named(key)} is {found}, expected {described(expected)}.")


def described(expected: Any) -> str:
    """Return a type in words."""
    if isinstance(expected, type) and is_dataclass(expected):
        return f"an object with the fields {', '.join(sorted(_shape(expected)[0]))}"
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return f"{described(arguments[0])} {arguments[1]}"
    if origin in (Union, UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}" if arguments[1:] else repr(arguments[0])
    if origin is dict:
        return f"an object of {described(arguments[1])} by name"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: {', '.join(map(described, arguments))}"
    if origin in (list, tuple):
        return f"a list, each {described(arguments[0])}"
    return WORDS[expected]


def _named(key: str) -> str:
    return f"`{key}`" if key else "the whole"


def _inside(key: str, name: str) -> str:
    name = name if name.isprintable() and len(name) <= SHOWN else f"{ascii(name)[:SHOWN]}…"
    return f"{key}.{name}" if key else name


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:SHOWN]} is no finite number")
    return number
