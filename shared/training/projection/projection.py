"""A LoRA kept off a concept's subspace while it trains: A V = 0, exactly, for any optimizer.

Inspired by the abstract of arXiv:2512.11194; the guarantee is the algebra. For a layer
y = W x + s B A x, A V = 0 gives (s B A) V = 0 for every B. Projecting the gradient alone is not
enough: A starts at random values, and Adam's scaling of single entries leaves the complement.
So A is projected at the start, its gradient before clipping, and A again after every step.

What this does not give: text outside span(V) still reaches the LoRA, and layers that read no text
can still learn the look, unless they have subspaces of their own. What the base model knows stays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ...arrays import Tensor
from ..concept.subspace import ConceptSubspace
from ..layers.subspaces import LayerSubspaces
from .factors import UnsupportedTraining, projected_factors_of, saved_state
from .products import Products, hadamard_columns, kronecker_basis
from .removal import Removal, outside_columns

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}
"""Largest |A V| / |A| by the factors' dtype: what rounding leaves."""
PLAIN = Products()
"""Every factor is a plain LoRA's."""
BLOCK = 2**22
"""Most elements of one product: its copies in float64 take 100 MB."""


class ProjectionFailed(RuntimeError):
    """A factor reaches into its subspace, or no step was projected."""


class Projection:
    """Projects the down factors of LoRA layers, those of one shape in one product.

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
        products: Products = PLAIN,
    ):
        """Take the factors as they are; nothing is projected yet.

        Args:
            factors: By module, [rank width] or [rank width *kernel], as `text_factors` gives them.
            subspaces: One per input width.
            layers: Subspaces of single layers, in place of those of their width.
            products: Which of the factors are LoKr's or LoHa's.

        Raises:
            ValueError: Widths or names do not match, or a dtype is not a floating one.
            UnsupportedTraining: A product of factors has no room outside of its subspace.
        """
        for name, factor in factors.items():
            if factor.dtype not in TOLERANCES:
                raise ValueError(f"{name} is trained in {factor.dtype}, which is not supported.")
        self.factors = dict(factors)
        # Scripts that train in half precision widen the factors before they save them.
        self._tolerances = {name: TOLERANCES[factor.dtype] for name, factor in factors.items()}
        self._bases = _bases(self.factors, list(subspaces), layers, products)
        self._partners = {n: each for n, each in products.partners.items() if n in self.factors}
        plain = {name: b for name, b in self._bases.items() if name not in self._partners}
        self._removal = Removal(plain)
        self.steps = 0
        """Optimizer steps after which the weights were projected."""

    @torch.no_grad()
    def project_weights(self) -> None:
        """Replace every factor A by A (I - V V^T)."""
        self._project(self.factors)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project the gradients: after unscaling, before clipping. Twice does no harm."""
        named = self.factors.items()
        self._project({name: f.grad for name, f in named if f.grad is not None})

    def after_step(self, *_: object) -> None:
        """Project the weights and count the step; an optimizer's post hook, or called by hand."""
        self.project_weights()
        self.steps += 1

    @contextmanager
    def attached(self, *optimizers: torch.optim.Optimizer) -> Iterator["Projection"]:
        """Project now and around each step of the optimizers, for as long as the block lasts.

        Raises:
            ValueError: The optimizers do not train all factors.
        """
        ours = {id(factor) for factor in self.factors.values() if factor.requires_grad}
        trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        if missing := len(ours - trained):
            raise ValueError(f"{missing} of {len(ours)} factors are in none of the optimizers.")
        self.project_weights()
        with ExitStack() as undo:
            for optimizer in optimizers:
                before = optimizer.register_step_pre_hook(lambda *_: self.project_gradients())
                undo.callback(before.remove)
                undo.callback(optimizer.register_step_post_hook(self.after_step).remove)
            yield self

    def residuals(self) -> dict[str, float]:
        """Return |A V| / |A| of every factor, computed in float64 (Frobenius norms, 0 to 1).

        Of LoKr and LoHa, V is what their factor must leave out, with a largest singular value of 1.
        """
        shares = {}
        for name, factor in self.factors.items():
            rows = factor.detach().cpu().double().movedim(1, -1)
            left_out = self._bases[name]
            if name in self._partners:
                columns = hadamard_columns(left_out, self._partners[name].detach().cpu().double())
                largest = torch.linalg.matrix_norm(columns, 2) if columns.numel() else 0.0
                left_out = columns / largest if largest else columns
            length = rows.norm()
            shares[name] = float((rows @ left_out).norm() / length) if length else 0.0
        return shares

    def verify(self) -> float:
        """Return the largest residual.

        Raises:
            ProjectionFailed: It is larger than what rounding to the factor's dtype leaves.
        """
        residuals = self.residuals()
        worst = max(residuals.values())
        if faults := self._above_rounding(residuals):
            raise ProjectionFailed(
                f"{len(faults)} of {len(residuals)} projected factors reach into the prohibited "
                f"subspace, up to |A V| / |A| = {worst:.1e}; first {min(faults)}."
            )
        return worst

    def is_clear(self) -> bool:
        """Return whether every factor lies outside its subspace but for rounding."""
        return not self._above_rounding(self.residuals())

    def check(self) -> float:
        """Return the largest residual at the end of a training.

        Raises:
            ProjectionFailed: It is larger than rounding explains, or no step was projected.
        """
        if not self.steps:
            raise ProjectionFailed("No optimizer step was projected: the hooks never ran.")
        return self.verify()

    def _above_rounding(self, residuals: Mapping[str, float]) -> list[str]:
        return [name for name, share in residuals.items() if not share <= self._tolerances[name]]

    def _project(self, tensors: Mapping[str, Tensor]) -> None:
        """Project tensors [rank width *kernel] along axis 1, in place.

        Tensors of one shape are stacked: launches, not arithmetic, are what small products cost. A
        basis of rank 0 leaves its tensor as it is, bit for bit.
        """
        stacks: dict[tuple[int, int, torch.device, torch.dtype], list[str]] = {}
        for name, tensor in tensors.items():
            if name in self._partners:
                columns = self._bases[name], self._partners[name]
                tensor.copy_(outside_columns(tensor, *columns).to(tensor.dtype))
            elif self._bases[name].shape[1]:
                width = tensor.shape[1]
                key = (width, tensor.numel() // width, tensor.device, tensor.dtype)
                stacks.setdefault(key, []).append(name)
        for (width, rows, _, dtype), names in stacks.items():
            most = max(1, BLOCK // (width * rows))
            for start in range(0, len(names), most):
                some = names[start : start + most]
                views = [tensors[name].movedim(1, -1) for name in some]
                stack = torch.stack([view.reshape(rows, width) for view in views])
                clear = self._removal.outside(stack, some).to(dtype).unbind()
                shaped = [part.view(v.shape) for part, v in zip(clear, views, strict=True)]
                torch._foreach_copy_(views, shaped)


def check_file(
    path: Path,
    subspaces: Iterable[ConceptSubspace],
    layers: LayerSubspaces | None = None,
    *,
    text_encoder: bool = False,
) -> float:
    """Return the largest |A V| / |A| in a saved LoRA of kohya, PEFT or diffusers.

    Args:
        path: The file.
        subspaces: One per input width.
        layers: Subspaces of single layers.
        text_encoder: It may hold a text encoder's part, of which nothing is said.

    Raises:
        ModelError: The file is no whole LoRA, changes a text encoder, or reads no text.
        ValueError: It lacks one of the layers.
        ProjectionFailed: A factor reaches into the subspace.
    """
    subspaces = list(subspaces)
    text = bool(subspaces) or layers is None
    state = saved_state(path)
    factors = projected_factors_of(
        state, text=text, layers=layers, source=str(path), text_encoder=text_encoder
    )
    products = Products.of(state.items(), factors)
    return Projection(factors, subspaces, layers=layers, products=products).verify()


def _bases(
    factors: Mapping[str, Tensor],
    subspaces: Sequence[ConceptSubspace],
    layers: LayerSubspaces | None,
    products: Products,
) -> dict[str, Tensor]:
    """Return the basis of each factor: its layer's own, else that of its width.

    A factor of LoKr has the larger one that it must leave out, in its own width.
    """
    by_width = {subspace.width: subspace.basis for subspace in subspaces}
    if len(by_width) < len(subspaces):
        raise ValueError("`subspaces` must have different widths; join concepts in one.")
    bases = layers.of(factors) if layers is not None else {}
    for name, factor in factors.items():
        outer = products.outer.get(name, 1)
        width = factor.shape[1] * outer
        if name not in bases:
            if width not in by_width:
                raise ValueError(
                    f"{name} reads states of width {width}; there are subspaces for "
                    f"{sorted(by_width)}. Were they built with another model?"
                )
            bases[name] = by_width[width]
        if len(bases[name]) != width:
            raise ValueError(
                f"{name} reads inputs of width {width}, its subspace is for {len(bases[name])}."
            )
        taken = bases[name].shape[1]
        if name in products.outer:
            bases[name] = kronecker_basis(bases[name], factor.shape[1])
            taken = bases[name].shape[1]
        elif name in products.partners:
            taken *= len(products.partners[name])
        if taken >= factor.shape[1] and (name in products.outer or name in products.partners):
            raise UnsupportedTraining(
                f"{name} is LoKr or LoHa, whose factor would have to leave out {taken} of its "
                f"{factor.shape[1]} directions, and nothing would be learnt: lower --project_cap, "
                "or choose a plain LoRA, a smaller rank of LoHa or a smaller factor of LoKr."
            )
    return bases
