"""A second device without a GPU: real numbers, held on the CPU, that mix with no other device's.

Inside a `ForeignDevice` everything that PyTorch is asked to put on another device becomes a
`ForeignTensor`. It says that it lies there, computes as on the CPU, and raises where it meets a
tensor of the CPU, as a GPU does. Whatever is forgotten on the CPU, or sent to the wrong GPU, shows.
"""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CPU = torch.device("cpu")
aten = torch.ops.aten
BETWEEN = (aten.copy_, aten._to_copy, aten._has_compatible_shallow_copy_type)
"""Operations that take tensors of two devices."""
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""Operations that take indices of the CPU."""


class ForeignTensor(Tensor):
    """A tensor of a foreign device; `inner` holds its numbers."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(
        cls, inner: Tensor, place: torch.device | None = None, requires_grad: bool = False
    ) -> Tensor:
        """Put numbers on a device; without a device, make a parameter as its class would."""
        if isinstance(inner, ForeignTensor):
            place, inner = inner.place, inner.inner
        elif place is None:  # a parameter comes back to the CPU under the class it had
            return torch.nn.Parameter(inner, requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        made.inner, made.place = inner, place
        return made

    @property
    def device(self) -> torch.device:
        """Where it says that it lies."""
        return self.place

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.cpu:
                return aten._to_copy(args[0], device=CPU)
            if func is Tensor.tolist:
                return args[0].inner.tolist()
            # The binding compares with the device that C++ knows, which is the CPU.
            return (
                _moved(*args, **kwargs or {}) if func is Tensor.to else func(*args, **kwargs or {})
            )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})


def _moved(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or x.device, dtype or x.dtype
    if (device, dtype) == (x.device, x.dtype) and not copy:
        return x
    return aten._to_copy(x, device=device, dtype=dtype)


_active: list["ForeignDevice"] = []


def _current() -> "ForeignDevice":
    if not _active:
        raise RuntimeError("A tensor of the foreign device is used after its block.")
    return _active[-1]


class _Constructors(TorchFunctionMode):
    """Builds on the CPU what PyTorch would build past the dispatcher."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        place = kwargs.get("device") or torch.get_default_device()
        return func(*args, **kwargs | {"device": CPU}).to(place)


class ForeignDevice(TorchDispatchMode):
    """A block in which there is a second device.

    `held` is the number of bytes that lie on it now, `peak` the most that did.
    """

    def __init__(self, *, float64: bool = True):
        """Set up.

        Args:
            float64: Whether the device knows float64; Apple's GPUs do not.
        """
        super().__init__()
        self.float64, self.constructors = float64, _Constructors()
        self.held = self.peak = 0
        self._storages: Counter[int] = Counter()

    def __enter__(self) -> "ForeignDevice":
        super().__enter__()
        self.constructors.__enter__()
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        self.constructors.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the numbers, and put the result where it belongs."""
        places: set[torch.device] = set()
        wanted: list[torch.device] = []

        def plain(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim:
                places.add(value.device)
            if isinstance(value, torch.device) and value.type != "meta":
                wanted.append(value)
                return CPU
            return value.inner if isinstance(value, ForeignTensor) else value

        numbers = tree_map(plain, args), tree_map(plain, kwargs)
        for value in args:  # scalars of the CPU may stand beside anything
            if isinstance(value, ForeignTensor):
                places.add(value.place)
        if func.overloadpacket in INDEXED:
            places.discard(CPU)
        if len(places) > 1 and func.overloadpacket not in BETWEEN:
            raise RuntimeError(f"{func}: expected all tensors on one device, found {places}")
        result = func(*numbers[0], **numbers[1])
        place = wanted[-1] if wanted else max(places, key=lambda d: d != CPU, default=CPU)
        if func.overloadpacket is aten.copy_ or _writes_its_first(func):
            return args[0]
        if place.type in ("cpu", "meta"):
            return result
        return tree_map(lambda value: self._put(value, place), result)

    def _put(self, value: Any, place: torch.device) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return value
        if value.dtype == torch.float64 and not self.float64:
            raise TypeError(f"{place} does not know float64.")
        made = ForeignTensor(value, place)
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._storages[key] += 1
        if self._storages[key] == 1:
            self.held += size
            self.peak = max(self.peak, self.held)
        weakref.finalize(made, self._free, key, size)
        return made

    def _free(self, key: int, size: int) -> None:
        self._storages[key] -= 1
        if not self._storages[key]:
            self.held -= size


def _writes_its_first(func: Any) -> bool:
    """Return whether an operation changes its first argument and returns it."""
    arguments = func._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and alias.is_write and bool(func._schema.returns)
