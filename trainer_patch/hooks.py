"""What a protection does inside a trainer's libraries; refusals that trainers share."""

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..shared.files.storage import StorageError, write_text
from ..shared.files.weights import ModelError
from ..shared.patching import Function, HookMissing, patched
from ..shared.training.concept.fitting import ConceptNotSeparable
from ..shared.training.filter.filter import alone
from ..shared.training.projection.factors import UnsupportedTraining
from ..shared.training.projection.projection import ProjectionFailed
from ..shared.training.protection import PREFIX, Protection, ProtectionFailed
from ..shared.training.state import READER
from ..shared.training.subtracted import NothingSubtracted
from .options import OptionError

logger = logging.getLogger(__name__)

UNSUPPORTED_MODES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "TP")
"""Of accelerate: parameters that are cut up or kept elsewhere cannot be projected in place."""
REFUSALS = (
    OptionError, UnsupportedTraining, HookMissing, ConceptNotSeparable, ModelError, StorageError,
    ProjectionFailed, ProtectionFailed, NothingSubtracted,
)  # fmt: skip
"""What the user can do something about; anything else is a defect, and keeps its traceback."""
SHOWN = {
    "filtered_share": "filtered", "memorized_images": "memorized", "residual": "residual",
    "subtracted_share": "subtracted",
}  # fmt: skip
"""Values in the progress bar, and their names there."""
STATE = "unmemorize.json"
"""In the folder of a checkpoint: what a resumed training needs."""


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """End the program with one line, and without a traceback, where a protection is refused.

    For launchers and for what a trainer's own script calls: the user typed a command.

    Raises:
        SystemExit: With the message of what was raised in the block.
    """
    try:
        yield
    except REFUSALS as error:
        raise SystemExit(f"unmemorize: {' '.join(str(error).split())}") from error


def refuse(faults: Iterable[str]) -> None:
    """Raise UnsupportedTraining with all faults at once, if there are any."""
    if listed := list(faults):
        raise UnsupportedTraining(f"Not supported: {'; '.join(listed)}.")


def require(owner: Any, name: str, hooks: Mapping[str, Sequence[str]], known: str) -> None:
    """Refuse an object that lacks methods, or methods that lack parameters.

    Args:
        owner: Of the trainer.
        name: What the message calls it.
        hooks: By method the parameters that are read.
        known: Versions that work.

    Raises:
        HookMissing: With all that is lacking.
    """
    faults = []
    for method, parameters in hooks.items():
        function = getattr(owner, method, None)
        have = inspect.signature(function).parameters if function else ()
        lacking = [each for each in parameters if each not in have]
        if function is None or lacking:
            faults.append(method if function is None else f"{method}({', '.join(lacking)})")
    if faults:
        raise HookMissing(
            f"{name} has no {', '.join(faults)}: this version is not supported. Known to work: "
            f"{known}."
        )


def distribution_faults(accelerator: Any) -> Iterator[str]:
    """Yield why parameters cannot be projected in place, as accelerate distributes them."""
    mode = str(accelerator.distributed_type).rpartition(".")[2]
    if mode in UNSUPPORTED_MODES:
        yield f"{mode} cuts parameters up: use one process, or several with DDP"


