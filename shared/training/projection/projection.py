"""A LoRA kept off a concept's subspace while it trains: A V = 0, exactly, for any optimizer.

Inspired by the abstract of arXiv:2512.11194; the guarantee is the algebra. For a layer
y = W x + s B A x, A V = 0 gives (s B A) V = 0 for every B. Projecting the gradient alone does not
do it: A starts at random values, and Adam's scaling of single entries leaves the complement.
So A is projected at the start, its gradient before clipping, and A again after every step.

What it does not give: text outside span(V) still reaches the LoRA, and layers that read no text
can still learn the look, unless they have subspaces of their own. What the base model knows stays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ...arrays import Float, Tensor
from ..concept.subspace import ConceptSubspace, remove
from ..layers.subspaces import LayerSubspaces
from .factors import saved_projected_factors, saved_state

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}
"""Largest |A V| / |A| by the factors' dtype: what rounding leaves."""


class ProjectionFailed(RuntimeError):
    """The factors do not stand outside the subspace, or no step was projected."""


class Projection:
    """Projects the down factors of LoRA layers, those that read alike in one product.

    Use `attached` where an optimizer of torch does the steps; else call `project_weights` at the
    start and `after_step` after each step. In both cases call `project_gradients` before the
    clipping, and `project_weights` after anything else that writes weights: loading, resuming, an
    optimizer's switch to evaluation.
    """

    def __init__(
        self,
        factors: Mapping[str, Tensor],
        subspaces: Iterable[ConceptSubspace],
        *,
        layers: LayerSubspaces | None = None,
    ):
        """Take the factors as they are; nothing is projected yet.

        Args:
            factors: By module, [rank width] or [rank width *kernel], as `text_factors` gives them.
            subspaces: One per input width.
            layers: Subspaces of single layers, in place of those of their width.

        Raises:
            ValueError: Widths or names do not match, or a dtype is not a floating one.
        """
        for name, factor in factors.items():
            if factor.dtype not in TOLERANCES:
                raise ValueError(f"{name} is trained in {factor.dtype}, which is not supported.")
        self.factors = dict(factors)
        # Scripts that train in half precision widen the factors before they save them.
        self._dtypes = _dtypes(factors)
        self._bases = _bases(self.factors, subspaces, layers)
        self._stacked = Stacked(self._bases)
        self.steps = 0
        """Optimizer steps after which the weights were projected."""

    @torch.no_grad()
    def project_weights(self) -> None:
        """Replace every factor A by A (I - V V^T)."""
        self._stacked.project(self.factors)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project the gradients: after unscaling, before clipping. Twice does no harm."""
        named = self.factors.items()
        self._stacked.project({name: f.grad for name, f in named if f.grad is not None})

    def after_step(self, *_: object) -> None:
        """Project the weights and count the step; an optimizer's post hook, or called by hand."""
        self.project_weights()
        self.steps += 1

    @contextmanager
    def attached(self, *optimizers: torch.optim.Optimizer) -> Iterator["Projection"]:
        """Project now and around each step of the optimizers, for as long as the block lasts.

        Raises:
            ValueError: The optimizers train none of the factors' layers.
        """
        ours = {id(factor) for factor in self.factors.values() if factor.requires_grad}
        trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        if missing := len(ours - trained):
            raise ValueError(f"{missing} of {len(ours)} factors are in none of the optimizers.")
        self.project_weights()
        with ExitStack() as undo:
            for optimizer in optimizers:
                undo.callback(optimizer.register_step_pre_hook(self._before_step).remove)
                undo.callback(optimizer.register_step_post_hook(self.after_step).remove)
            yield self

    def residuals(self) -> dict[str, float]:
        """Return |A V| / |A| of every factor (Frobenius norms, 0 to 1)."""
        return _residuals(self.factors, self._bases)

    def check(self) -> float:
        """Return the largest residual at the end of a training.

        Raises:
            ProjectionFailed: It is larger than rounding explains, or no step was projected.
        """
        if not self.steps:
            raise ProjectionFailed("No optimizer step was projected: the hooks never ran.")
        return _check(self.factors, self._bases, self._dtypes)

    def _before_step(self, *_: object) -> None:
        self.project_gradients()


def residuals(
    factors: Mapping[str, Tensor],
    subspaces: Iterable[ConceptSubspace],
    layers: LayerSubspaces | None = None,
) -> dict[str, float]:
    """Return |A V| / |A| of down factors, computed in float64 (Frobenius norms, 0 to 1).

    Raises:
        ValueError: There is no subspace for a factor.
    """
    return _residuals(factors, _bases(factors, subspaces, layers))


def check(
    factors: Mapping[str, Tensor],
    subspaces: Iterable[ConceptSubspace],
    layers: LayerSubspaces | None = None,
) -> float:
    """Return the largest |A V| / |A| of down factors.

    Raises:
        ProjectionFailed: It is larger than what rounding to the factors' dtype leaves.
    """
    return _check(factors, _bases(factors, subspaces, layers), _dtypes(factors))


