"""From images with captions to the subspace of a concept in what each layer reads.

For the layers that read no text directly. GPM (Saha et al., ICLR 2021, arXiv:2103.09762) keeps
updates off the leading directions of a layer's inputs; here these are the directions that hold more
of the concept's images than of the images to be retained. A V = 0 is as exact as for text. That V
holds the concept is measured on the given images, and not promised for any others.
"""

import hashlib
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ...arrays import Float, Tensor
from ...models.lora.layer_names import TEXT_FED
from ...score.denoiser import Denoiser
from ...score.detection import Progress
from ..concept.fitting import PRICE
from ..concept.images import HOLDOUT, CaptionedLatents
from ..concept.subspace import contrast, leading
from .activations import Sketch, recording, run_noisy
from .regions import fit_regions, share_shown
from .subspaces import LayerSubspaces

CAP = 24
"""Most dimensions of a layer."""
BATCH = 8
"""Images that are run through the network at once."""


class TooFewImages(ValueError):
    """There are too few images to tell a concept from everything else."""


def fit_layer_subspaces(
    denoiser: Denoiser,
    network: nn.Module,
    concept: CaptionedLatents,
    others: CaptionedLatents,
    *,
    names: Sequence[str] = (),
    energy: float = 0.95,
    cap: int = CAP,
    progress: Progress | None = None,
) -> LayerSubspaces:
    """Return a subspace for each layer that reads no text directly, and the concept's regions.

    Args:
        denoiser: The model before training.
        network: Its network.
        concept: Images of the concept, with captions that name it if the training's do.
        others: Images of everything that must stay.
        names: What captions call the concept, for the provenance.
        energy: Share of the concept at which a layer's subspace stops, in (0, 1].
        cap: Most dimensions of a layer.
        progress: Called with how many more images were run through the network.

    Returns:
        Subspaces and regions. The provenance counts the images and holds, measured on the holdout,
        the median over the layers of the share that lies inside and the share of places that show
        the concept.

    Raises:
        TooFewImages: There are fewer than `HOLDOUT` on a side.
    """
    sides = {"concept": concept, "retained": others}
    for name, side in (("of the concept", concept), ("of anything else", others)):
        if len(side.captions) < HOLDOUT:
            raise TooFewImages(
                f"There are {len(side.captions)} images {name}, at least {HOLDOUT} are needed."
            )
    layers = layers_without_text(network)
    learnt, tested = (
        [record_inputs(denoiser, layers, side.part(holdout=part), progress)
         for side in sides.values()]
        for part in (False, True)
    )  # fmt: skip
    made = subspaces_from_sketches(*learnt, energy=energy, cap=cap)
    shares = shares_inside(made.bases, *tested).values()
    text = "\n".join(concept.captions + others.captions)
    provenance = {
        **made.provenance,
        "names": list(names),
        "pictures": {name: len(side.captions) for name, side in sides.items()},
        "captions_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "held_out": {name: statistics.median(share[name] for share in shares) for name in sides},
    }
    regions = fit_regions(denoiser, network, made.bases, others.part(holdout=False).latents)
    if regions is not None:
        provenance["places"] = {
            name: share_shown(regions, denoiser, network, side.part(holdout=True).latents)
            for name, side in sides.items()
        }
    return replace(made, provenance=provenance, regions=regions)


def layers_without_text(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions that read no text directly, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not re.search(TEXT_FED, name)
    }


def record_inputs(
    denoiser: Denoiser,
    layers: Mapping[str, nn.Module],
    images: CaptionedLatents,
    progress: Progress | None = None,
) -> dict[str, Sketch]:
    """Return what layers read when the network is run on noisy images."""
    with recording(layers) as sketches:
        for start in range(0, len(images.captions), BATCH):
            some = slice(start, start + BATCH)
            captions = images.captions[some]
            run_noisy(denoiser, images.latents[some], captions, seed=start)
            if progress is not None:
                progress(len(captions))
    return sketches


def subspaces_from_sketches(
    concept: Mapping[str, Sketch],
    retained: Mapping[str, Sketch],
    *,
    energy: float = 0.95,
    cap: int = CAP,
) -> LayerSubspaces:
    """Return for each layer the directions of the concept that are worth `PRICE`; see `contrast`.

    Both sides are taken as deviations from the retained mean, which is most of what a layer reads
    and is itself retained: what a concept changes counts, not what it shares. Both energies are
    shares of their layer's.

    Args:
        concept: What layers read on images of the concept.
        retained: What the same layers read on everything that must stay.
        energy: Share of the concept at which to stop, in (0, 1].
        cap: Most dimensions of a layer.

    Raises:
        ValueError: The two do not hold the same layers, or no layer was ever run.
    """
    if not concept or concept.keys() != retained.keys():
        odd = sorted(concept.keys() ^ retained.keys())
        raise ValueError(
            "Concept and retained images must be recorded in the same layers; "
            + (f"{len(odd)} differ, first {odd[0]}." if odd else "no layer was recorded at all.")
        )
    bases = {}
    for name in concept:
        rows, rest, mean = _deviations(concept[name], retained[name])
        directions, energies = contrast(rows, torch.cat([rest, _unit(mean[None])]), PRICE)
        bases[name] = directions[:, : leading(energies, energy, 1.0, cap)]
    settings = {"price": PRICE, "energy": energy, "cap": cap}
    shares = shares_inside(bases, concept, retained)
    return LayerSubspaces(bases=bases, provenance={"settings": settings, "inside": shares})


def shares_inside(
    bases: Mapping[str, Tensor], concept: Mapping[str, Sketch], retained: Mapping[str, Sketch]
) -> dict[str, dict[str, float]]:
    """Return by layer which shares of `concept` and of `retained` lie inside its subspace.

    Args:
        bases: By layer [width rank], orthonormal columns.
        concept: What the layers read on images of the concept, fitted on or held out.
        retained: What they read on everything that must stay.
    """
    shares = {}
    for name, basis in bases.items():
        rows, rest, _ = _deviations(concept[name], retained[name])
        shares[name] = {
            "concept": float((rows @ basis).square().sum()),
            "retained": float((rest @ basis).square().sum()),
        }
    return shares


def _deviations(concept: Sketch, retained: Sketch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of both about the retained mean, each of energy 1 in all, and that mean."""
    mean = retained.sum / retained.count
    return _unit(concept.about(mean)), _unit(retained.about(mean)), mean


def _unit(rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    """Return the rows with an energy of 1 in all; rows that are all zero stay so."""
    return rows / rows.norm().clamp_min(1e-300)
