"""Where images of the demo model show a mark that was drawn on them."""

import math
from dataclasses import replace

import pytest
import torch
from marked import COLOUR, latents_of
from torch import nn
from unmemorize import demo
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.training.layers.fitting import CaptionedLatents, fit_layer_subspaces
from unmemorize.shared.training.layers.regions import (
    RARE,
    fit_regions,
    looking,
    place_width,
    share_shown,
    still_noise,
)
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

COUNT, SIDE = 12, 48
"""Images of each kind; pixels that the mark is wide, in a corner."""


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser(demo.MODEL)


@pytest.fixture(scope="module")
def latents(denoiser):
    """Function that returns some training images, with a mark in a corner or without."""

    def some(first: int, *, marked: bool) -> torch.Tensor:
        def corner(pen):
            pen.rectangle([0, 0, SIDE, SIDE], fill=COLOUR)

        return latents_of(denoiser, first, COUNT, corner if marked else None)

    return some


@pytest.fixture(scope="module")
def network(denoiser):
    """The part that sees most places: the rest would take longer and show no more."""
    return denoiser.family.network.up_blocks[-1]


@pytest.fixture(scope="module")
def layers(denoiser, network, latents):
    sides = (
        CaptionedLatents(
            latents=latents(first, marked=marked), captions=(f"zorp {marked}",) * COUNT
        )
        for first, marked in ((0, True), (COUNT, False))
    )
    return fit_layer_subspaces(denoiser, network, *sides, names=["zorp"], cap=4)


def found_in(layers, denoiser, latents) -> torch.Tensor:
    look = looking(denoiser, layers.regions.sigma)
    return layers.regions.find(denoiser.family.network.up_blocks[-1], look, latents)


def test_the_mark_is_found_where_it_is_and_nowhere_else(denoiser, latents, layers):
    regions = found_in(layers, denoiser, latents(2 * COUNT, marked=True)).float().mean((0, 1))
    wide = SIDE * denoiser.latent_shape[-1] // denoiser.resolution[0]
    assert regions[:wide, :wide].mean() > 0.9
    assert regions[wide + 3 :, wide + 3 :].mean() < 0.1
    assert found_in(layers, denoiser, latents(3 * COUNT, marked=False)).float().mean() < 0.1


def test_what_a_file_tells_was_measured_on_images_held_out(denoiser, network, latents, layers):
    told = layers.provenance["places"]
    held_out = latents(COUNT, marked=False)[3::4]
    assert told["retained"] == share_shown(layers.regions, denoiser, network, held_out)
    assert told["retained"] < 0.04 < 0.08 < told["concept"]
    # Of the images that the limit was taken from, exactly what it lets through.
    learnt = latents(COUNT, marked=False)[[n for n in range(COUNT) if n % 4 != 3]]
    share = share_shown(layers.regions, denoiser, network, learnt)
    assert share == pytest.approx(1 - RARE, abs=1e-3)


def test_regions_are_those_of_a_slow_reference(denoiser, network, latents, layers):
    """One image, one place, one layer at a time, with everything spelt out."""
    regions, image = layers.regions, latents(2 * COUNT, marked=True)[:1]
    _, _, height, width = image.shape
    heard: dict[str, torch.Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: heard.update({name: args[0][0].double()})
        )
        for name in regions.units
    ]
    noisy = image + regions.sigma * still_noise(image)
    with torch.no_grad():
        denoiser.denoise(noisy, torch.tensor(regions.sigma), denoiser.unconditional())
    for hook in hooks:
        hook.remove()
    shows = torch.zeros(height, width, dtype=torch.bool)
    side = math.isqrt(height * width // len(heard[next(iter(heard))]))
    for row in range(height):
        for column in range(width):
            place, logs = (row // side) * (width // side) + column // side, []
            for name, unit in regions.units.items():
                read = heard[name][place]
                centre, inside = regions.centres[name], 0.0
                for axis, direction in enumerate(layers.bases[name].T):
                    inside += float(read @ direction - centre[axis]) ** 2
                logs.append(math.log(1 + inside / unit))
            shows[row, column] = sum(logs) / len(logs) > regions.limit
    wide = torch.zeros_like(shows)
    for row, column in shows.nonzero().tolist():
        top, left = row // side * side - side, column // side * side - side
        wide[max(0, top) : top + 3 * side, max(0, left) : left + 3 * side] = True
    assert torch.equal(found_in(layers, denoiser, image)[0, 0], wide)
    assert 0 < shows.sum() < wide.sum() < wide.numel()


def test_an_image_shows_the_same_alone_and_in_any_batch(denoiser, latents, layers):
    some = latents(2 * COUNT, marked=True)[:3]
    together = found_in(layers, denoiser, some)
    assert torch.equal(found_in(layers, denoiser, some.flip(0)), together.flip(0))
    assert torch.equal(found_in(layers, denoiser, some[1:2]), together[1:2])


def test_latents_of_another_shape(denoiser, latents, layers):
    wide = torch.cat([latents(2 * COUNT, marked=True)[:1]] * 2, dim=-1)
    assert found_in(layers, denoiser, wide).shape == (1, 1, *wide.shape[-2:])


def test_file_keeps_regions(denoiser, latents, layers, tmp_path):
    layers.save(tmp_path / "zorp.safetensors")
    loaded = LayerSubspaces.load(tmp_path / "zorp.safetensors")
    assert loaded.bases.keys() == layers.bases.keys()
    some = latents(2 * COUNT, marked=True)[:2]
    assert torch.equal(found_in(loaded, denoiser, some), found_in(layers, denoiser, some))
    few = loaded.among(list(loaded.bases)[:1])
    assert few.regions is loaded.regions  # found by layers that a LoRA need not train
    replace(layers, regions=None).save(tmp_path / "without.safetensors")
    assert LayerSubspaces.load(tmp_path / "without.safetensors").regions is None


def test_damaged_regions_are_told(layers, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "zorp.safetensors"
    layers.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    del tensors[next(key for key in tensors if key.startswith("centre/"))]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match="is damaged"):
        LayerSubspaces.load(path)


def test_network_without_such_layers(denoiser, latents, layers):
    look = looking(denoiser, layers.regions.sigma)
    with pytest.raises(ValueError, match="The network has no layer"):
        layers.regions.find(nn.Linear(2, 2), look, latents(0, marked=True))


def test_no_regions_where_no_layer_has_a_subspace_or_tells_places_apart(denoiser, network, latents):
    names = [name for name, _ in network.named_modules()]
    entry = next(name for name in names if name.endswith("time_emb_proj"))
    key = next(name for name in names if name.endswith("attn1.to_k"))
    some = latents(0, marked=False)
    widths = {name: network.get_submodule(name).in_features for name in (entry, key)}
    bases = {entry: torch.eye(widths[entry])[:, :2], key: torch.zeros(widths[key], 0)}
    assert fit_regions(denoiser, network, bases, some) is None
    assert fit_regions(denoiser, network, {key: torch.eye(widths[key])[:, :2]}, some) is not None


@pytest.mark.parametrize(
    ("places", "height", "width", "scale"),
    [(256, 16, 16, 1), (64, 16, 16, 2), (128, 16, 32, 2), (77, 16, 16, 0), (0, 16, 16, 0),
     (333, 64, 64, 0), (4, 3, 3, 0)],
)  # fmt: skip
def test_width_of_a_place(places, height, width, scale):
    assert place_width(places, height, width) == scale
