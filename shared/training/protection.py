"""Projection, filter and concept subtraction of one training, as a trainer's hooks call them.

The order of a training: `fit` while the text encoders are there, `protect` when the LoRA exists,
`start` before the first step and after anything else that wrote weights, `due` and `weigh` in each
step, `before_clip`, `after_step`, around each saving `before_save` and `after_save`, then `finish`.
What the settings leave out costs nothing and changes no bit.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..arrays import Float, Tensor
from ..files.weights import ModelError
from .base_targets import BaseTargets, NoTargetSeen
from .claims import CLAIM, withdraw
from .concept.subspace import ConceptSubspace
from .concept.text_states import TextPath
from .filter.filter import Gather, MemorizationFilter, alone
from .filter.sample_log import Sample
from .filtered import FilteredTraining, NoSampleSeen, NothingJudged
from .projected import ProjectedTraining
from .projection.projection import Projection, ProjectionFailed
from .replay import RandomState
from .settings import ProtectionSettings
from .state import check_state, sealed
from .subtracted import NothingSubtracted, SubtractedTraining

MEASURE_EVERY = 100
"""Steps between two measurements of the residual: each moves every factor to the CPU."""
PREFIX = "unmemorize/"
"""Before the names of logged values."""


class ProtectionFailed(RuntimeError):
    """At the end of a training, something that was requested had not happened."""


class Protection:
    """All methods for one training. Every process of it has its own."""

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
            settings: What is requested.
            output: The LoRA to be saved, with or without suffix; reports stand next to it.
            process: Number of this process.
            processes: How many there are.
            gather: Needed when there are several.
            span: Lowest and highest timestep of the training.
        """
        self.settings, self.process = settings, process
        self.finished = False
        """Whether `finish` found that everything requested had happened; in the first process."""
        self._weighed, self._started, self._idle = False, False, False
        self._saved: list[Path] = []
        self._projected = ProjectedTraining(settings.projection) if settings.projection else None
        self._filtered: FilteredTraining | None = None
        if settings.filter:
            self._filtered = FilteredTraining(
                settings.filter, output=output, process=process, processes=processes,
                gather=gather, span=span,
            )  # fmt: skip
        self.subtraction = (
            SubtractedTraining(settings.subtraction) if settings.subtraction else None
        )
        """None where none is requested."""

    @property
    def subspace(self) -> ConceptSubspace | None:
        """Of text states, once it is fitted; None where none is requested."""
        return None if self._projected is None else self._projected.subspace

    @property
    def projection(self) -> Projection | None:
        """Of the factors, once the LoRA is there; None where none is requested."""
        return None if self._projected is None else self._projected.projection

    @property
    def base_targets(self) -> BaseTargets | None:
        """Of the concept's regions, once they are fitted; None where none are requested."""
        return None if self._projected is None else self._projected.base_targets

    @property
    def watches(self) -> bool:
        """Whether the filter's scores are compared with those without the LoRA."""
        return self.filter is not None and self.filter.watch is not None

    @property
    def ends(self) -> str:
        """Why the training is to end now, empty while it is to go on."""
        return "" if self._filtered is None else self._filtered.ends

    @property
    def filter(self) -> MemorizationFilter | None:
        """None where none is requested."""
        return None if self._filtered is None else self._filtered.filter

    def fit(
        self,
        text_path: TextPath,
        captions: Sequence[str],
        files: Collection[str] | None = None,
    ) -> None:
        """Build or load the concepts' subspaces, and load the concepts to subtract.

        Args:
            text_path: The trainer's own, of the model before training.
            captions: Of the training set.
            files: Images of the training set; None where they are not known.

        Raises:
            ConceptNotSeparable: The subspace fails its acceptance test and is not forced.
            ModelError: A saved subspace or a concept's file is damaged.
            NothingSubtracted: No sample of the training set shows a concept to subtract.
        """
        if self._projected:
            self._projected.fit(text_path, captions)
        if self.subtraction:
            self.subtraction.fit(captions, files)

    def protect(self, network: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> None:
        """Find the LoRA factors to project; does nothing when no projection is requested.

        Raises:
            UnsupportedTraining: The projection would not be exact for what is trained.
            ValueError: A subspace has another width than what its layer reads.
        """
        if self._projected:
            self._projected.protect(network)

    def start(self) -> None:
        """Project the weights: before the first step, and after anything else wrote them.

        Weights outside the subspace are left as they are, so that saving and resuming change no
        bit of a training.
        """
        self._started = True
        if self._projected:
            self._projected.start()

    def check_attached(self) -> None:
        """Check that the trainer has called what comes before the first step of its optimizer.

        Raises:
            ProtectionFailed: It has not, so the training would go on unprotected.
        """
        faults = []
        if self._projected and not (self.projection and self._started):
            faults.append("The LoRA was never given to the projection.")
        if self._filtered and not (self._weighed or self._idle):
            faults.append("The memorization filter was given no prediction.")
        if self.subtraction and not (self.subtraction.asked or self._idle):
            faults.append("Concept subtraction was given no prediction.")
        if faults:
            raise ProtectionFailed(f"{' '.join(faults)} The training ends before its first step.")

    def pass_by(self) -> None:
        """Note a batch without a sample to learn from, such as one of prior images alone.

        The trainer is followed then, although nothing is measured before its first step.
        """
        self._idle = True

    def due(self, samples: Sequence[Sample], timesteps: Tensor) -> Tensor:
        """Return the samples whose prediction on the empty prompt `weigh` needs.

        All, unless a cheaper filter is requested. An adapter that cannot repeat some rows of a
        batch repeats all when any is due. This prediction is best made before the step's own,
        whose activations wait for the backward pass and hold memory.

        Args:
            samples: Of the step.
            timesteps: One per sample.

        Returns:
            [sample] of booleans; all are due or none where the network draws random numbers, as
            dropout does, since only the whole batch draws the same twice.
        """
        assert self._filtered is not None, "no filter was requested"
        return self._filtered.due(samples, timesteps)

    def controls_due(self, samples: Sequence[Sample]) -> Tensor:
        """Return of which samples `weigh` needs the predictions without the LoRA.

        Returns:
            [sample] of booleans; none unless images are watched, nor after their first visits.
        """
        assert self._filtered is not None, "no filter was requested"
        return self._filtered.controls_due(samples)

    def weigh(
        self,
        cond: Float[Tensor, " sample *latent"],
        uncond: Float[Tensor, " due *latent"],
        *,
        timesteps: Tensor,
        samples: Sequence[Sample],
        scale: Float[Tensor, " sample"] | None = None,
        before: RandomState | None = None,
        controls: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, " sample"]:
        """Return what to multiply each sample's loss by; see `MemorizationFilter.weigh`.

        `before` is the random state before the step's own prediction, which shows whether the
        network draws random numbers; an adapter that only repeats whole batches needs none.
        `controls` are the predictions without the LoRA, with the captions and without, of the
        samples that `controls_due` names.
        """
        assert self._filtered is not None, "no filter was requested"
        self._weighed = True
        return self._filtered.weigh(
            cond, uncond, timesteps=timesteps, samples=samples, scale=scale, before=before,
            controls=controls,
        )  # fmt: skip

    def before_clip(self) -> None:
        """Project the gradients: when they are complete, before they are clipped."""
        if self.projection:
            self.projection.project_gradients()

    def after_step(self) -> None:
        """Project the weights after an optimizer step."""
        if self._projected and (projection := self.projection):
            projection.after_step()
            if projection.steps % MEASURE_EVERY == 1:
                self._projected.measure()

    def before_save(self) -> None:
        """Project the weights and write the waiting records: a file or state is saved next."""
        self.start()
        self.flush()
        if self._projected:
            self._projected.measure()

    def after_save(self, path: Path) -> None:
        """Check a saved LoRA.

        Raises:
            ProjectionFailed: One of its factors reaches into the subspace.
            ModelError: It is not a whole safetensors LoRA whose text side can be checked.
        """
        self._saved.append(path)
        if self._filtered:
            self._filtered.after_save(path)
        if self._projected and self.projection:
            try:
                self._projected.check_file(path)
            except (ProjectionFailed, ModelError):
                self.withdraw()
                raise

    def clear_rounding(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """Project a saved LoRA's tensors in place, where they are wider than those trained.

        A script that trains in half precision and saves in single leaves half precision's rounding
        in the file. The trained factors themselves are checked by `finish`.

        Raises:
            ModelError: It is no LoRA that can be checked.
        """
        if self._projected and self.projection:
            self._projected.clear_rounding(state, source=source)

    def flush(self) -> None:
        """Write the records that wait, in every process and before the first one's `finish`."""
        if self._filtered:
            self._filtered.flush()

    def scalars(self) -> dict[str, float]:
        """Return values to log next to the loss."""
        values = {}
        if self._projected and self._projected.residual is not None:
            values["residual"] = self._projected.residual
        if self._filtered:
            values |= self._filtered.scalars()
        if self.subtraction:
            values |= self.subtraction.scalars()
        return {PREFIX + name: value for name, value in values.items()}

    def metadata(self) -> dict[str, str]:
        """Return what goes into the saved LoRA's metadata, JSON by key.

        A method that has done nothing yet is not in it: no file claims what did not happen.
        """
        accounts = {}
        if self._projected and self.projection and self.projection.steps:
            self._projected.measure()
            accounts["projection"] = self._projected.account()
        if self._filtered and self._filtered.filter.seen:
            accounts["filter"] = self._filtered.account()
        if self.subtraction and self.subtraction.seen:
            accounts["subtraction"] = self.subtraction.account()
        return {CLAIM + key: json.dumps(value) for key, value in accounts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, plain data that JSON can hold."""
        self.flush()
        state = self._projected.state_dict() if self._projected and self.projection else {}
        if self.filter:
            state["filter"] = self.filter.state_dict()
        if self.subtraction:
            state["subtraction"] = self.subtraction.state_dict()
        return sealed(state)

    def load_state_dict(self, state: Any) -> None:
        """Continue from `state_dict`; a method that the other run did not use starts anew.

        Raises:
            ValueError: The state is damaged, or of other settings.
        """
        try:
            check_state(state)
            if self._projected and self.projection:
                self._projected.load_state_dict(state)
            if self.filter and "filter" in state:
                self.filter.load_state_dict(state["filter"])
            if self.subtraction and "subtraction" in state:
                self.subtraction.load_state_dict(state["subtraction"])
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:  # fmt: skip
            # A value of another kind fails wherever it is first computed with.
            raise ValueError(
                f"The saved state of the protection cannot be continued ({type(error).__name__}: "
                f"{str(error)[:200]}); expected what was saved with this checkpoint, by a training "
                "with the same settings. Resume from another checkpoint."
            ) from error
        self.start()

    def finish(self) -> None:
        """Check that everything requested has happened, and write the ranked list of samples.

        In the first process only, after the last saving.

        Raises:
            ProtectionFailed: Something that was requested has not happened.
            StorageError: The report cannot be written.
        """
        faults = []
        parts: tuple[ProjectedTraining | FilteredTraining | SubtractedTraining | None, ...]
        parts = self._projected, self._filtered, self.subtraction
        for part in parts:
            try:
                if part is not None:
                    part.finish()
            except (
                ProjectionFailed, NoTargetSeen, NoSampleSeen, NothingJudged, NothingSubtracted,
            ) as error:  # fmt: skip
                faults.append(str(error))
        if faults:
            self.withdraw()
            raise ProtectionFailed(f"{' '.join(faults)} The LoRA is not what was requested.")
        self.finished = True

    def withdraw(self) -> None:
        """Take our metadata out of the files saved so far: what they claim did not happen."""
        withdraw(self._saved)