def check_file(
    path: Path, subspaces: Iterable[ConceptSubspace], layers: LayerSubspaces | None = None
) -> float:
    """Return the largest |A V| / |A| in a saved LoRA of kohya, PEFT or diffusers.

    Raises:
        ModelError: The file is no whole LoRA, changes a text encoder, or reads no text.
        ValueError: It lacks one of the layers.
        ProjectionFailed: A factor reaches into the subspace.
    """
    subspaces = list(subspaces)
    text = bool(subspaces) or layers is None
    factors = saved_projected_factors(saved_state(path), text=text, layers=layers, source=str(path))
    return check(factors, subspaces, layers)


def _bases(
    factors: Mapping[str, Tensor],
    subspaces: Iterable[ConceptSubspace],
    layers: LayerSubspaces | None,
) -> dict[str, Tensor]:
    """Return the basis of each factor: its layer's own, else that of its width."""
    subspaces = list(subspaces)
    by_width = {subspace.width: subspace.basis for subspace in subspaces}
    if len(by_width) < len(subspaces):
        raise ValueError("`subspaces` must have different widths; join concepts in one.")
    bases = layers.of(factors) if layers is not None else {}
    for name, factor in factors.items():
        width = factor.shape[1]
        if name not in bases and width not in by_width:
            raise ValueError(
                f"{name} reads states of width {width}; there are subspaces for "
                f"{sorted(by_width)}. Were they built with another model?"
            )
        basis = bases.setdefault(name, by_width.get(width))
        if len(basis) != width:
            raise ValueError(
                f"{name} reads inputs of width {width}, its subspace is for {len(basis)}."
            )
    return bases


def _residuals(factors: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, factor in factors.items():
        rows = factor.detach().double().cpu().movedim(1, -1)
        length = rows.norm()
        found[name] = float((rows @ bases[name]).norm() / length) if length else 0.0
    return found


def _dtypes(factors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: factor.dtype for name, factor in factors.items()}


def _check(
    factors: Mapping[str, Tensor], bases: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> float:
    found = _residuals(factors, bases)
    faults = [name for name in found if not found[name] <= TOLERANCES[dtypes[name]]]
    worst = max(found.values())
    if faults:
        raise ProjectionFailed(
            f"{len(faults)} of {len(found)} projected factors reach into the prohibited subspace, "
            f"up to |A V| / |A| = {worst:.1e}; first {sorted(faults)[0]}."
        )
    return worst


BLOCK = 2**22
"""Most elements of one product: its copies in float64 take 100 MB."""
Key = tuple[int, int, torch.device, torch.dtype]
"""Width, rows of each factor, where, in what."""


class Stacked:
    """Projects tensors that are known by name, each outside its own basis."""

    def __init__(self, bases: Mapping[str, Tensor]):
        """Take the bases.

        Args:
            bases: By name [width rank]; where several names share one object, so do they a product.
        """
        self._bases = bases
        self._moved: dict[tuple, Tensor] = {}

    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """Project tensors [rank width *kernel] along axis 1, in place.

        A basis of rank 0 leaves its tensor as it is, bit for bit.
        """
        stacks: dict[Key, list[str]] = {}
        for name, tensor in tensors.items():
            if self._bases[name].shape[1]:
                width = tensor.shape[1]
                key = (width, tensor.numel() // width, tensor.device, tensor.dtype)
                stacks.setdefault(key, []).append(name)
        for (width, rows, device, dtype), names in stacks.items():
            most = max(1, BLOCK // (width * rows))
            for start in range(0, len(names), most):
                some = names[start : start + most]
                views = [tensors[name].movedim(1, -1) for name in some]
                stack = torch.stack([view.reshape(rows, width) for view in views])
                clear = self._outside(stack, some, device).to(dtype).unbind()
                shaped = [part.view(v.shape) for part, v in zip(clear, views, strict=True)]
                torch._foreach_copy_(views, shaped)

    def _outside(
        self, stack: Float[Tensor, "name row width"], names: Sequence[str], device: torch.device
    ) -> Float[Tensor, "name row width"]:
        """Return the stack projected, in the precision to compute in."""
        # Trainers switch on TF32 and autocast, which would leave 1e-3; float64 is exempt from
        # both. Apple's GPUs have neither.
        wide = torch.float32 if device.type == "mps" else torch.float64
        key = (tuple(names), device)
        if key not in self._moved:
            bases = [self._bases[name] for name in names]
            if all(basis is bases[0] for basis in bases):
                self._moved[key] = bases[0].to(device, wide)
            else:
                self._moved[key] = _padded(bases).to(device, wide)
        return remove(stack.to(wide), self._moved[key])


def _padded(bases: Sequence[Tensor]) -> Float[Tensor, "name width rank"]:
    """Return the bases side by side; the zeros behind the smaller ones remove nothing."""
    most = max(basis.shape[1] for basis in bases)
    return torch.stack([
        torch.nn.functional.pad(basis, (0, most - basis.shape[1])) for basis in bases
    ])  # fmt: skip
