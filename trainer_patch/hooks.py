"""What the protection of a training does inside accelerate, its optimizer and the progress bar."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..shared.patching import Function, patched
from ..shared.training.filter.filter import Gather, alone
from ..shared.training.projection.factors import UnsupportedTraining
from ..shared.training.protection import PREFIX, Protection
from .checkpoints import load_progress, save_progress

UNSUPPORTED_MODES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "TP")
"""Of accelerate: parameters that are cut up or kept elsewhere cannot be projected in place."""
SHOWN = {"filtered_share": "filtered", "residual": "residual"}
"""Values in the progress bar, and what they are called there."""


def gather_of(accelerator: Any) -> Gather:
    """Return accelerate's gathering of all processes' rows, for the filter."""
    if accelerator.num_processes == 1:
        return alone

    def gather(values: Tensor) -> Tensor:
        return accelerator.gather(values.to(accelerator.device)).cpu()

    return gather


@contextmanager
def optimizer_hooks(optimizers: Sequence[Optimizer], protection: Protection) -> Iterator[None]:
    """Project around each step of the optimizer that trains the projected factors.

    Raises:
        UnsupportedTraining: None of them trains all of the factors.
    """
    if protection.projection is None:
        yield
        return
    factors = {id(factor) for factor in protection.projection.factors.values()}
    for optimizer in optimizers:
        if factors <= {id(each) for group in optimizer.param_groups for each in group["params"]}:
            break
    else:
        raise UnsupportedTraining(
            f"No optimizer trains all {len(factors)} LoRA factors that are projected. Make it from "
            "the network's parameters after the LoRA was added."
        )
    before = optimizer.register_step_pre_hook(lambda *_: protection.before_clip())
    after = optimizer.register_step_post_hook(lambda *_: protection.after_step())
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def accelerate_hooks(owner: Any, protection: Callable[[], Protection | None]) -> Iterator[None]:
    """Take part in clipping, logging, saving and loading.

    Args:
        owner: An accelerator, or the class of all.
        protection: Asked at each call; None while there is nothing to protect.
    """

    def clip(original: Function) -> Function:
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            if found := protection():
                found.before_clip()  # linear, so that gradient scaling does not matter
            return original(*args, **kwargs)

        return clip_grad_norm_

    def log(original: Function) -> Function:
        # Its decorators hide its signature, and `owner` may be a class: `values` is the first dict.
        def log(*args: Any, **kwargs: Any) -> Any:
            extra = found.scalars() if (found := protection()) else {}
            if "values" in kwargs:
                return original(*args, **kwargs | {"values": {**kwargs["values"], **extra}})
            place = next(at for at, each in enumerate(args) if isinstance(each, dict))
            return original(*args[:place], {**args[place], **extra}, *args[place + 1 :], **kwargs)

        return log

    def save(original: Function) -> Function:
        def save_state(*args: Any, **kwargs: Any) -> Any:
            folder = original(*args, **kwargs)
            if found := protection():
                save_progress(found, Path(folder))
            return folder

        return save_state

    def load(original: Function) -> Function:
        def load_state(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            if found := protection():
                load_progress(found, Path(call.get("input_dir") or "").expanduser())
            return result

        return load_state

    with ExitStack() as undo:
        for name, wrap in (("clip_grad_norm_", clip), ("log", log),
                           ("save_state", save), ("load_state", load)):  # fmt: skip
            undo.enter_context(patched(owner, name, wrap))
        yield


@contextmanager
def progress_hooks(protection: Callable[[], Protection | None]) -> Iterator[None]:
    """Show values in the progress bar of the steps, behind those of the script."""
    from tqdm import tqdm

    def postfix(original: Function) -> Function:
        def set_postfix(*args: Any, **kwargs: Any) -> Any:
            found = protection()
            if found and "lr" in kwargs:  # other bars, of downloads and sampling, tell no rate
                for name, value in found.scalars().items():
                    if (shown := name.removeprefix(PREFIX)) in SHOWN:
                        kwargs[SHOWN[shown]] = f"{value:.2g}"
            return original(*args, **kwargs)

        return set_postfix

    with patched(tqdm, "set_postfix", postfix):
        yield
