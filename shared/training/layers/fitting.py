"""From pictures with captions to the subspaces of a network's layers."""

import hashlib
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...arrays import Float, Tensor
from ...score.denoiser import Denoiser
from ...score.detection import Progress
from ..projection.factors import TEXT_FED
from .activations import CAP, fit_layers, listening, run_through, shares_inside
from .region_fitting import fit_regions, share_shown
from .sketch import Sketch
from .subspaces import LayerSubspaces

HOLD_OUT = 4
"""Every so many pictures, one is kept to measure the subspaces on."""
BATCH = 8
"""Pictures that are run through the network at once."""


class TooFewPictures(ValueError):
    """There is nothing to tell a concept from."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures as a network is trained on them."""

    latents: Float[Tensor, " picture *latent"]
    """Clean ones, in the network's scale."""
    captions: tuple[str, ...]
    """As they stand in the training set."""

    def __post_init__(self):
        if len(self.latents) != len(self.captions):
            raise ValueError(
                f"There are {len(self.latents)} latents and {len(self.captions)} captions."
            )

    def part(self, *, held_out: bool) -> "Pictures":
        """Return the pictures to learn from, or those held out."""
        rows = [
            row for row in range(len(self.captions)) if (row % HOLD_OUT == HOLD_OUT - 1) == held_out
        ]
        return Pictures(
            latents=self.latents[rows], captions=tuple(self.captions[row] for row in rows)
        )


def fitted_layers(
    denoiser: Denoiser,
    network: nn.Module,
    concept: Pictures,
    others: Pictures,
    *,
    names: Sequence[str] = (),
    energy: float = 0.95,
    cap: int = CAP,
    progress: Progress | None = None,
) -> LayerSubspaces:
    """Return a subspace for each layer that reads no text directly; see `fit_layers`.

    Args:
        denoiser: The model before training.
        network: Its network.
        concept: Pictures of the concept, with captions that name it if the training's do.
        others: Pictures of everything that must stay.
        names: What captions call the concept, for the provenance.
        energy: Share of the concept at which a layer's subspace stops, in (0, 1].
        cap: Most dimensions of a layer.
        progress: Called with how many more pictures were run through the network.

    Returns:
        Subspaces, and with them where pictures show the concept. The provenance tells the pictures
        and, for those held out, the median over the layers of the share that lies inside and the
        share of places that show the concept.

    Raises:
        TooFewPictures: There are fewer than `HOLD_OUT` on a side.
    """
    for name, side in (("of the concept", concept), ("of anything else", others)):
        if len(side.captions) < HOLD_OUT:
            raise TooFewPictures(
                f"There are {len(side.captions)} pictures {name}, at least {HOLD_OUT} are needed."
            )
    layers = silent_layers(network)
    heard, tested = (
        [hear(denoiser, layers, side.part(held_out=part), progress) for side in (concept, others)]
        for part in (False, True)
    )
    made = fit_layers(*heard, energy=energy, cap=cap)
    shares = shares_inside(made.bases, *tested)
    told = {"names": list(names)} | _told(concept, others, shares)
    regions = fit_regions(denoiser, network, made.bases, others.part(held_out=False).latents)
    if regions is not None:
        told["places"] = {
            name: share_shown(regions, denoiser, network, side.part(held_out=True).latents)
            for name, side in (("concept", concept), ("retained", others))
        }
    return replace(made, provenance={**made.provenance, **told}, regions=regions)


def silent_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions that read no text directly, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not re.search(TEXT_FED, name)
    }


def hear(
    denoiser: Denoiser,
    layers: Mapping[str, nn.Module],
    pictures: Pictures,
    progress: Progress | None = None,
) -> dict[str, Sketch]:
    """Return what layers read when the network is run on noisy pictures."""
    with listening(layers) as heard:
        for start in range(0, len(pictures.captions), BATCH):
            some = slice(start, start + BATCH)
            captions = pictures.captions[some]
            run_through(denoiser, pictures.latents[some], captions, seed=start)
            if progress is not None:
                progress(len(captions))
    return heard


def _told(
    concept: Pictures, others: Pictures, shares: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Return what a file says of its making, plain data."""
    sides = {"concept": concept, "retained": others}
    text = "\n".join(concept.captions + others.captions)
    return {
        "pictures": {name: len(side.captions) for name, side in sides.items()},
        "captions_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "held_out": {
            name: statistics.median(share[name] for share in shares.values()) for name in sides
        },
    }
