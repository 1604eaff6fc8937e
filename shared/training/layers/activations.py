"""The subspace of a concept in what each layer reads, for layers that read no text directly.

GPM (Saha et al., ICLR 2021, arXiv:2103.09762) keeps updates off the leading directions of a layer's
inputs. Here it is those that a concept's samples hold more of than what is to be retained. What
A V = 0 guarantees is as exact as for text; that V holds the concept is measured, on the samples
that were heard, and not promised of others.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...arrays import Float, Tensor
from ...score.denoiser import Denoiser
from ...wording import counted
from ..concept.acceptance import PRICE
from ..concept.contrast import contrast, leading
from ..projection.factors import TEXT_FED, text_factors
from .sketch import Sketch
from .subspaces import LayerSubspaces

CAP = 24
"""Most dimensions of a layer."""
ROWS = 128
"""Places of a batch that are heard in each pass, drawn anew for each layer."""


def other_factors(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the down factors of the plain LoRA on layers that read no text, by module.

    Raises:
        UnsupportedTraining: Something else is trained too: DoRA, a bias, a text encoder.
    """
    every = text_factors(network, text_fed="")
    return {name: each for name, each in every.items() if not re.search(TEXT_FED, name)}


def owners(network: nn.Module, factors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return by factor the module that it is the weight of, whose input it reads.

    Raises:
        ValueError: A factor belongs to no module of the network.
    """
    modules = {id(p): m for m in network.modules() for p in m.parameters(recurse=False)}
    if strange := [name for name, factor in factors.items() if id(factor) not in modules]:
        told = counted(len(strange), "factor is", "factors are")
        raise ValueError(f"{told} not the network's, first {strange[0]}.")
    return {name: modules[id(factor)] for name, factor in factors.items()}


@contextmanager
def listening(
    layers: Mapping[str, nn.Module], *, paired: bool = False, size: int = 64, seed: int = 0
) -> Iterator[dict[str, Sketch]]:
    """Remember what layers read while the block lasts, in a sketch for each that was run.

    The network should be in evaluation mode, since dropout would be heard too.

    Args:
        layers: By name; linear layers, or convolutions, which read one vector at each place.
        paired: The second half of each batch are twins of the first, of the same noise and
            timestep: what is remembered is the difference between the two.
        size: Rows of a sketch.
        seed: Of the choice of places.
    """
    heard: dict[str, Sketch] = {}
    generator = torch.Generator().manual_seed(seed)

    def hear(name: str, inputs: Tensor) -> None:
        places = inputs.detach().movedim(1, -1) if inputs.ndim == 4 else inputs.detach()
        if paired:
            ours, twins = places.chunk(2)
            places = ours - twins
        rows = places.reshape(-1, places.shape[-1])
        chosen = torch.randperm(len(rows), generator=generator)[:ROWS].to(rows.device)
        heard.setdefault(name, Sketch(rows.shape[1], size)).add(rows[chosen])

    with ExitStack() as undo:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0]))
            undo.callback(hook.remove)
        yield heard


@torch.no_grad()
def run_through(
    denoiser: Denoiser,
    latents: Float[Tensor, " sample *latent"],
    prompts: Sequence[str],
    *,
    levels: int = 8,
    seed: int = 0,
) -> None:
    """Run a network on noisy samples at noise levels spread over its schedule.

    Args:
        denoiser: Its network is run once a level; with `listening`, its layers are heard.
        latents: Clean ones.
        prompts: One per latent.
        levels: How many.
        seed: Of the noise, equal for both halves of a batch that is listened to in pairs.
    """
    cond = denoiser.encode(prompts)
    # The cleanest and the noisiest level tell least: one has hardly noise, one hardly a picture.
    sigmas = denoiser.sigmas(levels + 2)[1 : levels + 1]
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(-(-len(latents) // 2), *latents.shape[1:], generator=generator)
    noise = torch.cat([half, half])[: len(latents)].to(latents)
    for sigma in sigmas:
        level = sigma.to(latents)
        kept = 1 - level if denoiser.parametrization == "flow" else 1.0
        denoiser.denoise(kept * latents + level * noise, sigma, cond)


def fit_layers(
    concept: Mapping[str, Sketch],
    retained: Mapping[str, Sketch],
    *,
    paired: bool = False,
    price: float = PRICE,
    energy: float = 0.95,
    cap: int = CAP,
) -> LayerSubspaces:
    """Return for each layer the directions of the concept that are worth their price.

    Both are taken as deviations from the retained mean, which is most of what a layer reads and is
    itself retained: like twins in text, what a concept changes counts, not what it shares.

    Args:
        concept: What layers read on samples of the concept.
        retained: What the same layers read on everything that is wanted.
        paired: `concept` was heard in pairs, as differences already.
        price: See `contrast`; both energies are taken as shares of their layer's.
        energy: Share of the concept at which to stop, in (0, 1].
        cap: Most dimensions of a layer.

    Raises:
        ValueError: The two do not hold the same layers, or a layer was never run.
    """
    if not concept or concept.keys() != retained.keys():
        odd = sorted(concept.keys() ^ retained.keys())
        raise ValueError(
            f"Concept and retained must be heard in the same layers; {len(odd)} differ"
            + (f", first {odd[0]}." if odd else ": nothing was heard at all.")
        )
    bases = {}
    for name, ours in concept.items():
        rows, rest, mean = _deviations(ours, retained[name], paired)
        directions, energies = contrast(rows, torch.cat([rest, _shares(mean[None])]), price)
        bases[name] = directions[:, : leading(energies, energy, 1.0, cap)]
    settings = {"price": price, "energy": energy, "cap": cap}
    shares = shares_inside(bases, concept, retained, paired=paired)
    return LayerSubspaces(bases=bases, provenance={"settings": settings, "inside": shares})


def shares_inside(
    bases: Mapping[str, Tensor],
    concept: Mapping[str, Sketch],
    retained: Mapping[str, Sketch],
    *,
    paired: bool = False,
) -> dict[str, dict[str, float]]:
    """Return by layer which shares of `concept` and of `retained` lie inside its subspace.

    Args:
        bases: By layer [width rank], orthonormal columns.
        concept: What the layers read on samples of the concept, those fitted on or others.
        retained: What they read on everything that is wanted.
        paired: `concept` was heard in pairs, as differences already.
    """
    found = {}
    for name, basis in bases.items():
        rows, rest, _ = _deviations(concept[name], retained[name], paired)
        found[name] = {
            "concept": float((rows @ basis).square().sum()),
            "retained": float((rest @ basis).square().sum()),
        }
    return found


def _deviations(concept: Sketch, retained: Sketch, paired: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is heard of both about the retained mean, energies of 1 in all, and that mean."""
    mean = retained.sum / retained.count
    rows = concept.rows if paired else concept.about(mean)
    return _shares(rows), _shares(retained.about(mean)), mean


def _shares(rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    """Return the rows with an energy of 1 in all; those that are zero stay so."""
    return rows / rows.norm().clamp_min(1e-300)
