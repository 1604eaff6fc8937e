"""A LoRA kept off a concept's subspace while it trains: A V = 0, exactly, for any optimizer.

Inspired by the abstract of arXiv:2512.11194; the guarantee is the algebra. For a layer
y = W x + s B A x, A V = 0 gives (s B A) V = 0 for every B. Projecting the gradient alone does not
do it: A starts at random values, and Adam's scaling of single entries leaves the complement.
So A is projected at the start, its gradient before clipping, and A again after every step.

What it does not give: text outside span(V) still reaches the LoRA, and layers that read no text
can still learn the look. What the base model knows stays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .lora_factors import saved_factors
from .subspace import ConceptSubspace, remove

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}
"""Largest |A V| / |A| by the factors' dtype: what rounding leaves."""


BLOCK = 2**22
"""Most elements of one product: its copies in float64 take 100 MB."""


class ProjectionFailed(RuntimeError):
    """The factors do not stand outside the subspace, or no step was projected."""


class Projection:
    """Projects the down factors of text-fed layers, all of one width in one product.

    Use `attached` where an optimizer of torch does the steps; else call `project_weights` at the
    start and `after_step` after each step. In both cases call `project_gradients` before the
    clipping, and `project_weights` after anything else that writes weights: loading, resuming, an
    optimizer's switch to evaluation.
    """

    def __init__(self, factors: Mapping[str, Tensor], subspaces: Iterable[ConceptSubspace]):
        """Take the factors as they are; nothing is projected yet.

        Args:
            factors: By module, [rank width] or [rank width *kernel], as `text_factors` gives them.
            subspaces: One per input width.

        Raises:
            ValueError: Widths do not match, or a dtype is not a floating one.
        """
        subspaces = list(subspaces)
        by_width = {subspace.width: subspace for subspace in subspaces}
        if len(by_width) < len(subspaces):
            raise ValueError("`subspaces` must have different widths; join concepts in one.")
        for name, factor in factors.items():
            if factor.shape[1] not in by_width:
                raise ValueError(
                    f"{name} reads states of width {factor.shape[1]}; there are subspaces for "
                    f"{sorted(by_width)}. Were they built with another model?"
                )
            if factor.dtype not in TOLERANCES:
                raise ValueError(f"{name} is trained in {factor.dtype}, which is not supported.")
        self.factors = dict(factors)
        self._subspaces = by_width
        self._bases: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self.steps = 0
        """Optimizer steps after which the weights were projected."""

    @torch.no_grad()
    def project_weights(self) -> None:
        """Replace every factor A by A (I - V V^T)."""
        self._project(list(self.factors.values()))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project the gradients: after unscaling, before clipping. Twice does no harm."""
        factors = self.factors.values()
        self._project([factor.grad for factor in factors if factor.grad is not None])

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
        return residuals(self.factors, self._subspaces.values())

    def check(self) -> float:
        """Return the largest residual at the end of a training.

        Raises:
            ProjectionFailed: It is larger than rounding explains, or no step was projected.
        """
        if not self.steps:
            raise ProjectionFailed("No optimizer step was projected: the hooks never ran.")
        return check(self.factors, self._subspaces.values())

    def _before_step(self, *_: object) -> None:
        self.project_gradients()

    def _project(self, tensors: Sequence[Tensor]) -> None:
        """Project tensors along axis 1 in place, stacked by width, device and dtype."""
        stacks: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            if self._subspaces[tensor.shape[1]].rank:  # nothing to remove changes no bit
                key = (tensor.shape[1], tensor.device, tensor.dtype)
                stacks.setdefault(key, []).append(tensor.movedim(1, -1))
        for key, views in stacks.items():
            rows = torch.cat([view.reshape(-1, key[0]) for view in views])
            basis = self._basis(key)
            blocks = rows.split(max(1, BLOCK // key[0]))
            clear = [remove(block.to(basis.dtype), basis).to(rows.dtype) for block in blocks]
            parts = torch.cat(clear).split([view.numel() // key[0] for view in views])
            shaped = [part.view(view.shape) for part, view in zip(parts, views, strict=True)]
            torch._foreach_copy_(views, shaped)

    def _basis(self, key: tuple[int, torch.device, torch.dtype]) -> Tensor:
        """Return V on a device, in the dtype to compute in."""
        width, device, _ = key
        if key not in self._bases:
            # Trainers switch on TF32 and autocast, which would leave 1e-3; float64 is exempt from
            # both. Apple's GPUs have neither.
            wide = torch.float32 if device.type == "mps" else torch.float64
            self._bases[key] = self._subspaces[width].basis.to(device, wide)
        return self._bases[key]


def residuals(
    factors: Mapping[str, Tensor], subspaces: Iterable[ConceptSubspace]
) -> dict[str, float]:
    """Return |A V| / |A| of down factors, computed in float64 (Frobenius norms, 0 to 1).

    Raises:
        ValueError: There is no subspace of a factor's width.
    """
    bases = {subspace.width: subspace.basis for subspace in subspaces}
    found = {}
    for name, factor in factors.items():
        if factor.shape[1] not in bases:
            raise ValueError(f"{name} reads states of width {factor.shape[1]}, not {list(bases)}.")
        rows = factor.detach().double().cpu().movedim(1, -1)
        length = rows.norm()
        found[name] = float((rows @ bases[rows.shape[-1]]).norm() / length) if length else 0.0
    return found


def check(factors: Mapping[str, Tensor], subspaces: Iterable[ConceptSubspace]) -> float:
    """Return the largest |A V| / |A| of down factors.

    Raises:
        ProjectionFailed: It is larger than what rounding to the factors' dtype leaves.
    """
    found = residuals(factors, subspaces)
    faults = [name for name in found if not found[name] <= TOLERANCES[factors[name].dtype]]
    worst = max(found.values())
    if faults:
        raise ProjectionFailed(
            f"{len(faults)} of {len(found)} text-fed factors reach into the prohibited subspace, "
            f"up to |A V| / |A| = {worst:.1e}; first {sorted(faults)[0]}."
        )
    return worst


def check_file(path: Path, subspaces: Iterable[ConceptSubspace]) -> float:
    """Return the largest |A V| / |A| in a saved LoRA of kohya, PEFT or diffusers.

    Raises:
        ModelError: The file is no whole LoRA, changes a text encoder, or reads no text.
        ProjectionFailed: A factor reaches into the subspace.
    """
    return check(saved_factors(path), subspaces)