def calling(
    *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> Callable[[Function], Function]:
    """Return what makes a function call others before or after itself."""

    def wrap(original: Function) -> Function:
        def called(*args: Any, **kwargs: Any) -> Any:
            if before:
                before()
            result = original(*args, **kwargs)
            if after:
                after()
            return result

        return called

    return wrap


def shown_values(protection: Protection) -> dict[str, float]:
    """Return what the progress bar of the steps shows, by the names that it has there."""
    values = {name.removeprefix(PREFIX): each for name, each in protection.scalars().items()}
    return {SHOWN[name]: each for name, each in values.items() if name in SHOWN}


def save_progress(protection: Protection, folder: Path) -> None:
    """Put what a resumed training needs into a checkpoint's folder."""
    write_text(folder / STATE, json.dumps(protection.state_dict()))


def load_progress(protection: Protection, folder: Path) -> None:
    """Continue from a checkpoint whose weights are loaded, also of an unprotected training."""
    state = folder / STATE
    if state.is_file():
        protection.load_state_dict(READER.parse_file(state))
    else:
        logger.warning("%s is not there: the checkpoint's training was not protected.", state)
        protection.start()


def processes_of(accelerator: Any) -> dict[str, Any]:
    """Return number, count and gathering of accelerate's processes, as `Protection` takes them."""

    def gather(values: Tensor) -> Tensor:
        return accelerator.gather(values.to(accelerator.device)).cpu()

    number, count = accelerator.process_index, accelerator.num_processes
    return {"process": number, "processes": count, "gather": alone if count == 1 else gather}


def finish(protection: Protection, accelerator: Any = None) -> None:
    """End a training: the first process reports what all have written.

    Raises:
        ProtectionFailed: Something that was requested had not happened.
    """
    protection.flush()
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if accelerator is None or accelerator.is_main_process:
        protection.finish()


def end_in_time(protection: Protection, finish: Callable[[], None]) -> None:
    """End the program, in success, where a training is to end at the file that was just saved.

    Args:
        protection: Of the training.
        finish: Ends the training as at its last step.

    Raises:
        SystemExit: With the exit code 0.
    """
    if protection.ends:
        finish()
        logger.warning("The training ends here, as --mem_stop asks: %s", protection.ends)
        raise SystemExit(0)


@contextmanager
def first_step_checked(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before the first step of any optimizer of torch while the block lasts.

    What it raises ends the training before a weight has changed.
    """
    checked = False

    def before_step(*_: Any) -> None:
        nonlocal checked
        if not checked:
            check()
        checked = True

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def optimizer_hooks(optimizers: Sequence[Optimizer], protection: Protection) -> Iterator[None]:
    """Project around each step of the optimizer that trains the projected factors.

    Before the first step of each of them, `Protection.check_attached` must hold.

    Raises:
        UnsupportedTraining: None of them trains all of the factors.
    """
    with ExitStack() as undo:
        for each in optimizers:
            check = each.register_step_pre_hook(lambda *_: protection.check_attached())
            undo.callback(check.remove)
        with _projected_steps(optimizers, protection):
            yield


@contextmanager
def _projected_steps(optimizers: Sequence[Optimizer], protection: Protection) -> Iterator[None]:
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
def accelerate_hooks(accelerator: Any, protection: Protection) -> Iterator[None]:
    """Take part in clipping, logging, saving and loading, for as long as the block lasts."""

    def log(original: Function) -> Function:
        def log(values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return original({**values, **protection.scalars()}, *args, **kwargs)

        return log

    def save(original: Function) -> Function:
        def save_state(*args: Any, **kwargs: Any) -> Any:
            folder = original(*args, **kwargs)
            save_progress(protection, Path(folder))
            return folder

        return save_state

    def load(original: Function) -> Function:
        def load_state(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            load_progress(protection, Path(call.get("input_dir") or "").expanduser())
            return result

        return load_state

    clip = calling(before=protection.before_clip)  # linear: gradient scaling does not matter
    with ExitStack() as undo:
        for name, wrap in (("clip_grad_norm_", clip), ("log", log),
                           ("save_state", save), ("load_state", load)):  # fmt: skip
            undo.enter_context(patched(accelerator, name, wrap))
        yield


@contextmanager
def progress_hooks(protection: Protection) -> Iterator[None]:
    """Show values in the progress bar of the steps, behind those of the script."""
    from tqdm import tqdm

    def postfix(original: Function) -> Function:
        def set_postfix(*args: Any, **kwargs: Any) -> Any:
            if "lr" in kwargs:  # bars of downloads and of sampling have no learning rate
                shown = shown_values(protection).items()
                kwargs |= {name: f"{each:.2g}" for name, each in shown}
            return original(*args, **kwargs)

        return set_postfix

    with patched(tqdm, "set_postfix", postfix):
        yield
