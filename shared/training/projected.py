"""The projection over one whole training: its subspaces, its factors, its files."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..wording import name_some
from .base_targets import BaseTargets
from .concept.subspace import ConceptSubspace
from .concept.text_states import TextPath
from .layers.subspaces import LayerSubspaces
from .projection.factors import projected_factors, saved_projected_factors
from .projection.projection import Projection, ProjectionFailed, check, check_file
from .settings import ProjectionSettings

logger = logging.getLogger(__name__)


class ProjectedTraining:
    """Made from the settings, then `fit` to the model's text and bound to a LoRA by `protect`."""

    def __init__(self, settings: ProjectionSettings):
        self.settings = settings
        self.subspace: ConceptSubspace | None = None
        """Of text states."""
        self.layers: LayerSubspaces | None = None
        """Of the layers that read no text; once a LoRA is there, of those that it trains."""
        self.base_targets: BaseTargets | None = None
        """Where regions of the concept are asked for."""
        self.projection: Projection | None = None
        self.residual: float | None = None
        """Largest |A V| / |A| when it was last measured."""

    def fit(self, text_path: TextPath, captions: Sequence[str]) -> None:
        """Build or load the subspaces; see `Protection.fit`."""
        self.subspace = self.settings.subspace(text_path, captions)
        self.layers = self.settings.layer_subspaces()
        if self.subspace is not None:
            logger.info("Concept subspace: %s", describe(self.subspace))
        if self.settings.regions:
            names = self.layers.provenance.get("names", ())
            self.base_targets = BaseTargets(self.layers.regions, names)

    def protect(self, network: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> None:
        """Find the factors to project; see `Protection.protect`."""
        factors = projected_factors(network, text=self._reads_text, layers=self.layers)
        if self.layers is not None:
            known, self.layers = self.layers, self.layers.among(factors)
            idle = known.bases.keys() - self.layers.bases.keys()
            logger.info(
                "Layers with a subspace: %d; of the file's %d, this LoRA does not train %s",
                len(self.layers.bases), len(known.bases), name_some(idle, 3) or "none",
            )  # fmt: skip
        self.projection = Projection(factors, self._subspaces, layers=self.layers)

    def start(self) -> None:
        """Project the weights, unless they are outside their subspaces but for rounding."""
        if self.projection and not self._is_clear(self.projection.factors):
            self.projection.project_weights()

    def measure(self) -> None:
        """Take the residual as it is now."""
        if self.projection:
            self.residual = max(self.projection.residuals().values())

    def check_file(self, path: Path) -> None:
        """Check a saved LoRA; see `Protection.after_save`."""
        check_file(path, self._subspaces, self.layers)

    def clear_rounding(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """Project a saved LoRA's tensors in place; see `Protection.clear_rounding`."""
        factors = saved_projected_factors(
            state, text=self._reads_text, layers=self.layers, source=source
        )
        if not self._is_clear(factors):
            Projection(factors, self._subspaces, layers=self.layers).project_weights()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, once there is a LoRA."""
        state: dict[str, Any] = {"steps": self.projection.steps}
        return state | ({"regions": self.base_targets.state_dict()} if self.base_targets else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; what is not in it starts anew."""
        self.projection.steps = state.get("steps", self.projection.steps)
        if self.base_targets and "regions" in state:
            self.base_targets.load_state_dict(state["regions"])

    def finish(self) -> None:
        """Check the factors at the end.

        Raises:
            ProjectionFailed: There never were any, no step was projected, or some reach into their
                subspace.
            NoTargetSeen: Regions were asked for, and no step's target was given to them.
        """
        if self.projection is None:
            raise ProjectionFailed("No LoRA was ever given to the projection.")
        logger.info("Projection: |A V| / |A| at most %.1e", self.projection.check())
        if self.base_targets:
            self.base_targets.finish()

    def account(self) -> dict[str, Any]:
        """Return what a LoRA's header tells of it."""
        told = projection_account(self.subspace, self.layers, self.projection, self.residual)
        return told | ({"regions": self.base_targets.account()} if self.base_targets else {})

    @property
    def _reads_text(self) -> bool:
        return self.subspace is not None

    @property
    def _subspaces(self) -> list[ConceptSubspace]:
        return [] if self.subspace is None else [self.subspace]

    def _is_clear(self, factors: Mapping[str, Tensor]) -> bool:
        try:
            check(factors, self._subspaces, self.layers)
        except ProjectionFailed:
            return False
        return True


def describe(subspace: ConceptSubspace) -> str:
    """Return size and acceptance of a subspace in one line."""
    made = subspace.provenance
    parts = [f"{subspace.rank} of {subspace.width} dimensions"]
    if "residuals" in made:
        missed = ", ".join(f"{residual:.1%}" for residual in made["residuals"])
        parts.append(f"missed of held-out sentences {missed}")
        parts.append(f"taken of other text {made['collateral']:.1%}")
        parts.append("accepted" if made["accepted"] else "NOT accepted, forced")
    return "; ".join(parts)


def projection_account(
    subspace: ConceptSubspace | None,
    layers: LayerSubspaces | None,
    projection: Projection,
    residual: float | None,
) -> dict[str, Any]:
    """Return how the subspaces were made and what was kept out of them, plain data."""
    told: dict[str, Any] = {}
    if subspace is not None:
        told |= _without(subspace.provenance, "templates")
        told |= {"rank": subspace.rank, "width": subspace.width}
    if layers is not None:
        told["layers"] = _without(layers.provenance, "inside") | {"count": len(layers.bases)}
    return told | {
        "modules": len(projection.factors),
        "steps": projection.steps,
        "residual": residual,
    }


def _without(provenance: Mapping[str, Any], long: str) -> dict[str, Any]:
    """Return a provenance but for what is too long to be told with every file."""
    return {key: value for key, value in provenance.items() if key != long}
