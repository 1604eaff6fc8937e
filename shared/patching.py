"""Methods of libraries, patched for as long as a block lasts and then as they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

Function = Callable[..., Any]


class HookMissing(RuntimeError):
    """Something that is to be hooked into is not there: the library has an unexpected version."""


@contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Function], Function]) -> Iterator[None]:
    """Put `wrap` around a method for a block; its signature stays visible to `inspect`.

    Args:
        owner: The object whose method it is, or a class, whose objects then all have it.
        name: Of the method.
        wrap: Takes the method as it was, bound when `owner` is an object.

    Raises:
        HookMissing: There is no such method.
    """
    if not hasattr(owner, name):
        what = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        raise HookMissing(
            f"`{what}.{name}`, which has to be patched, is not there: the installed version is not "
            "supported. Nothing was changed."
        )
    own, original = vars(owner).get(name), getattr(owner, name)
    setattr(owner, name, wraps(original)(wrap(original)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)  # as it stood there: a classmethod and not its bound method
