"""Where pictures show a concept, so that a training learns everything about them but that: a trial.

Keeping a concept's name and its pictures' directions from a LoRA's inputs does not keep it from
drawing the concept everywhere, unasked: `trainers_projection.py` measures it. What does is to teach
it, at the places that show the concept, what the model does without it: there the LoRA is trained
to change nothing, elsewhere as before. No trainer's adapter does this yet.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn
from unmemorize.shared.arrays import Float, Tensor
from unmemorize.shared.denoiser import Denoiser
from unmemorize.shared.training.layer_fitting import BATCH, Pictures
from unmemorize.shared.training.layer_subspaces import LayerSubspaces

STEPS, STEP = 20, 16
"""Of how many noise levels which one is looked at: little noise, so that places can be told."""
USUAL, RARE = 0.95, 0.99
"""Quantiles of the other pictures' places: the unit of a layer's energy, and the limit."""


@torch.no_grad()
def find_regions(
    denoiser: Denoiser,
    network: nn.Module,
    layers: LayerSubspaces,
    concept: Pictures,
    others: Pictures,
) -> Float[Tensor, "picture 1 height width"]:
    """Return where the concept's pictures show it, 1 there and 0 elsewhere.

    A place shows the concept when what layers read there holds more of the concept's subspaces
    than 99 % of the places of other pictures do; its neighbours count too, since neither network
    nor autoencoder keep to a place.

    Args:
        denoiser: The model before training.
        network: Its network.
        layers: Subspaces of its layers, as `fitted_layers` makes them. Those are used that see
            most places.
        concept: Pictures of the concept.
        others: Pictures without it.

    Raises:
        ValueError: No layer with a subspace sees single places.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    found = layers.among(names).of(names)
    bases = {name: basis for name, basis in found.items() if basis.shape[1]}
    modules = {name: network.get_submodule(name) for name in bases}
    ours, theirs = (_places(denoiser, modules, side) for side in (concept, others))
    finest = max((places.shape[1] for places in theirs.values()), default=0)
    scores = []
    for name, places in theirs.items():
        if places.shape[1] != finest:
            continue
        basis, mean = bases[name].to(places), places.flatten(0, 1).mean(0)
        energies = [((side[name] - mean) @ basis).square().sum(-1) for side in (ours, theirs)]
        unit = energies[1].flatten().quantile(USUAL).clamp_min(torch.finfo(places.dtype).tiny)
        scores.append(torch.cat(energies).div(unit).log1p())
    if not scores:
        raise ValueError(
            "None of the layers that have a subspace sees the places of a picture apart: build the "
            "file of layers with `unmemorize concept layers` and the model that is trained."
        )
    score = torch.stack(scores).mean(0)
    count = len(concept.captions)
    shown = score[:count] > score[count:].flatten().quantile(RARE)
    height, width = denoiser.latent_shape[-2:]
    scale = _scale(finest, height, width)
    regions = shown.to(concept.latents).view(count, 1, height // scale, width // scale)
    regions = nn.functional.max_pool2d(regions, 3, stride=1, padding=1)
    return nn.functional.interpolate(regions, scale_factor=float(scale))


def spared(
    target: Float[Tensor, " sample *latent"],
    base: Float[Tensor, " sample *latent"],
    regions: Float[Tensor, "sample 1 height width"],
) -> Float[Tensor, " sample *latent"]:
    """Return the target of a training step that leaves the concept's places alone.

    Args:
        target: What the network would be taught: noise, velocity or flow.
        base: What it predicts of the same inputs without the LoRA.
        regions: Of `find_regions`, zeros for samples that do not show the concept.
    """
    return torch.lerp(target, base, regions)


def _places(
    denoiser: Denoiser, modules: Mapping[str, nn.Module], pictures: Pictures
) -> dict[str, Float[Tensor, "picture place width"]]:
    """Return what each layer reads at each place of the pictures, where it reads places."""
    height, width = denoiser.latent_shape[-2:]
    heard: dict[str, list[Tensor]] = {}

    def hear(name: str, inputs: Tensor) -> None:
        if inputs.ndim == 3 and _scale(inputs.shape[1], height, width):
            heard.setdefault(name, []).append(inputs.detach().float().cpu())

    sigma, empty = denoiser.sigmas(STEPS)[STEP], denoiser.unconditional()
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as undo:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0]))
            undo.callback(hook.remove)
        for start in range(0, len(pictures.captions), BATCH):
            latents = pictures.latents[start : start + BATCH]
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            level = sigma.to(latents)
            kept = 1 - level if denoiser.parametrization == "flow" else 1.0
            denoiser.denoise(kept * latents + level * noise, sigma, empty[[0] * len(latents)])
    return {name: torch.cat(parts) for name, parts in heard.items()}


def _scale(places: int, height: int, width: int) -> int:
    """Return how many latents a place is wide, 0 where a layer does not see such places."""
    scale = math.isqrt(height * width // places) if places else 0
    whole = scale and not height % scale and not width % scale
    return scale if whole and places * scale**2 == height * width else 0
