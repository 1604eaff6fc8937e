"""A training of ai-toolkit with projection and filter, at the hooks its trainer class offers."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...shared.files.schema import Count
from ...shared.files.storage import write_text
from ...shared.patching import Function, HookMissing, patched
from ...shared.training.filter.filter import scale_gradient
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.state import READER
from ..hooks import accelerate_hooks, end_in_time, optimizer_hooks
from ..step import Call, Step
from .adapter import StepAdapter, captions_of, files_of, samples_of, text_path
from .checks import (
    SECTION,
    check_configuration,
    check_hooks,
    check_model,
    check_section,
    settings_in,
)

logger = logging.getLogger(__name__)


class ProtectedProcess:
    """To stand before a trainer class of ai-toolkit among the bases of a class."""

    def __init__(self, process_id: int, job: Any, config: Mapping[str, Any], **kwargs: Any):
        """Read both parts of the configuration, and refuse what is not supported.

        Raises:
            OptionError: An option cannot be understood.
            UnsupportedTraining: The combination is not supported; the message says what to change.
            HookMissing: The version of ai-toolkit is not supported.
        """
        check_section(config)
        settings = settings_in(config[SECTION])
        super().__init__(process_id, job, config, **kwargs)
        self._undo = ExitStack()
        self._adapter: StepAdapter | None = None
        self._step: Step | None = None
        self._added: torch.Tensor | None = None
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
            with printed(), aside(RandomState.now(self.device_torch)), torch.no_grad():
                self._protect()
        super().hook_before_train_loop()

    def hook_train_loop(self, batch: Any) -> dict[str, float] | None:
        """Add our values to those of the progress bar and the logs."""
        values = super().hook_train_loop(batch)
        return values if values is None else values | self.protection.scalars()

    def predict_noise(self, **given: Any) -> torch.Tensor:
        """Return a prediction; the one that is learnt from as the loss should see it.

        Its gradient is scaled by sample, and what concepts add is on it. Several losses of
        ai-toolkit are computed from that prediction, and only some are weighed by sample. No
        gradient reaches it from what is left out, through any of them.
        """
        run = super().predict_noise
        if self._adapter is None or not given.get("is_primary_pred"):
            return run(**given)
        samples = samples_of(given["batch"])
        call = Call(run=run, given=given, samples=samples, timesteps=given["timesteps"])
        step = Step(self.protection, self._adapter, call)
        self._step = step if self.protection.base_targets else None
        step.measure()  # before the real one: some models leave on the batch what they predict
        prediction = made = call.again()
        if self.protection.filter:
            made = scale_gradient(made, step.weights(prediction, self._adapter.signal))
        moved = step.subtracted(made)
        self._added = None if moved is made else (moved - made).detach()
        return moved

    def calculate_loss(self, **given: Any) -> torch.Tensor:
        """Return a step's loss; where images show the concept, against the base model.

        Raises:
            HookMissing: The loss is of another prediction than the one before it.
        """
        # With a prior the whole batch is taught what is predicted without the LoRA: of that
        # nothing is subtracted.
        if self._added is not None and given.get("prior_pred") is not None:
            given["prior_pred"] = given["prior_pred"] + self._added
        if self.protection.base_targets and given.get("prior_pred") is None:
            given["noise"] = self._target(given["noise"], given["batch"])
        return super().calculate_loss(**given)

    def done_hook(self) -> None:
        """Check that what was requested has happened, before ai-toolkit says that all is done."""
        with printed():
            self._end()
        super().done_hook()

    def _end(self) -> None:
        self._undo.close()
        self.protection.finish()

    def on_error(self, error: BaseException) -> None:
        """Take the hooks off: other trainings may follow in this process."""
        self._undo.close()
        super().on_error(error)

    def _target(self, noise: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the noise to compute a step's loss with."""
        step, self._step = self._step, None
        if step is None or step.call.given["batch"] is not batch:
            raise HookMissing("A loss was computed of another batch than the last prediction's.")
        samples = step.call.samples
        learnt = {row: samples[row] for row, i in enumerate(batch.file_items) if not i.is_reg}
        step.call = replace(step.call, samples=learnt)
        return step.target(noise, batch.latents)

    def _protect(self) -> None:
        protection = self.protection
        loaders = self.data_loader, self.data_loader_reg
        protection.fit(text_path(self.sd), captions_of(*loaders), files_of(*loaders))
        if protection.settings.predicts_again:
            self._adapter = StepAdapter(self, protection)
        # It writes $$ for the points in a layer's name until it saves.
        named = self.network.named_parameters()
        protection.protect((name.replace("$$", "."), parameter) for name, parameter in named)
        protection.start()
        if self.ema is not None:
            self.setup_ema()  # anew: its average began with the factors as they were drawn
        self._resume()
        hooks = (
            optimizer_hooks([self.optimizer], protection),
            accelerate_hooks(self.accelerator, protection),
            patched(self.network, "save_weights", self._saving),
        )
        for hook in hooks:
            self._undo.enter_context(hook)

    def _saving(self, original: Function) -> Function:
        """Save projected weights with our metadata, check the file and keep a state."""

        def save_weights(file: str, *args: Any, metadata: Any = None, **kwargs: Any) -> None:
            self.protection.before_save()
            metadata = dict(metadata or {}) | self.protection.metadata()
            original(file, *args, metadata=metadata, **kwargs)
            self.protection.after_save(Path(file))
            state = {"step": self.step_num, "protection": self.protection.state_dict()}
            write_text(self._state_path, json.dumps(state))
            with printed():
                end_in_time(self.protection, self._end)

        return save_weights

    def _resume(self) -> None:
        """Continue the protection of a training that goes on from its latest LoRA.

        The LoRA may be of an unprotected training, or older than the state: then counts, thresholds
        and records start anew.
        """
        if not self.step_num:
            return
        path = self._state_path
        state = READER.read(path, SavedState) if path.is_file() else None
        if state is not None and state.step == self.step_num:
            self.protection.load_state_dict(state.protection)
        else:
            logger.warning(
                "%s does not belong to step %d: the filter starts anew.", path, self.step_num
            )

    @property
    def _state_path(self) -> Path:
        """Where the state is: beside the folder of the training, as the reports are."""
        folder = Path(self.save_root)
        return folder.with_name(f"{folder.name}.unmemorize.json")


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What lies beside the folder of a training."""

    step: Count
    protection: dict[str, Any]


@contextmanager
def printed() -> Iterator[None]:
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
