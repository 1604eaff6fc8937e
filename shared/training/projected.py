"""The projection over one whole training: its subspaces, its factors, its files."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..wording import name_some
from .base_targets import BaseTargets
from .concept.fitting import fit_subspace
from .concept.subspace import ConceptSubspace
from .concept.text_states import TextPath
from .layers.subspaces import LayerSubspaces
from .projection.factors import projected_factors, projected_factors_of, trains_text_encoder
from .projection.products import Products
from .projection.projection import Projection, ProjectionFailed, check_file
from .settings import ProjectionSettings

logger = logging.getLogger(__name__)

TRAINED_TEXT = (
    "The text encoder is trained too. The network's layers are kept off the concept's states "
    "exactly, but as the text encoder makes them now: a trained one can move the concept's words "
    "out of that subspace, so the LoRA can still learn to react to them. The whole guarantee needs "
    "a text encoder that stays as it is."
)


class ProjectedTraining:
    """Made from the settings, then `fit` to the model's text and bound to a LoRA by `protect`."""

    def __init__(self, settings: ProjectionSettings):
        self.settings = settings
        self.subspace: ConceptSubspace | None = None
        """Of text states."""
        self.layers: LayerSubspaces | None = None
        """Of the layers that read no text; once a LoRA is there, of those that it trains."""
        self.base_targets: BaseTargets | None = None
        """Where regions are requested."""
        self.projection: Projection | None = None
        self.residual: float | None = None
        """Largest |A V| / |A| when it was last measured."""
        self.text_encoder = False
        """Whether a text encoder is trained too; then only the network's side is kept."""
        self._products = Products()

    def fit(self, text_path: TextPath, captions: Sequence[str]) -> None:
        """Build or load the subspaces; see `Protection.fit`."""
        settings = self.settings
        if settings.file is not None:
            self.subspace = ConceptSubspace.load(settings.file)
        elif settings.concepts:
            self.subspace = fit_subspace(
                text_path, settings.concepts, captions,
                energy=settings.energy, cap=settings.cap, force=settings.force,
            )  # fmt: skip
        self.layers = settings.layer_subspaces()
        if self.subspace is not None:
            logger.info("Concept subspace: %s", _described(self.subspace))
        if settings.regions:
            assert self.layers is not None  # by the settings
            assert self.layers.regions is not None
            names = self.layers.provenance.get("names", ())
            self.base_targets = BaseTargets(self.layers.regions, names)

    def protect(self, network: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> None:
        """Find the factors to project; see `Protection.protect`."""
        named = list(network.named_parameters() if isinstance(network, nn.Module) else network)
        text = self.subspace is not None
        factors = projected_factors(named, text=text, layers=self.layers)
        self._products = Products.of(named, factors)
        self.text_encoder = trains_text_encoder(named)
        if self.text_encoder:
            logger.warning("%s", TRAINED_TEXT)
        if self.layers is not None:
            known, self.layers = self.layers, self.layers.among(factors)
            idle = known.bases.keys() - self.layers.bases.keys()
            logger.info(
                "Layers with a subspace: %d; of the file's %d, this LoRA does not train %s",
                len(self.layers.bases), len(known.bases), name_some(idle, 3) or "none",
            )  # fmt: skip
        self.projection = self._projection_of(factors, self._products)

    def start(self) -> None:
        """Project the weights, unless they are outside their subspaces but for rounding."""
        # A new projection, since the factors may be of another dtype now than when training began.
        if not self.projection:
            return
        if not self._projection_of(self.projection.factors, self._products).is_clear():
            self.projection.project_weights()

    def measure(self) -> None:
        """Measure the residual."""
        if self.projection:
            self.residual = max(self.projection.residuals().values())

    def check_file(self, path: Path) -> None:
        """Check a saved LoRA; see `Protection.after_save`."""
        check_file(path, self._subspaces, self.layers, text_encoder=self.text_encoder)

    def clear_rounding(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """Project a saved LoRA's tensors in place; see `Protection.clear_rounding`."""
        text = self.subspace is not None
        factors = projected_factors_of(
            state, text=text, layers=self.layers, source=source, text_encoder=self.text_encoder
        )
        projection = self._projection_of(factors, Products.of(state.items(), factors))
        if not projection.is_clear():
            projection.project_weights()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, once there is a LoRA."""
        assert self.projection is not None
        state: dict[str, Any] = {"steps": self.projection.steps}
        return state | ({"regions": self.base_targets.state_dict()} if self.base_targets else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; what is not in it starts anew."""
        assert self.projection is not None
        self.projection.steps = state.get("steps", self.projection.steps)
        if self.base_targets and "regions" in state:
            self.base_targets.load_state_dict(state["regions"])

    def finish(self) -> None:
        """Check the factors at the end.

        Raises:
            ProjectionFailed: There never were any, no step was projected, or some reach into their
                subspace.
            NoTargetSeen: Regions were requested, and no training step handed in its target.
        """
        if self.projection is None:
            raise ProjectionFailed("No LoRA was ever given to the projection.")
        logger.info("Projection: |A V| / |A| at most %.1e", self.projection.check())
        if self.base_targets:
            self.base_targets.finish()

    def account(self) -> dict[str, Any]:
        """Return how the subspaces were made and what the projection did, plain data.

        For the LoRA's metadata, without the parts that are too long to stand in every file.
        """
        assert self.projection is not None
        account: dict[str, Any] = {}
        if self.subspace is not None:
            account |= _without(self.subspace.provenance, "templates")
            account |= {"rank": self.subspace.rank, "width": self.subspace.width}
        if self.layers is not None:
            layers = _without(self.layers.provenance, "inside")
            account["layers"] = layers | {"count": len(self.layers.bases)}
        account |= {
            "modules": len(self.projection.factors),
            "steps": self.projection.steps,
            "residual": self.residual,
        }
        if self.text_encoder:
            account["text_encoder"] = "trained: only the network's layers are kept off the concept"
        return account | ({"regions": self.base_targets.account()} if self.base_targets else {})

    @property
    def _subspaces(self) -> list[ConceptSubspace]:
        return [] if self.subspace is None else [self.subspace]

    def _projection_of(self, factors: Mapping[str, Tensor], products: Products) -> Projection:
        return Projection(factors, self._subspaces, layers=self.layers, products=products)


def _described(subspace: ConceptSubspace) -> str:
    """Return size and acceptance of a subspace in one line."""
    made = subspace.provenance
    parts = [f"{subspace.rank} of {subspace.width} dimensions"]
    if "residuals" in made:
        missed = ", ".join(f"{residual:.1%}" for residual in made["residuals"])
        parts.append(f"{missed} of held-out sentences lies outside")
        parts.append(f"{made['collateral']:.1%} of other text lies inside")
        parts.append("accepted" if made["accepted"] else "NOT accepted, forced")
    return "; ".join(parts)


def _without(provenance: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name != key}
