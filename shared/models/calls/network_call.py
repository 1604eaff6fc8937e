"""One call of a diffusers network, read by meaning, cut to rows, and replaced in part."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...score.denoiser import Conditioning
from ...wording import name_some

Path = tuple[str, ...]
"""Name of an argument, and the keys of the mappings in it."""
IN_LIST = -1
"""Stands for the axis of an argument that is a list with one entry per row."""
LATENTS = ("hidden_states", "sample", "x")
TIMES = ("timestep", "timesteps", "t")
"""How networks of diffusers name what they denoise, and when."""
EMBEDDINGS = ("encoder_hidden_states",)


ONE_LENGTH = (
    "this network reads the prompts of one call at one length. Sample one prompt per call of the "
    "pipeline."
)


class NotFollowed(ValueError):
    """A pipeline cannot be followed; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the arguments of a network hold latents, rows and text."""

    latents: Path
    rows: Mapping[Path, int]
    """Axis with one entry per row of the batch (or `IN_LIST`), of each argument that has one."""
    embeddings: Path
    """Of the text arguments the one that is a vector per token."""
    pooled: Path | None = None
    """Of the text arguments the one that is a single vector."""
    others: tuple[Path, ...] = ()
    """Further arguments that depend on the prompt: masks, other encoders' embeddings."""


