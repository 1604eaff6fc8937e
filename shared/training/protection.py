"""Projection and filter of one training, as a trainer's hooks call them.

The order of a training: `fit` while the text encoders are there, `protect` when the LoRA exists,
`start` before the first step and after anything else that wrote weights, `weigh` in each step,
`before_clip`, `after_step`, around each saving `before_save` and `after_save`, then `finish`.
What the settings do not ask for costs nothing and changes no bit.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..arrays import Float, Tensor
from .account import describe, filter_account, projection_account
from .filter import Gather, MemorizationFilter, alone
from .lora_factors import text_factors
from .projection import Projection, ProjectionFailed, check, check_file
from .sample_log import Sample, SampleLog
from .sample_report import records_path, write_report
from .settings import ProtectionSettings
from .subspace import ConceptSubspace
from .text_states import TextPath

logger = logging.getLogger(__name__)

MEASURE_EVERY = 100
"""Steps between two measurements of the residual: each moves every factor to the CPU."""
TOLD = 5
"""Samples that the end of a training names."""
PREFIX = "unmemorize/"
"""Of the names of logged values."""


class ProtectionFailed(RuntimeError):
    """At the end of a training, something that was asked for had not happened."""


class Protection:
    """Both methods for one training. Every process of it has its own."""

    def __init__(
        self,
        settings: ProtectionSettings,
        *,
        output: Path,
        process: int = 0,
        processes: int = 1,
        gather: Gather = alone,
        span: tuple[float, float] = (0.0, 1000.0),
    ):
        """Set up; nothing is read or changed yet.

        Args:
            settings: What is asked for.
            output: The LoRA to be saved, with or without suffix; reports stand next to it.
            process: Number of this process.
            processes: How many there are.
            gather: Needed when there are several.
            span: Lowest and highest timestep of the training.
        """
        self.settings = settings
        self.subspace: ConceptSubspace | None = None
        self.projection: Projection | None = None
        self.filter: MemorizationFilter | None = None
        self._process, self._processes = process, processes
        self._residual: float | None = None
        if asked := settings.filter:
            self.filter = MemorizationFilter(
                asked.threshold(span), action=asked.action, gather=gather
            )
            beside = output.parent / f"{output.name.removesuffix('.safetensors')}.memorized.json"
            self._report = asked.report or beside

    def fit(self, text_path: TextPath, captions: Sequence[str]) -> None:
        """Build or load the concepts' subspace; does nothing when no projection is asked for.

        Args:
            text_path: The trainer's own, of the model before training.
            captions: Of the training set.

        Raises:
            ConceptNotSeparable: The subspace fails its acceptance test and is not forced.
            ModelError: A saved subspace is damaged.
        """
        if asked := self.settings.projection:
            self.subspace = asked.subspace(text_path, captions)
            logger.info("Concept subspace: %s", describe(self.subspace))

    def protect(self, network: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> None:
        """Find the LoRA factors that read text; does nothing when no projection is asked for.

        Raises:
            UnsupportedTraining: The projection would not be exact for what is trained.
            ValueError: The subspace has another width than the model's text states.
        """
        if self.subspace is not None:
            self.projection = Projection(text_factors(network), [self.subspace])

    def start(self) -> None:
        """Project the weights: before the first step, and after anything else wrote them.

        What stands outside the subspace already is left as it is, so that saving and resuming
        change no bit of a training.
        """
        if self.projection and not self._is_clear():
            self.projection.project_weights()

    def weigh(
        self,
        cond: Float[Tensor, " sample *latent"],
        uncond: Float[Tensor, " sample *latent"],
        *,
        timesteps: Tensor,
        samples: Sequence[Sample],
        scale: Float[Tensor, " sample"] | None = None,
    ) -> Float[Tensor, " sample"]:
        """Return what to multiply each sample's loss by; see `MemorizationFilter.weigh`."""
        if self.filter.log is None:
            self.filter.log = self._open_log()
        return self.filter.weigh(cond, uncond, timesteps=timesteps, samples=samples, scale=scale)

    def before_clip(self) -> None:
        """Project the gradients: when they are complete, before they are clipped."""
        if self.projection:
            self.projection.project_gradients()

    def after_step(self) -> None:
        """Project the weights after an optimizer step."""
        if self.projection:
            self.projection.after_step()
            if self.projection.steps % MEASURE_EVERY == 1:
                self._measure()

    def before_save(self) -> None:
        """Project the weights and write what waits, since a saved file or state follows."""
        self.start()
        self.flush()
        self._measure()

    def after_save(self, path: Path) -> None:
        """Check a saved LoRA.

        Raises:
            ProjectionFailed: One of its factors reaches into the subspace.
            ModelError: It is not a whole safetensors LoRA whose text side can be checked.
        """
        if self.projection:
            check_file(path, [self.subspace])

    def flush(self) -> None:
        """Write the records that wait, in every process and before the first one's `finish`."""
        if self.filter and self.filter.log:
            self.filter.log.flush()

    def scalars(self) -> dict[str, float]:
        """Return values to log next to the loss."""
        values = {}
        if self._residual is not None:
            values["residual"] = self._residual
        if self.filter and self.filter.seen:
            values["filtered_share"] = self.filter.flagged / self.filter.seen
            values["score"] = self.filter.latest
        return {PREFIX + name: value for name, value in values.items()}

    def metadata(self) -> dict[str, str]:
        """Return what the saved LoRA's header should tell, JSON by key."""
        told = {}
        self._measure()
        if self.projection:
            told["projection"] = projection_account(self.subspace, self.projection, self._residual)
        if self.filter:
            told["filter"] = filter_account(self.settings.filter, self.filter)
        return {f"unmemorize.{key}": json.dumps(value) for key, value in told.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, plain data that JSON can hold."""
        self.flush()
        state = {}
        if self.projection:
            state["steps"] = self.projection.steps
        if self.filter:
            state["filter"] = self.filter.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; what another run was not asked for starts anew."""
        if self.projection and "steps" in state:
            self.projection.steps = state["steps"]
        if self.filter and "filter" in state:
            self.filter.load_state_dict(state["filter"])
        self.start()

    def finish(self) -> None:
        """Check that everything asked for has happened, and write the ranked list of samples.

        In the first process only, after the last saving.

        Raises:
            ProtectionFailed: No step was projected, factors are in the subspace, or no sample was
                seen.
            StorageError: The report cannot be written.
        """
        faults = []
        if self.settings.projection:
            try:
                residual = self.projection.check() if self.projection else None
            except ProjectionFailed as error:
                faults.append(str(error))
            else:
                if residual is None:
                    faults.append("No LoRA was ever given to the projection.")
                else:
                    logger.info("Projection: |A V| / |A| at most %.1e", residual)
        if self.filter:
            self.flush()
            if self.filter.seen:
                account = filter_account(self.settings.filter, self.filter)
                ranked = write_report(self._report, self._processes, account)
                first = ", ".join(each.sample.file for each in ranked[:TOLD])
                logger.info("Most memorized: %s; all samples: %s", first, self._report)
            else:
                faults.append("The memorization filter saw no sample.")
        if faults:
            raise ProtectionFailed(f"{' '.join(faults)} The LoRA is not what was asked for.")

    def _open_log(self) -> SampleLog:
        """Return this process's log; one of an earlier training makes place for it."""
        path = records_path(self._report, self._process)
        if not self.filter.calls:
            path.unlink(missing_ok=True)
        return SampleLog(path)

    def _is_clear(self) -> bool:
        """Return whether all factors are outside the subspace, but for rounding."""
        try:
            check(self.projection.factors, [self.subspace])
        except ProjectionFailed:
            return False
        return True

    def _measure(self) -> None:
        if self.projection:
            self._residual = max(self.projection.residuals().values())
