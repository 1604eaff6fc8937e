"""What the protection of a training does around OneTrainer's optimizer steps."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ...shared.patching import Function, HookMissing, patched
from ...shared.training.protection import PREFIX, Protection
from ..hooks import SHOWN
from .filter import TIMESTEPS, WEIGHTS
from .regions import NOISING, WITHOUT_LORA

CALLED = {
    "model_setup": (
        "predict", TIMESTEPS, "prepare_text_caching", "setup_train_device", "after_optimizer_step",
        "report_to_tensorboard", "calculate_loss", NOISING, WITHOUT_LORA,
    ),
    "data_loader": (
        "_preparation_modules", "_enumerate_input_modules", "_load_input_modules", "_create_mgds",
    ),
    "model": ("adapters",),
    "model_saver": ("save",),
}  # fmt: skip
"""Methods of a trainer's parts that are called or replaced."""
LOSSES = ("_diffusion_losses", "_flow_matching_losses")
"""Methods that compute the losses of a step, and read the weights in the batch."""


def check_hooks(trainer: Any) -> None:
    """Refuse a version of OneTrainer that lacks a place to hook into, all of it at once.

    Raises:
        HookMissing: With what is not there.
    """
    missing = [
        f"{part}.{name}"
        for part, names in CALLED.items()
        for name in names
        if not callable(getattr(getattr(trainer, part, None), name, None))
    ]
    setup = trainer.model_setup
    losses = [inspect.getsource(getattr(setup, name)) for name in LOSSES if hasattr(setup, name)]
    if not losses or any(f"batch['{WEIGHTS}']" not in source for source in losses):
        missing.append(f"batch['{WEIGHTS}'] in {' and '.join(LOSSES)}")
    if missing:
        raise HookMissing(
            f"OneTrainer has no {', '.join(missing)}: this version is not supported. Nothing was "
            "trained."
        )


@contextmanager
def gradient_hooks(trainer: Any, protection: Protection) -> Iterator[None]:
    """Project gradients before they are clipped, and weights after each step."""
    import modules.util.multi_gpu_util as reductions

    optimizer = trainer.config.optimizer
    # Then the step of a factor is made inside the backward pass, as soon as its gradient is there.
    fused = optimizer.optimizer.supports_fused_back_pass() and optimizer.fused_back_pass
    setup = trainer.model_setup
    with ExitStack() as undo:
        if fused and protection.projection:
            for factor in protection.projection.factors.values():
                hook = factor.register_post_accumulate_grad_hook(lambda _: protection.before_clip())
                undo.callback(hook.remove)
        # Called between the last backward pass of a step and the clipping, also with one GPU.
        for name in ("finish_async", "reduce_grads_mean"):
            undo.enter_context(patched(reductions, name, _then(protection.before_clip)))
        # Not the optimizer's own hooks: OneTrainer replaces the `step` of some optimizers.
        undo.enter_context(patched(setup, "after_optimizer_step", _then(protection.after_step)))
        yield


@contextmanager
def report_hooks(trainer: Any, protection: Protection) -> Iterator[None]:
    """Show values in TensorBoard beside the loss, and in the progress bar of the steps."""
    from tqdm import tqdm

    def report(original: Function) -> Function:
        def report_to_tensorboard(
            model: Any, config: Any, scheduler: Any, tensorboard: Any
        ) -> None:
            original(model, config, scheduler, tensorboard)
            for name, value in protection.scalars().items():
                tensorboard.add_scalar(name, value, model.train_progress.global_step)

        return report_to_tensorboard

    def postfix(original: Function) -> Function:
        def set_postfix(bar: tqdm, values: Any = None, *args: Any, **kwargs: Any) -> Any:
            if isinstance(values, dict) and "loss" in values:
                told = {name.removeprefix(PREFIX): value
                        for name, value in protection.scalars().items()}  # fmt: skip
                values |= {SHOWN[name]: told[name] for name in told if name in SHOWN}
            return original(bar, values, *args, **kwargs)

        return set_postfix

    with (
        patched(trainer.model_setup, "report_to_tensorboard", report),
        patched(tqdm, "set_postfix", postfix),
    ):
        yield


def _then(also: Callable[[], None]) -> Callable[[Function], Function]:
    """Return what makes a function call another one after itself."""

    def wrap(original: Function) -> Function:
        def called(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            also()
            return result

        return called

    return wrap
