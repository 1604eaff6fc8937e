"""What a user requests for a training: which concepts stay out, which samples leave the loss."""

import math
from dataclasses import dataclass
from pathlib import Path

from ..files.weights import ModelError
from .concept.adapter import ConceptAdapter
from .concept.concept import Concept
from .concept.subspace import ConceptSubspace
from .filter.filter import Action
from .filter.thresholds import AbsoluteThreshold, RelativeThreshold, RunningQuantile, Threshold
from .layers.subspaces import LayerSubspaces


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings:
    """Concepts that a LoRA must not read, as text and in what its other layers read."""

    concepts: tuple[Concept, ...] = ()
    """From which the subspace is built with the trainer's own text encoders."""
    file: Path | None = None
    """A saved subspace in place of `concepts`, built with the model that is trained."""
    layers: Path | None = None
    """Saved subspaces of the layers that read no text, alone or beside one of the two above."""
    regions: bool = False
    """Teach nothing where images show the concept, by the regions in the file of `layers`."""
    energy: float = 0.95
    """Share of each concept's own energy to cover, in (0, 1]."""
    cap: int | None = None
    """Most dimensions per concept; None is 16, and 32 from a width of 2048 on."""
    force: bool = False
    """Train although the subspace fails its acceptance test."""

    def __post_init__(self) -> None:
        if self.concepts and self.file is not None:
            raise ValueError("Give either `concepts` or `file`, the saved subspace of some.")
        if not self.of_text and self.layers is None:
            raise ValueError("Give `concepts`, `file` or `layers`.")
        if self.regions and self.layers is None:
            raise ValueError("`regions` needs `layers`, the file that holds them.")
        if not 0 < self.energy <= 1:
            raise ValueError(f"`energy` must be above 0 and at most 1, got {self.energy}.")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"`cap` must be at least 1, got {self.cap}.")

    @property
    def of_text(self) -> bool:
        """Whether layers that read text are projected."""
        return bool(self.concepts) or self.file is not None

    def check_files(self) -> None:
        """Read the saved subspaces once: before a model is loaded for nothing.

        Raises:
            ModelError: A file is damaged, or lacks the regions that are requested.
        """
        if self.file is not None:
            ConceptSubspace.load(self.file)
        self.layer_subspaces()

    def layer_subspaces(self) -> LayerSubspaces | None:
        """Return the saved subspaces of layers, None where there are none.

        Raises:
            ModelError: The file is damaged, or lacks the regions that are requested.
        """
        if self.layers is None:
            return None
        subspaces = LayerSubspaces.load(self.layers)
        if self.regions and subspaces.regions is None:
            raise ModelError(
                f"{self.layers} does not say where images show the concept. Build it again: "
                "unmemorize concept layers. If `concept show` names no places then either, none "
                "of the model's layers tells places apart."
            )
        return subspaces


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """From when on a sample counts as being memorized, and what happens to it then."""

    limit: float = math.inf
    """Text-conditional magnitude, RMS per latent element; infinity only records."""
    quantile: float | None = None
    """In place of `limit`: share of samples that pass at like timesteps, in (0, 1)."""
    ratio: float | None = None
    """In place of `limit`: multiple of the median caption's score at like timesteps, above 1."""
    action: Action = "drop"
    """Leave the sample out of the loss, weigh it down, or only log it."""
    recall: int | None = None
    """Visits of a sample of which at least one is measured; the others are measured only where
    the decision is open. None measures all."""
    warn: bool = False
    """Say from when on which images are being memorized, and report at every saving."""
    stop: bool = False
    """End the training at the first saving outside the controls' interval."""
    report: Path | None = None
    """Ranked list of samples, JSON; None is next to the LoRA."""

    def __post_init__(self) -> None:
        given = (self.limit != math.inf, self.quantile is not None, self.ratio is not None)
        if sum(given) > 1:
            raise ValueError("Give one of `limit`, `quantile` and `ratio`.")
        if self.recall is not None and self.recall < 1:
            raise ValueError(
                f"`recall` must be at least 1, got {self.recall}: a sample is measured on one of "
                "so many visits."
            )
        self.threshold((0.0, 1.0))  # refuses what is out of range

    @property
    def watches(self) -> bool:
        """Whether images are compared with what the base model does with them."""
        return self.warn or self.stop

    @property
    def text(self) -> str:
        """How the threshold is written as an option."""
        if self.quantile is not None:
            return f"q{self.quantile}"
        return str(self.limit) if self.ratio is None else f"x{self.ratio}"

    def threshold(self, span: tuple[float, float]) -> Threshold:
        """Return a threshold for a training whose timesteps lie in `span`."""
        if self.quantile is not None:
            return RunningQuantile(self.quantile, span=span)
        if self.ratio is not None:
            return RelativeThreshold(self.ratio)
        return AbsoluteThreshold(self.limit)


@dataclass(frozen=True, kw_only=True)
class SubtractedConcept:
    """One concept, and which samples show it."""

    file: Path
    """A concept's adapter, of the model that is trained."""
    samples: str = "named"
    """`named`: samples whose captions name the concept; `all`; else the name of a list of files."""
    listed: frozenset[str] | None = None
    """Absolute names of the images in that list; None without a list."""


@dataclass(frozen=True, kw_only=True)
class SubtractionSettings:
    """Concepts that are subtracted from what a training teaches."""

    concepts: tuple[SubtractedConcept, ...]
    gain: float = 1.0
    """How many times what a concept's adapter adds is subtracted, above 0."""

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ValueError("`concepts` must hold one at least.")
        if not 0 < self.gain < math.inf:
            raise ValueError(f"`gain` must be above 0 and finite, got {self.gain}.")


@dataclass(frozen=True, kw_only=True)
class ProtectionSettings:
    """Any of the methods, or none."""

    projection: ProjectionSettings | None = None
    """None projects nothing."""
    filter: FilterSettings | None = None
    """None looks at no sample and costs nothing."""
    subtraction: SubtractionSettings | None = None
    """None subtracts nothing."""

    def __post_init__(self) -> None:
        if self.regions and self.subtraction:
            raise ValueError(
                "Regions and concept subtraction both decide what is taught where a concept shows: "
                "leave one out. Subtraction needs no places."
            )

    @property
    def regions(self) -> bool:
        """Whether images are looked at for the concept's regions."""
        return self.projection is not None and self.projection.regions

    def __bool__(self) -> bool:
        """Return whether any is requested."""
        return any((self.projection, self.filter, self.subtraction))

    @property
    def predicts_again(self) -> bool:
        """Whether a step's prediction is made once more, with other text or without the LoRA."""
        return any((self.filter, self.regions, self.subtraction))

    def check_files(self) -> None:
        """Read every file once: before a model is loaded for nothing.

        Raises:
            ModelError: A file is damaged, or lacks what is requested of it.
        """
        if self.projection:
            self.projection.check_files()
        for each in self.subtraction.concepts if self.subtraction else ():
            ConceptAdapter.load(each.file)