@dataclass(frozen=True, kw_only=True)
class NetworkCall:
    """Arguments of one call; replacing makes new ones, the caller's stay as they are."""

    args: tuple
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    """Of the network's arguments, in order: those that come without a name stand at the start."""
    layout: Layout | None = None
    """None as long as only latents and time are looked at."""

    @property
    def latents(self) -> Tensor:
        """Return the latents that the network reads, one row per row of the batch."""
        found = self.get(self._named(LATENTS))
        return torch.stack(found) if isinstance(found, list) else found

    @property
    def time(self) -> Tensor | float:
        """Return the time that the network reads, in its own units."""
        time = self.get(self._named(TIMES))
        return time.flatten()[0] if isinstance(time, Tensor) else time

    @property
    def any_length(self) -> bool:
        """Whether each prompt has an embedding of its own length."""
        return self._layout.rows[self._layout.embeddings] == IN_LIST

    def leaves(self) -> Iterator[tuple[Path, Any]]:
        """Yield the arguments, and in place of mappings what stands in them."""
        for name in (*self.names[: len(self.args)], *self.kwargs):
            value = self.get((name,))
            if isinstance(value, Mapping):
                yield from (((name, key), inner) for key, inner in value.items())
            else:
                yield (name,), value

    def get(self, path: Path) -> Any:
        """Return an argument."""
        name, *keys = path
        value = self.kwargs[name] if name in self.kwargs else self.args[self.names.index(name)]
        return value[keys[0]] if keys else value

    def set(self, path: Path, value: Any) -> "NetworkCall":
        """Return the call with another value of an argument."""
        name, *keys = path
        if keys:
            value = {**self.get((name,)), keys[0]: value}
        if name in self.kwargs:
            return replace(self, kwargs={**self.kwargs, name: value})
        at = self.names.index(name)
        return replace(self, args=(*self.args[:at], value, *self.args[at + 1 :]))

    def conditioning(self, rows: Sequence[int]) -> Conditioning:
        """Return the text at `rows` as the network reads it."""
        layout = self._layout
        found = self._taken(layout.embeddings, rows)
        lengths: tuple[int, ...] = ()
        if isinstance(found, list):
            lengths = tuple(len(row) for row in found)
            found = nn.utils.rnn.pad_sequence(found, batch_first=True)
        return Conditioning(
            embeddings=found,
            pooled=None if layout.pooled is None else self._taken(layout.pooled, rows),
            lengths=lengths,
            others=tuple(
                {path: self._taken(path, [row]) for path in layout.others} for row in rows
            ) if layout.others else (),
        )  # fmt: skip

    def with_all_latents(self, other: "NetworkCall") -> "NetworkCall":
        """Return the call with the very latents of another one."""
        path = self._named(LATENTS)
        return self.set(path, other.get(path))

    def with_latents(self, rows: Sequence[int], latents: Tensor) -> "NetworkCall":
        """Return the call with other latents at `rows`, in its own dtype."""
        path = self._layout.latents
        return self.set(path, written(self.get(path), rows, latents))

    def with_conditioning(self, rows: Sequence[int], cond: Conditioning) -> "NetworkCall":
        """Return the call with other text at `rows`, in its own dtypes.

        Raises:
            ValueError: The other text has another length, and the network's rows share one.
        """
        layout, call = self._layout, self
        if len(set(cond.lengths)) > 1 and not self.any_length:
            raise ValueError(f"Prompts of {sorted(set(cond.lengths))} tokens: {ONE_LENGTH}")
        for path, own in _text(layout, cond).items():
            value, axis = self.get(path), layout.rows.get(path)
            if value is None or own is None:
                own, whole = _unmasked(value, own, rows)
                if whole:
                    call = call.set(path, own)
                    continue
            if axis is None or isinstance(value, list) or not isinstance(own, Tensor):
                own = _detached(own)
                placed = list(value) if isinstance(value, list) else own
                if isinstance(value, list):
                    for place, row in enumerate(rows):
                        placed[row] = own[place].to(placed[row])
                call = call.set(path, placed)
            elif len(rows) == value.shape[axis]:
                order = sorted(range(len(rows)), key=lambda place: rows[place])
                call = call.set(path, own.detach().to(value).index_select(
                    axis, torch.tensor(order, device=value.device)))  # fmt: skip
            else:
                call = call.set(path, _written_along(value, axis, rows, own.detach(), path))
        return call

    def only(self, rows: Sequence[int]) -> "NetworkCall":
        """Return the call for these rows alone; one may be asked for several times."""
        call = self
        for path in self._layout.rows:
            call = call.set(path, self._taken(path, rows))
        return call

    def filled(self, latents: Tensor, cond: Conditioning) -> "NetworkCall":
        """Return the call of a single row for these latents and prompts, differentiable in both.

        Args:
            latents: [row ...] as the network reads them.
            cond: As many prompts, all of one length.
        """
        layout = self._layout
        call = self.only([0] * len(latents))
        listed = layout.rows[layout.latents] == IN_LIST
        call = call.set(layout.latents, list(latents) if listed else latents)
        for path, value in _text(layout, cond).items():
            call = call.set(path, value)
        return call

    @property
    def _layout(self) -> Layout:
        assert self.layout is not None, "of a call whose text is looked at"
        return self.layout

    def _named(self, candidates: tuple[str, ...]) -> Path:
        for name in candidates:
            if name in self.kwargs or name in self.names[: len(self.args)]:
                return (name,)
        raise NotFollowed(f"the network has no argument {' or '.join(candidates)}")

    def _taken(self, path: Path, rows: Sequence[int]) -> Any:
        value, axis = self.get(path), self._layout.rows.get(path)
        if axis is None or value is None:
            return value
        if axis == IN_LIST:
            return [value[row] for row in rows]
        return value.index_select(axis, torch.tensor(list(rows), device=value.device))


