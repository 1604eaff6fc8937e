"""One protected training of OneTrainer, from its start to its end."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from ...shared.patching import Function, patched
from ...shared.training.projection.factors import UnsupportedTraining
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.settings import ProtectionSettings
from ..options import NAMES, settings_from
from .config import output_of, span_of, validate
from .data import BatchSamples, TextSide
from .filter import StepFilter
from .hooks import check_hooks, gradient_hooks, report_hooks
from .regions import StepRegions
from .saving import resume, saving_hooks


class Training:
    """Takes part in a trainer's `start` and `end`; between them lie the steps.

    Both are replaced on the trainer itself, which does one training and is then thrown away.
    """

    def __init__(self, trainer: Any, given: Mapping[str, Any]):
        """Take a trainer that has not started.

        Args:
            trainer: Of OneTrainer.
            given: Options by name, before those of its configuration.
        """
        self._trainer, self._given = trainer, given
        self._protection: Protection | None = None
        self._undo = ExitStack()

    def attach(self) -> None:
        """Put both in place."""
        self._trainer.start = self._started(self._trainer.start)
        self._trainer.end = self._ended(self._trainer.end)

    def _started(self, original: Function) -> Function:
        def start() -> None:
            config = self._trainer.config
            settings = settings_from({name: getattr(config, name) for name in NAMES} | self._given)
            if settings:
                validate(config, settings)
            original()
            if settings:
                with self._undo as undo:
                    self._protection = _protect(self._trainer, settings, undo)
                    self._undo = undo.pop_all()

        return start

    def _ended(self, original: Function) -> Function:
        def end() -> None:
            with self._undo:
                original()
            # Without a step nothing was saved, so nothing is missing.
            if self._protection and self._trainer.one_step_trained:
                self._protection.finish()

        return end


def _protect(trainer: Any, settings: ProtectionSettings, undo: ExitStack) -> Protection:
    """Hook both methods into a trainer that has just loaded its model.

    Raises:
        HookMissing: The version of OneTrainer is not supported.
        UnsupportedTraining: The projection would not be exact for what is trained.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
    """
    check_hooks(trainer)
    protection = Protection(
        settings, output=output_of(trainer.config), span=span_of(trainer.config)
    )
    text = TextSide(trainer)
    with aside(RandomState.now(trainer.train_device)), text.encoders_there():
        samples = BatchSamples(trainer)
        protection.fit(text.states, samples.captions)
        if protection.base_targets:
            regions = StepRegions(trainer, protection.base_targets, samples, text)
            undo.enter_context(patched(trainer.model_setup, "predict", regions.wrap))
        if protection.filter:
            step = StepFilter(trainer, protection, samples, text)
            undo.enter_context(patched(trainer.model_setup, "predict", step.wrap))
    if settings.projection:
        _check_start(trainer.model)
    protection.protect(_named_factors(trainer.model))
    undo.enter_context(gradient_hooks(trainer, protection))
    undo.enter_context(report_hooks(trainer, protection))
    undo.enter_context(saving_hooks(trainer, protection))
    backup = trainer.config.get_last_backup_path() if trainer.config.continue_last_backup else None
    resume(protection, Path(backup) if backup else None)
    return protection


def _check_start(model: Any) -> None:
    """Refuse a LoRA to start from that changes a text encoder, also where that is not trained.

    Raises:
        UnsupportedTraining: With what to do.
    """
    if any(part.prefix.startswith("text_encoder") for part in model.adapters()):
        raise UnsupportedTraining(
            "The LoRA that the training starts from changes a text encoder, and so would the one "
            "that is saved: for the projection start from another one or from none."
        )


def _named_factors(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of every LoRA on a model, with the names of their layers."""
    for part in model.adapters():
        for module in part.lora_modules.values():
            for name, parameter in module.named_parameters():
                yield module.prefix + name, parameter
