"""One protected training of OneTrainer, from its start to its end."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...shared.patching import Function, patched
from ...shared.training.projection.factors import UnsupportedTraining
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.settings import ProtectionSettings
from ..hooks import calling, load_progress, save_progress, shown_values
from ..options import NAMES, settings_from
from ..typed import refuse_nothing
from .adapter import StepAdapter
from .checks import check_configuration, check_hooks, trained_encoders
from .data import BatchSamples, TextSide

logger = logging.getLogger(__name__)

MODULE = __package__
"""What is typed."""
BACKUP = "INTERNAL"
"""Format of backups, which are folders."""
TRAINED_TIMESTEPS = 1000
"""Of the models that are covered; the configuration has its range in shares of them."""


def attach(trainer: Any, given: Mapping[str, Any]) -> list[Protection]:
    """Take part in a trainer's `start` and `end`; between them lie the steps.

    Both are replaced on the trainer itself, which does one training and is then thrown away.

    Args:
        trainer: Of OneTrainer, that has not started.
        given: Options by name, before those of its configuration.

    Returns:
        The training's protection, once it has started; empty where none is requested.
    """
    undo, started, ended = ExitStack(), trainer.start, trainer.end
    protections: list[Protection] = []

    def start() -> None:
        config = trainer.config
        named = {name: getattr(config, name) for name in NAMES} | given
        refuse_nothing(named, MODULE, "--mem_filter x1.5")
        settings = settings_from(named)
        if settings:
            check_configuration(config, settings)
        settings.check_files()
        started()
        if settings:
            with ExitStack() as entered:
                protections.append(_protect(trainer, settings, entered))
                undo.push(entered.pop_all())

    def end() -> None:
        with undo:
            ended()
        # Without a step nothing was saved, so nothing is missing.
        if protections and trainer.one_step_trained:
            protections[0].finish()

    trainer.start, trainer.end = start, end
    return protections


def output_of(config: Any) -> Path:
    """Return beside which file the reports of a training go."""
    path = Path(config.output_model_destination)
    # In a folder, OneTrainer names the LoRA by the time of its saving.
    return path / (config.save_filename_prefix.strip("-_ ") or "lora") if path.is_dir() else path


def span_of(config: Any) -> tuple[float, float]:
    """Return the lowest and the highest timestep of a training."""
    shares = config.min_noising_strength, config.max_noising_strength
    return TRAINED_TIMESTEPS * shares[0], TRAINED_TIMESTEPS * shares[1]


def _protect(trainer: Any, settings: ProtectionSettings, undo: ExitStack) -> Protection:
    """Hook what is requested into a trainer that has just loaded its model.

    Raises:
        HookMissing: The version of OneTrainer is not supported.
        UnsupportedTraining: The projection would not be exact for what is trained.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
    """
    check_hooks(trainer)
    config, model = trainer.config, trainer.model
    protection = Protection(settings, output=output_of(config), span=span_of(config))
    text = TextSide(trainer)
    with aside(RandomState.now(trainer.train_device)), text.encoders_there():
        samples = BatchSamples(trainer)
        protection.fit(text.states, samples.captions, samples.files)
        if settings.predicts_again:
            adapter = StepAdapter(trainer, protection, samples, text)
            undo.enter_context(patched(trainer.model_setup, "predict", adapter.protected))
    # A LoRA to start from may change a text encoder, also where that is not trained.
    changed = [part for part in model.adapters() if part.prefix.startswith("text_encoder")]
    if settings.projection and changed and not trained_encoders(config):
        raise UnsupportedTraining(
            "The LoRA that the training starts from changes a text encoder, and so would the one "
            "that is saved: for the projection start from another one or from none."
        )
    protection.protect(_named_factors(model))
    for hooks in (_gradient_hooks, _progress_hooks, _saving_hooks):
        undo.enter_context(hooks(trainer, protection))
    backup = config.get_last_backup_path() if config.continue_last_backup else None
    if backup:
        load_progress(protection, Path(backup))
    else:
        protection.start()
    return protection


def _named_factors(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of every LoRA on a model, with the names of their layers."""
    for part in model.adapters():
        for module in part.lora_modules.values():
            for name, parameter in module.named_parameters():
                yield module.prefix + name, parameter


@contextmanager
def _gradient_hooks(trainer: Any, protection: Protection) -> Iterator[None]:
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

        def before_clip() -> None:
            protection.check_attached()
            protection.before_clip()

        # Called between the last backward pass of a step and the clipping, also with one GPU.
        for name in ("finish_async", "reduce_grads_mean"):
            undo.enter_context(patched(reductions, name, calling(after=before_clip)))
        # Not the optimizer's own hooks: OneTrainer replaces the `step` of some optimizers.
        stepped = calling(after=protection.after_step)
        undo.enter_context(patched(setup, "after_optimizer_step", stepped))
        yield


@contextmanager
def _progress_hooks(trainer: Any, protection: Protection) -> Iterator[None]:
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
                values |= shown_values(protection)
            return original(bar, values, *args, **kwargs)

        return set_postfix

    with (
        patched(trainer.model_setup, "report_to_tensorboard", report),
        patched(tqdm, "set_postfix", postfix),
    ):
        yield


@contextmanager
def _saving_hooks(trainer: Any, protection: Protection) -> Iterator[None]:
    """Save projected weights, write our metadata into the LoRA's header, and check the file."""
    from modules.modelSaver.mixin.LoRASaverMixin import LoRASaverMixin

    def checked(original: Function) -> Function:
        def save(*args: Any, **kwargs: Any) -> None:
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            path = Path(call["output_model_destination"])
            protection.before_save()
            original(*args, **kwargs)
            if str(call["output_model_format"]) == BACKUP:
                save_progress(protection, path)
            else:
                protection.after_save(path)
                if protection.ends:  # OneTrainer then saves once more, and ends as it does
                    logger.warning("The training ends, as mem_stop asks: %s", protection.ends)
                    trainer.commands.stop()

        return save

    def exact(original: Function) -> Function:
        def write(self: Any, model: Any, destination: str, state: dict[str, Tensor]) -> None:
            protection.clear_rounding(state, source=destination)
            original(self, model, destination, state)

        return write

    def with_metadata(original: Function) -> Function:
        return lambda *args, **kwargs: original(*args, **kwargs) | protection.metadata()

    with (
        patched(trainer.model_saver, "save", checked),
        patched(LoRASaverMixin, "_write_lora_file", exact),
        patched(LoRASaverMixin, "_create_safetensors_header", with_metadata),
    ):
        yield
