"""Methods of libraries, wrapped for as long as a training lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

Function = Callable[..., Any]


class HookMissing(RuntimeError):
    """A place where the training would be protected is not there: other versions than expected."""


@contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Function], Function]) -> Iterator[None]:
    """Put `wrap` around a method of an object, or of every object of a class, for a block.

    Raises:
        HookMissing: There is no such method.
    """
    if not hasattr(owner, name):
        raise HookMissing(
            f"`{getattr(owner, '__name__', type(owner).__name__)}.{name}` is not there in the "
            "installed version: the training cannot be protected. Nothing was trained."
        )
    own = name in vars(owner)
    before = vars(owner)[name] if own else None
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(wrap(original)))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
