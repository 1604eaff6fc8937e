"""Where images show a concept, so that a training learns everything about them but that.

A LoRA that cannot read a concept's name, nor the directions of its images, can still learn to draw
the concept unasked. Therefore the target changes at the places that show the concept: there the
LoRA is taught what the network predicts without it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ...arrays import Float, Tensor
from ...models.lora.layer_names import cores
from ...score.denoiser import Denoiser
from ...score.noise_levels import noised
from ...wording import counted
from .activations import reading

STEPS, STEP = 20, 16
"""Of how many noise levels which one is looked at."""
USUAL, RARE = 0.95, 0.99
"""Quantiles over the places of other images: the unit of a layer's energy, the limit of scores."""
BATCH = 8
"""Images that are looked at in one pass."""
Look = Callable[[Tensor], object]
"""Runs a network once, without a prompt and without its LoRA, on clean latents
[image channel height width] to which noise of the level `ConceptRegions.sigma` is added."""


@dataclass(frozen=True, kw_only=True)
class ConceptRegions:
    """When a place of an image counts as showing the concept.

    A place shows the concept when its score is above that of 99 % of the places of other images.
    In each layer the energy of what it reads there, inside the concept's subspace and about the
    mean of other images, is divided by a unit; the score is the mean over the layers of
    log(1 + energy / unit).
    """

    bases: Mapping[str, Tensor]
    """By layer [width rank], orthonormal columns; those of the `LayerSubspaces` beside it."""
    centres: Mapping[str, Tensor]
    """By layer [rank], mean coordinates of other images in the basis."""
    units: Mapping[str, float]
    """By layer, an energy that places of other images seldom reach."""
    limit: float
    """Score above which a place shows the concept."""
    sigma: float
    """Noise level at which images are looked at: low, so that the network tells places apart."""
    _readers: MutableMapping[nn.Module, "PlaceReader"] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.units or not self.bases.keys() == self.centres.keys() == self.units.keys():
            raise ValueError("`bases`, `centres` and `units` must name the same layers.")

    def shown(
        self, network: nn.Module, look: Look, latents: Float[Tensor, "image channel height width"]
    ) -> Tensor:
        """Return which places show the concept, booleans [image 1 rows columns].

        Args:
            network: Whose layers are recorded, in any dialect of their names.
            look: Runs it.
            latents: Clean ones, in the network's scale.

        Raises:
            ValueError: The network lacks one of the layers, or it does not see places in latents
                of this size.
        """
        read = self.reader(network).read(look, latents)
        if missing := self.bases.keys() - read.keys():
            count = counted(len(missing), "layer does", "layers do")
            raise ValueError(
                f"{count} not see the places of these latents, first {min(missing)}: were the "
                "regions measured with another model?"
            )
        shown = self.score(read) > self.limit
        height, width = latents.shape[-2:]
        scale = place_width(shown.shape[1], height, width)
        return shown.view(len(latents), 1, height // scale, width // scale)

    def find(
        self, network: nn.Module, look: Look, latents: Float[Tensor, "image channel height width"]
    ) -> Tensor:
        """Return where images show the concept, booleans [image 1 height width] of latents.

        The neighbours of a place that shows it count too, since neither the network nor the
        autoencoder keeps to one place. See `shown`.
        """
        places = self.shown(network, look, latents).float()
        places = nn.functional.max_pool2d(places, 3, stride=1, padding=1)
        return nn.functional.interpolate(places, size=latents.shape[-2:]).bool()

    def reader(self, network: nn.Module) -> "PlaceReader":
        """Return what reads the places of a network, the same each time."""
        if network not in self._readers:
            self._readers[network] = PlaceReader(network, self.bases, self.centres)
        return self._readers[network]

    def score(self, read: Mapping[str, Tensor]) -> Float[Tensor, "image place"]:
        """Return the score of each place by what its `reader` has read."""
        energies = [energy(read[name]) / self.units[name] for name in read]
        return torch.stack(energies).log1p().mean(0)


def fit_regions(
    denoiser: Denoiser,
    network: nn.Module,
    bases: Mapping[str, Tensor],
    others: Float[Tensor, "image channel height width"],
) -> ConceptRegions | None:
    """Return when a place shows the concept; None where no layer tells places apart.

    The images are run through the network twice, for the mean and for the quantiles.

    Args:
        denoiser: The model before training.
        network: Its network.
        bases: Of the concept, by layer [width rank]; only the linear layers that see most places
            are used.
        others: Clean latents of images without the concept.
    """
    sigma = float(denoiser.sigmas(STEPS)[STEP])
    look = looking(denoiser, sigma)
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    used = {name: basis for name, basis in bases.items() if name in linear and basis.shape[1]}
    sums: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    reader = PlaceReader(network, used)
    for batch in _in_batches(others):
        for name, read in reader.read(look, batch).items():
            sums[name] = sums.get(name, 0) + read.cpu().double().sum((0, 1))
            places[name] = read.shape[1]
    if not places:
        return None
    used = {name: used[name] for name in places if places[name] == max(places.values())}
    centres = {name: sums[name] / (places[name] * len(others)) for name in used}
    parts: dict[str, list[Tensor]] = {name: [] for name in used}
    reader = PlaceReader(network, used, centres)
    for batch in _in_batches(others):
        for name, read in reader.read(look, batch).items():
            parts[name].append(energy(read).cpu())
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
    latents: Float[Tensor, "image channel height width"],
) -> float:
    """Return the share of the images' places that show the concept, without their neighbours."""
    look = looking(denoiser, regions.sigma)
    shown = [regions.shown(network, look, batch) for batch in _in_batches(latents)]
    return float(torch.cat(shown).float().mean())


