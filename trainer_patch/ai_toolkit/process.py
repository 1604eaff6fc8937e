"""A training of ai-toolkit with projection and filter, at the hooks its trainer class offers."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ..hooks import accelerate_hooks, optimizer_hooks
from .checks import check_configuration, check_hooks, check_model, settings_in
from .filter import StepFilter
from .regions import StepRegions
from .samples import captions_of
from .saving import resume, saving_hooks
from .text import text_path

SECTION = "unmemorize"
"""Of a process in the configuration: our options."""


class ProtectedProcess:
    """To stand before a trainer class of ai-toolkit among the bases of a class."""

    def __init__(self, process_id: int, job: Any, config: Mapping[str, Any], **kwargs: Any):
        """Read both parts of the configuration, and refuse what is not supported.

        Raises:
            OptionError: An option cannot be understood.
            UnsupportedTraining: The combination is not supported; the message says what to change.
            HookMissing: The version of ai-toolkit is not supported.
        """
        settings = settings_in(config.get(SECTION))
        super().__init__(process_id, job, config, **kwargs)
        self._undo = ExitStack()
        self._filter: StepFilter | None = None
        self._regions: StepRegions | None = None
        if settings:
            check_hooks(super())
            check_configuration(self, settings)
        # Beside the folder of the training, in which whatever begins with its name is taken for a
        # checkpoint, and from which everything may be uploaded.
        self.protection = Protection(settings, output=Path(self.save_root))

    def hook_after_model_load(self) -> None:
        """Refuse a model whose prediction or target the methods cannot work with."""
        super().hook_after_model_load()
        if self.protection.settings:
            check_model(self.sd, self.protection.settings)

    def hook_before_train_loop(self) -> None:
        """Protect what was made and loaded, while the text encoders are there."""
        if self.protection.settings:
            with heard(), aside(RandomState.now(self.device_torch)), torch.no_grad():
                self._protect()
        super().hook_before_train_loop()

    def hook_train_loop(self, batch: Any) -> dict[str, float] | None:
        """Add our values to those of the progress bar and the logs."""
        told = super().hook_train_loop(batch)
        return told if told is None else told | self.protection.scalars()

    def predict_noise(self, **given: Any) -> torch.Tensor:
        """Return a prediction; of the one that is learnt from, gated."""
        run, primary = super().predict_noise, given.get("is_primary_pred")
        if self._regions and primary:
            self._regions.remember(run, given)
        if self._filter and primary:
            return self._filter.predict(run, given)
        return run(**given)

    def calculate_loss(self, **given: Any) -> torch.Tensor:
        """Return a step's loss; where pictures show the concept, against the base model."""
        if self._regions:
            given["noise"] = self._regions.noise(given)
        return super().calculate_loss(**given)

    def done_hook(self) -> None:
        """Check that what was asked for has happened, before anyone is told that all is done."""
        self._undo.close()
        with heard():
            self.protection.finish()
        super().done_hook()

    def on_error(self, error: BaseException) -> None:
        """Take the hooks off: other trainings may follow in this process."""
        self._undo.close()
        super().on_error(error)

    def _protect(self) -> None:
        protection = self.protection
        protection.fit(text_path(self.sd), captions_of(self.data_loader, self.data_loader_reg))
        if protection.filter:
            self._filter = StepFilter(protection, self.sd)
        if protection.base_targets:
            self._regions = StepRegions(self, protection.base_targets)
        # It writes $$ for the points in a layer's name until it saves.
        named = self.network.named_parameters()
        protection.protect((name.replace("$$", "."), parameter) for name, parameter in named)
        protection.start()
        if self.ema is not None:
            self.setup_ema()  # anew: its average began with the factors as they were drawn
        resume(self)
        hooks = (
            optimizer_hooks([self.optimizer], protection),
            accelerate_hooks(self.accelerator, lambda: protection),
            saving_hooks(self),
        )
        for hook in hooks:
            self._undo.enter_context(hook)


@contextmanager
def heard() -> Iterator[None]:
    """Print what this package logs in a block, as ai-toolkit prints what it has to say.

    Parts of ai-toolkit switch all logging off when they are imported, others print it again.
    """
    logger = logging.getLogger(__package__.partition(".")[0])
    handler = logging.StreamHandler(sys.stdout)
    level, propagates, disabled = logger.level, logger.propagate, logging.root.manager.disable
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(disabled)
        logger.propagate = propagates
        logger.setLevel(level)
        logger.removeHandler(handler)
