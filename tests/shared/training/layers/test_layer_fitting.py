"""Subspaces of the demo model's layers, from images with a mark and images without."""

import pytest
import torch
from marked import COLOUR, latents_of
from unmemorize import demo
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.training.layers.fitting import (
    HOLDOUT,
    CaptionedLatents,
    TooFewImages,
    fit_layer_subspaces,
    layers_without_text,
)

COUNT, SIDE = 12, 40


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser(demo.MODEL)


@pytest.fixture(scope="module")
def part(denoiser):
    """The middle of the network: the rest would take longer and show no more."""
    return denoiser.family.network.mid_block


@pytest.fixture(scope="module")
def images(denoiser):
    """Function that returns some training images, with a mark in a corner or without."""

    def some(first: int, *, marked: bool) -> CaptionedLatents:
        def corner(pen):
            pen.ellipse([0, 0, SIDE, SIDE], fill=COLOUR)

        captions = tuple(f"picture {n}" + ", zorp" * marked for n in range(COUNT))
        latents = latents_of(denoiser, first, COUNT, corner if marked else None)
        return CaptionedLatents(latents=latents, captions=captions)

    return some


@pytest.fixture(scope="module")
def fitted(denoiser, part, images):
    seen = []
    made = fit_layer_subspaces(
        denoiser, part, images(0, marked=True), images(COUNT, marked=False),
        names=["zorp"], progress=seen.append,
    )  # fmt: skip
    assert sum(seen) == 2 * COUNT
    return made


def test_every_layer_that_reads_no_text_has_one(denoiser, part, fitted):
    layers = layers_without_text(part)
    assert fitted.bases.keys() == layers.keys()
    every = {name for name, _ in part.named_modules()}
    assert any(name.endswith("attn2.to_k") for name in every)
    for end, there in (("attn2.to_k", 0), ("attn2.to_v", 0), ("attn2.to_q", 1), ("conv1", 2)):
        assert sum(name.endswith(end) for name in layers) >= there
        assert there or not any(name.endswith(end) for name in layers)
    for name, basis in fitted.bases.items():
        module = layers[name]
        assert len(basis) == getattr(module, "in_features", None) or module.in_channels
    assert fitted.provenance["pictures"] == {"concept": COUNT, "retained": COUNT}
    assert fitted.provenance["names"] == ["zorp"]


def gap(layers) -> float:
    """Return how much more of the held-out concept than of the held-out others lies inside."""
    held_out = layers.provenance["held_out"]
    return held_out["concept"] - held_out["retained"]


def test_images_of_the_holdout_tell_concept_from_others(denoiser, part, images, fitted):
    others = images(2 * COUNT, marked=False)
    without = fit_layer_subspaces(denoiser, part, others, images(COUNT, marked=False))
    assert gap(fitted) > 0.05
    assert gap(without) < 0.03


def test_the_holdout_is_every_fourth():
    some = CaptionedLatents(latents=torch.arange(8.0)[:, None], captions=tuple("abcdefgh"))
    assert some.part(holdout=True).captions == ("d", "h")
    assert some.part(holdout=False).latents.flatten().tolist() == [0, 1, 2, 4, 5, 6]


def test_too_few_are_refused(denoiser, part):
    few = CaptionedLatents(latents=torch.zeros(3, *denoiser.latent_shape), captions=("a", "b", "c"))
    with pytest.raises(TooFewImages, match=f"3 images of the concept, at least {HOLDOUT}"):
        fit_layer_subspaces(denoiser, part, few, few)
    with pytest.raises(ValueError, match="3 latents and 1 captions"):
        CaptionedLatents(latents=few.latents, captions=("a",))
