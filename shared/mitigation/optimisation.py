"""What the methods that follow a gradient share: the target, the loop, checkpointing."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..score.denoiser import Conditioning, Denoiser
from ..score.trajectory import gradient_rows, loss_scale, not_finite
from ..wording import counted
from .method import Mitigation, Start

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""What diffusers sets on the parts of a network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Descent:
    """Where a descent of |D| ended, per row."""

    rows: Tensor
    """[row ...] the best that were measured."""
    before: Tensor
    """[row] |D|, L2 norm, float64 on the CPU."""
    after: Tensor
    """[row] |D| of `rows`, at most `before`."""
    iterations: Tensor
    """[row] optimizer steps that were made."""


class Optimised(Mitigation):
    """A change of the start that a descent found; one row per image."""

    def __init__(
        self, descent: Descent, *, cond: Conditioning | None = None, x: Tensor | None = None,
        changes: tuple[str, ...] = (),
    ):  # fmt: skip
        super().__init__(cond=cond, x=x, changes=changes)
        self.before, self.after = descent.before, descent.after
        self.iterations = descent.iterations


def check_descent(
    learning_rate: float, target: float | None, target_quantile: float, batch_size: int | None
) -> None:
    """Raise ValueError unless the settings of a descent make sense."""
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"`learning_rate` must be above 0, got {learning_rate}.")
    if target is not None and not target >= 0:
        raise ValueError(f"`target` must be at least 0, got {target}.")
    if not 0 <= target_quantile <= 1:
        raise ValueError(f"`target_quantile` must lie in 0..1, got {target_quantile}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


def find_target(start: Start, target: float | None, target_quantile: float) -> float:
    """Return the |D| at which a row may stop (L2 norm, latent units).

    Args:
        start: The run; its calibration gives the target where there is none.
        target: Already in these units.
        target_quantile: Of the control prompts' scores at single seeds, 0..1.

    Raises:
        ValueError: There is neither a target nor a calibration of the first step.
    """
    if target is not None:
        return target
    calibration = start.calibration
    if calibration is None:
        raise ValueError(
            "There is no calibration to take a target from: make one for this model with "
            "`unmemorize calibrate`, or give `target` as an L2 norm of the text noise."
        )
    if (steps := calibration.settings.get("steps", 1)) != 1:
        raise ValueError(
            f"The calibration averages {steps} steps, the target is for the first alone: "
            "calibrate with one step, or give `target` as an L2 norm of the text noise."
        )
    return calibration.seed_scores.flatten().quantile(target_quantile).item()


def descend(
    rows: Sequence[Tensor],
    magnitude: Callable[[list[int], Tensor], Tensor],
    *,
    target: float,
    learning_rate: float,
    iterations: int,
    denoiser: Denoiser,
    batch_size: int | None = None,
    keep_norm: bool = False,
) -> Descent:
    """Lower each row's |D| by AdamW until it reaches the target, and keep the best.

    Rows know nothing of each other: AdamW works element by element, and a row that is there is not
    computed any more.

    Args:
        rows: Starting points, in float32 or wider.
        magnitude: Of the rows named first, stacked second, [row]; NaN is an error.
        target: A row at or below it stops.
        learning_rate: Of AdamW, whose other settings are torch's defaults, as in the papers.
        iterations: Optimizer steps at most; there is one more evaluation than steps.
        denoiser: Decides the size of batches and the scale of the loss.
        batch_size: Rows of one pass; None chooses by device and latent size.
        keep_norm: Scale each row back to the L2 norm it came with, after every step.

    Raises:
        PredictionError: |D| is not finite.
    """
    scale = loss_scale(denoiser)
    leaves = [row.detach().clone().requires_grad_() for row in rows]
    norms = [leaf.detach().norm() for leaf in leaves]
    best, before = [leaf.detach().clone() for leaf in leaves], [math.inf] * len(leaves)
    after, steps = [math.inf] * len(leaves), [0] * len(leaves)
    for batch in batches(denoiser, len(leaves), batch_size):
        active = list(range(len(leaves))[batch])
        optimizer = torch.optim.AdamW(leaves[batch], lr=learning_rate)
        for iteration in range(iterations + 1):
            with torch.set_grad_enabled(iteration < iterations):
                measured = magnitude(active, torch.stack([leaves[i] for i in active]))
            values = measured.tolist()
            if not all(map(math.isfinite, values)):
                steps_done = counted(iteration, "optimizer step", "optimizer steps")
                raise not_finite(f"The text noise after {steps_done}", denoiser)
            for i, value in zip(active, values, strict=True):
                before[i] = value if iteration == 0 else before[i]
                if value < after[i]:
                    after[i], best[i] = value, leaves[i].detach().clone()
            above = [place for place, value in enumerate(values) if value > target]
            active = [active[place] for place in above]
            if iteration == iterations or not active:
                break
            moving = [leaves[i] for i in active]
            grads = torch.autograd.grad(scale * measured[above].sum(), moving)
            for i, gradient in zip(active, grads, strict=True):
                leaves[i].grad = gradient / scale
                steps[i] += 1
            optimizer.step()
            optimizer.zero_grad()  # rows without a gradient are passed over
            if keep_norm:
                with torch.no_grad():
                    for i in active:
                        leaves[i] *= norms[i] / leaves[i].norm()
    return Descent(
        rows=torch.stack(best),
        before=torch.tensor(before, dtype=torch.float64),
        after=torch.tensor(after, dtype=torch.float64),
        iterations=torch.tensor(steps),
    )


def batches(denoiser: Denoiser, rows: int, batch_size: int | None) -> Iterator[slice]:
    """Yield slices of so many rows as one pass with its gradient should have."""
    size = batch_size or gradient_rows(denoiser)
    for first in range(0, rows, size):
        yield slice(first, first + size)


@contextmanager
def gradients(network: nn.Module | None, *, checkpointing: bool = False) -> Iterator[None]:
    """Allow gradients whatever the caller has switched off, but none of the weights.

    Args:
        network: Its weights stay out of the graph, which then holds fewer activations; what they
            required is put back. None leaves the network alone.
        checkpointing: Recompute activations on the way back, as diffusers networks can, which costs
            a forward pass and saves most of the memory; the network's own choice is put back.

    Raises:
        ValueError: The network cannot recompute its activations.
    """
    if checkpointing and not hasattr(network, "enable_gradient_checkpointing"):
        given = "the host gave no network" if network is None else "this network cannot"
        raise ValueError(
            f"`checkpointing` needs a network of diffusers, {given}: switch it off, or use a "
            "smaller `batch_size`."
        )
    with ExitStack() as undo:
        if network is not None:
            for parameter in network.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            if checkpointing:
                for module in network.modules():
                    undo.callback(_put_back, module, _choice(module))
                network.enable_gradient_checkpointing()
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        yield


def _choice(module: nn.Module) -> dict:
    return {name: vars(module)[name] for name in CHECKPOINTING if name in vars(module)}


def _put_back(module: nn.Module, choice: dict) -> None:
    for name in CHECKPOINTING:
        vars(module).pop(name, None)
    vars(module).update(choice)