def looking(denoiser: Denoiser, sigma: float) -> Look:
    """Return how a denoiser's network looks at images.

    Args:
        denoiser: Its text encoders are used now and no more.
        sigma: Noise level.
    """
    # Not `unconditional`, which is zeros for SDXL: trainers encode the empty prompt.
    empty = denoiser.encode([""])

    def look(latents: Tensor) -> None:
        noisy = noised(denoiser.parametrization, latents, still_noise(latents), sigma)
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
    latents: Float[Tensor, "image channel height width"],
) -> Float[Tensor, "image channel height width"]:
    """Return the same noise for every image: what one shows does not depend on its batch."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *latents.shape[1:], generator=generator)
    return noise.to(latents).expand_as(latents)


class PlaceReader:
    """Reads what the layers of one network see at each place, as coordinates in their bases.

    The layers are looked up once, and what they are compared with is moved once to where they
    compute.
    """

    def __init__(
        self,
        network: nn.Module,
        bases: Mapping[str, Tensor],
        centres: Mapping[str, Tensor] | None = None,
    ):
        """Look the layers up.

        Args:
            network: That is going to run.
            bases: By layer [width rank], in any dialect of the names.
            centres: By layer [rank], from which coordinates are counted; None for 0.

        Raises:
            ValueError: The network lacks one of the layers.
        """
        modules: dict[str, nn.Module] = {}
        for name, module in network.named_modules():
            for core in cores(name):
                modules.setdefault(core, module)
        if missing := [name for name in bases if cores(name)[0] not in modules]:
            raise ValueError(f"The network has no layer {missing[0]}.")
        self._layers = {name: modules[cores(name)[0]] for name in bases}
        self._bases, self._centres = dict(bases), dict(centres or {})

    @torch.no_grad()
    def read(
        self, look: Look, latents: Float[Tensor, "image channel height width"]
    ) -> dict[str, Float[Tensor, "image place rank"]]:
        """Return by layer the coordinates of each place; layers that see no places are left out.

        Args:
            look: One forward pass of the network.
            latents: Clean ones.
        """
        height, width = latents.shape[-2:]
        found: dict[str, Tensor] = {}

        def record(name: str, inputs: Tensor) -> None:
            if inputs.ndim == 3 and place_width(inputs.shape[1], height, width):
                places = inputs.float()
                for of in (self._bases, self._centres):
                    if name in of:
                        of[name] = of[name].to(places)  # itself from the second time on
                found[name] = places @ self._bases[name]
                if name in self._centres:
                    found[name] -= self._centres[name]

        with reading(self._layers, record):
            look(latents)
        return found


def energy(read: Float[Tensor, "image place rank"]) -> Float[Tensor, "image place"]:
    """Return the energy of a layer's coordinates."""
    return read.square().sum(-1)


def place_width(places: int, height: int, width: int) -> int:
    """Return how many latents a place is wide, 0 where so many places do not tile the latents."""
    scale = math.isqrt(height * width // places) if places else 0
    whole = scale and not height % scale and not width % scale
    return scale if whole and places * scale**2 == height * width else 0


def _in_batches(latents: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(latents), BATCH):
        yield latents[start : start + BATCH]


def _quantile(values: Tensor, share: float) -> float:
    # numpy's: torch's takes no more than 16 million values.
    return float(np.quantile(values.numpy(), share))
