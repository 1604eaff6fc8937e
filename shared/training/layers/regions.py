"""Where pictures show a concept, so that a training learns everything about them but that.

Keeping a concept's name and its pictures' directions from what a LoRA reads does not keep it from
drawing the concept unasked. At the places that show the concept it is taught what the network
predicts without it, elsewhere as ever.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...arrays import Float, Tensor
from ...score.denoiser import Denoiser
from ...wording import counted
from .names import cores

Look = Callable[[Tensor], object]
"""Runs a network once, without a prompt and without its LoRA, on clean latents
[picture channel height width] to which noise of the level `ConceptRegions.sigma` is added."""


@dataclass(frozen=True, kw_only=True)
class ConceptRegions:
    """When a place of a picture counts as showing the concept.

    It does when what layers read there holds more of the concept's subspaces than 99 % of the
    places of other pictures do. Each layer's energy, about the mean of other pictures, is counted
    in a unit of its own; the score of a place is the mean over the layers of log(1 + energy).
    """

    bases: Mapping[str, Tensor]
    """By layer [width rank], orthonormal columns; those of the `LayerSubspaces` beside it."""
    centres: Mapping[str, Tensor]
    """By layer [rank], mean coordinates in the basis of what other pictures put there."""
    units: Mapping[str, float]
    """By layer, an energy that places of other pictures seldom reach."""
    limit: float
    """Score above which a place shows the concept."""
    sigma: float
    """Noise level at which pictures are looked at; little noise, so that places can be told."""

    def __post_init__(self):
        if not self.units or not self.bases.keys() == self.centres.keys() == self.units.keys():
            raise ValueError("`bases`, `centres` and `units` must be of the same layers, some.")

    def shown(
        self, network: nn.Module, look: Look, latents: Float[Tensor, "picture channel height width"]
    ) -> Tensor:
        """Return which places show the concept, booleans [picture 1 rows columns].

        Args:
            network: Whose layers are heard, in any dialect of their names.
            look: Runs it.
            latents: Clean ones, in the network's scale.

        Raises:
            ValueError: The network lacks one of the layers, or it does not see places in latents
                of this size.
        """
        found = coordinates(network, self.bases, look, latents)
        if missing := self.bases.keys() - found.keys():
            told = counted(len(missing), "layer does", "layers do")
            raise ValueError(
                f"{told} not see the places of these latents, first {min(missing)}: were the "
                "regions measured with another model?"
            )
        shown = self.score(found) > self.limit
        height, width = latents.shape[-2:]
        scale = place_width(shown.shape[1], height, width)
        return shown.view(len(latents), 1, height // scale, width // scale)

    def find(
        self, network: nn.Module, look: Look, latents: Float[Tensor, "picture channel height width"]
    ) -> Tensor:
        """Return where pictures show the concept, booleans [picture 1 height width] of latents.

        Neighbours of a place that shows it count too, since neither network nor autoencoder keep
        to a place. See `shown`.
        """
        places = self.shown(network, look, latents).float()
        places = nn.functional.max_pool2d(places, 3, stride=1, padding=1)
        return nn.functional.interpolate(places, size=latents.shape[-2:]).bool()

    def score(self, found: Mapping[str, Tensor]) -> Float[Tensor, "picture place"]:
        """Return the score of places by their `coordinates` in each layer."""
        energies = [energy(found[name], self.centres[name]) / self.units[name] for name in found]
        return torch.stack(energies).log1p().mean(0)


def spared(
    target: Float[Tensor, " sample *latent"],
    base: Float[Tensor, " sample *latent"],
    regions: Tensor,
) -> Float[Tensor, " sample *latent"]:
    """Return the target of a training step that leaves the concept's places alone.

    Args:
        target: What the network would be taught: noise, velocity or flow.
        base: What it predicts of the same inputs without the LoRA.
        regions: Of `ConceptRegions.find`, booleans [sample 1 height width].
    """
    return torch.where(regions, base.to(target), target)


def energy(
    found: Float[Tensor, "picture place rank"], centre: Float[Tensor, " rank"]
) -> Float[Tensor, "picture place"]:
    """Return the energy of a layer's coordinates about their centre."""
    return (found - centre.to(found)).square().sum(-1)


def looking(denoiser: Denoiser, sigma: float) -> Look:
    """Return how a denoiser's network looks at pictures.

    Args:
        denoiser: Its text encoders are used now and no more.
        sigma: Noise level.
    """
    # Not `unconditional`, which is zeros for SDXL: trainers encode the empty prompt.
    empty = denoiser.encode([""])
    kept = 1 - sigma if denoiser.parametrization == "flow" else 1.0

    def look(latents: Tensor) -> None:
        noisy = kept * latents + sigma * still_noise(latents)
        # In a training, text encoders may stand elsewhere and be of another precision.
        moved = {
            name: part.to(latents.device, denoiser.dtype)
            for name in ("embeddings", "pooled")
            if (part := getattr(empty, name)) is not None
        }
        cond = replace(empty, **moved)[[0] * len(latents)]
        denoiser.denoise(noisy, torch.tensor(sigma), cond)

    return look


def still_noise(
    latents: Float[Tensor, "picture channel height width"],
) -> Float[Tensor, "picture channel height width"]:
    """Return the same noise for every picture: what one shows does not depend on its batch."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *latents.shape[1:], generator=generator)
    return noise.to(latents).expand_as(latents)


@torch.no_grad()
def coordinates(
    network: nn.Module, bases: Mapping[str, Tensor], look: Look, latents: Tensor
) -> dict[str, Float[Tensor, "picture place rank"]]:
    """Return what layers read at each place, in their bases; not of those that see no places.

    Args:
        network: That `look` runs.
        bases: By layer [width rank], in any dialect of the names.
        look: One forward pass.
        latents: Clean ones, [picture channel height width].

    Raises:
        ValueError: The network lacks one of the layers.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        for core in cores(name):
            modules.setdefault(core, module)
    if missing := [name for name in bases if cores(name)[0] not in modules]:
        raise ValueError(f"The network has no layer {missing[0]}.")
    height, width = latents.shape[-2:]
    found: dict[str, Tensor] = {}

    def hear(name: str, inputs: Tensor) -> None:
        if inputs.ndim == 3 and place_width(inputs.shape[1], height, width):
            places = inputs.float()
            found[name] = places @ bases[name].to(places)

    with ExitStack() as undo:
        for name in bases:
            module = modules[cores(name)[0]]
            hook = module.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0]))
            undo.callback(hook.remove)
        look(latents)
    return found


def place_width(places: int, height: int, width: int) -> int:
    """Return how many latents a place is wide, 0 where so many places do not tile latents."""
    scale = math.isqrt(height * width // places) if places else 0
    whole = scale and not height % scale and not width % scale
    return scale if whole and places * scale**2 == height * width else 0
