"""From pictures without a concept to the limit above which a place shows it."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from ...arrays import Float, Tensor
from ...score.denoiser import Denoiser
from .regions import ConceptRegions, Look, coordinates, energy, looking

STEPS, STEP = 20, 16
"""Of how many noise levels which one is looked at."""
USUAL, RARE = 0.95, 0.99
"""Quantiles of other pictures' places: the unit of a layer's energy, and the limit of scores."""
AT_ONCE = 8
"""Pictures that are looked at in one pass."""


def fit_regions(
    denoiser: Denoiser,
    network: nn.Module,
    bases: Mapping[str, Tensor],
    others: Float[Tensor, "picture channel height width"],
) -> ConceptRegions | None:
    """Return when a place shows the concept; None where no layer tells places apart.

    The pictures are run through the network twice, for the mean and for the quantiles.

    Args:
        denoiser: The model before training.
        network: Its network.
        bases: Of the concept, by layer [width rank]. Used are those linear layers that see most
            places.
        others: Clean latents of pictures without it.
    """
    sigma = float(denoiser.sigmas(STEPS)[STEP])
    look = looking(denoiser, sigma)
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    used = {name: basis for name, basis in bases.items() if name in linear and basis.shape[1]}
    sums: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    for found in _in_batches(network, used, look, others):
        for name, each in found.items():
            sums[name] = sums.get(name, 0) + each.double().sum((0, 1)).cpu()
            places[name] = each.shape[1]
    if not places:
        return None
    used = {name: used[name] for name in places if places[name] == max(places.values())}
    centres = {name: sums[name] / (places[name] * len(others)) for name in used}
    parts: dict[str, list[Tensor]] = {name: [] for name in used}
    for found in _in_batches(network, used, look, others):
        for name, each in found.items():
            parts[name].append(energy(each, centres[name]).cpu())
    energies = {name: torch.cat(part) for name, part in parts.items()}
    tiny = torch.finfo(torch.float32).tiny
    units = {name: max(_quantile(each, USUAL), tiny) for name, each in energies.items()}
    scores = torch.stack([each / units[name] for name, each in energies.items()]).log1p().mean(0)
    return ConceptRegions(
        bases=used, centres=centres, units=units, limit=_quantile(scores, RARE), sigma=sigma
    )


def share_shown(
    regions: ConceptRegions,
    denoiser: Denoiser,
    network: nn.Module,
    latents: Float[Tensor, "picture channel height width"],
) -> float:
    """Return the share of pictures' places that show the concept, without their neighbours."""
    look = looking(denoiser, regions.sigma)
    shown = [
        regions.shown(network, look, latents[start : start + AT_ONCE])
        for start in range(0, len(latents), AT_ONCE)
    ]
    return float(torch.cat(shown).float().mean())


def _in_batches(
    network: nn.Module, bases: Mapping[str, Tensor], look: Look, latents: Tensor
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(latents), AT_ONCE):
        yield coordinates(network, bases, look, latents[start : start + AT_ONCE])


def _quantile(values: Tensor, share: float) -> float:
    # numpy's: torch's takes no more than 16 million values.
    return float(np.quantile(values.numpy(), share))