def names_of(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's arguments, in order."""
    plain = getattr(network, "_orig_mod", network)  # inside what torch.compile returns
    return tuple(inspect.signature(type(plain).forward).parameters)[1:]


def learn_layout(
    one: NetworkCall, two: NetworkCall, other: NetworkCall, mixed: NetworkCall
) -> Layout:
    """Return where a pipeline's calls hold what.

    Args:
        one: For one prompt.
        two: For this prompt twice: what has doubled is per row.
        other: For one other prompt at the same latents: what has changed is text.
        mixed: For both prompts: what is there only now is a mask over the shorter one.

    Raises:
        NotFollowed: Latents, time or text cannot be told apart.
    """
    first, twice, changed = (dict(call.leaves()) for call in (one, two, other))
    rows = {path: axis for path, value in first.items()
            if (axis := _row_axis(value, twice.get(path))) is not None}  # fmt: skip
    masks = [path for path, value in mixed.leaves()
             if first.get(path) is None and isinstance(value, Tensor)]  # fmt: skip
    rows |= dict.fromkeys(masks, 0)
    latents, time = one._named(LATENTS), one._named(TIMES)
    text = [path for path, value in first.items()
            if path not in (latents, time) and not _same(value, changed.get(path))]  # fmt: skip
    vectors = [path for path in text if _dimensions(first[path]) == 3 and path in rows]
    if latents not in rows:
        raise NotFollowed(f"its network reads no row per image in `{latents[0]}`")
    if not vectors:
        found = name_some([".".join(path) for path in text]) or "none"
        raise NotFollowed(
            "its network reads no embeddings of the prompt, [row token width]; arguments that "
            f"depend on the prompt: {found}"
        )
    embeddings = min(vectors, key=lambda path: path[-1] not in EMBEDDINGS)
    pooled = [path for path in text
              if _dimensions(first[path]) == 2 and "mask" not in path[-1]]  # fmt: skip
    named = (embeddings, *pooled[:1])
    return Layout(
        latents=latents, rows=rows, embeddings=embeddings,
        pooled=pooled[0] if pooled else None,
        others=tuple(path for path in (*text, *masks) if path not in named),
    )  # fmt: skip


def written(tensor: Any, rows: Sequence[int], values: Tensor) -> Any:
    """Return a copy of `tensor` with `values` at `rows`, in its own dtype and on its device."""
    if isinstance(tensor, list):
        placed = list(tensor)
        for place, row in enumerate(rows):
            placed[row] = values[place].to(tensor[row])
        return placed
    tensor = tensor.clone()
    tensor[list(rows)] = values.to(tensor)
    return tensor


def _text(layout: Layout, cond: Conditioning) -> dict[Path, Any]:
    """Return the text arguments of prompts of one length."""
    embeddings = cond.embeddings
    if layout.rows[layout.embeddings] == IN_LIST:
        ends = cond.lengths or (embeddings.shape[1],) * len(cond)
        found: dict[Path, Any] = {
            layout.embeddings: [row[:end] for row, end in zip(embeddings, ends, strict=True)]
        }
    else:
        if cond.lengths:
            embeddings = embeddings[:, : max(cond.lengths)]
        found = {layout.embeddings: embeddings}
    if layout.pooled is not None and cond.pooled is not None:
        found[layout.pooled] = cond.pooled
    for path in layout.others if cond.others else ():
        parts, axis = [each[path] for each in cond.others], layout.rows.get(path)
        if axis is None or parts[0] is None:
            found[path] = parts[0]
        elif axis == IN_LIST:
            found[path] = [each for part in parts for each in part]
        else:
            found[path] = torch.cat(parts, dim=axis)
    return found


def _unmasked(value: Tensor | None, own: Any, rows: Sequence[int]) -> tuple[Any, bool]:
    """Return a mask to be put at `rows`, or in place of all; None stands for one without a gap."""
    if value is None:
        return own, True
    if len(rows) == len(value):
        return None, True
    return torch.ones_like(value[list(rows)]), False


def _detached(value: Any) -> Any:
    if isinstance(value, list):
        return [_detached(each) for each in value]
    return value.detach() if isinstance(value, Tensor) else value


def _written_along(
    value: Tensor, axis: int, rows: Sequence[int], own: Tensor, path: Path
) -> Tensor:
    """Return a copy of `value` with `own` at `rows` of an axis."""
    shape = list(value.shape)
    shape[axis] = len(rows)
    if list(own.shape) != shape:
        raise ValueError(
            f"Other text has `{'.'.join(path)}` of shape {list(own.shape)}, those of the run have "
            f"{shape}: {ONE_LENGTH}"
        )
    changed = value.clone()
    changed.index_copy_(axis, torch.tensor(list(rows), device=value.device), own.to(value))
    return changed


def _row_axis(one: Any, two: Any) -> int | None:
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim:
        doubled = [axis for axis in range(one.ndim) if two.shape[axis] == 2 * one.shape[axis]]
        return doubled[0] if doubled else None
    if isinstance(one, list) and isinstance(two, list) and len(two) == 2 * len(one) > 0:
        return IN_LIST
    return None


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(_same, one, two))
    return type(one) is type(two) and bool(one == two)


def _dimensions(value: Any) -> int:
    """Return how many axes a floating argument has, the rows' included; 0 for others."""
    listed = isinstance(value, list) and bool(value)
    tensor = value[0] if listed else value
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return 0
    return tensor.ndim + listed
