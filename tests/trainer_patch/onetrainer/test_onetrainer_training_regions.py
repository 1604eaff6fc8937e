"""Regions of the concept in OneTrainer: everywhere, nowhere, and in captions that do not name it.

The layers' subspaces are arbitrary: what is shown is what happens in the regions, and that they are
those which diffusers finds.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkouts import CAPTIONS
from demo_subspaces import make_regions
from onetrainer_lora import EVERYTHING, STEPS, header, same_tensors, told
from PIL import Image
from safetensors.torch import load_file
from unmemorize import demo
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.training.layers.regions import looking
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

pytestmark = pytest.mark.slow
EVERYWHERE, NOWHERE = -1.0, 1e9
"""Limits of scores, which are never negative."""
MOST = EVERYTHING | {"output_dtype": "FLOAT_16", "epochs": 2}
"""Of 4 channels that the first layer reads 3 are kept out: bf16 leaves too much rounding there."""


@pytest.fixture(scope="session")
def regions(room):
    """Function that returns the file of the layers: where the regions are, whose they are."""
    return partial(make_regions, room)


@pytest.fixture(scope="session")
def spare(train, room, regions):
    """Function that trains with the layers' file, and with regions where a limit is given."""

    def run(name: str, limit: float | None, names: tuple[str, ...] = (), *more: str, **changed):
        layers = regions(NOWHERE if limit is None else limit, names)
        options = ["--project_concepts", str(room / "empty.safetensors"),
                   "--project_layers", str(layers), *more]  # fmt: skip
        return train(name, *options, *["--project_regions"] * (limit is not None), **changed)

    return run


@pytest.fixture(scope="session")
def without(spare) -> Path:
    return spare("no regions", None)


def ups(path: Path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_file(path).items() if "lora_up" in key}


def largest(path: Path) -> float:
    """Return the largest entry of any up factor, which all start at 0."""
    return max(float(value.abs().max()) for value in ups(path).values())


def counts(path: Path) -> dict:
    return told(path, "projection")["regions"]


def test_nothing_is_learnt_where_everything_is_the_concept(spare, without):
    path = spare("everywhere", EVERYWHERE)
    assert largest(path) == 0
    assert largest(without) > 1e-4
    every = 2 * STEPS
    assert counts(path) == {
        "samples": every, "named": every, "with_regions": every, "share_of_places": 1,
    }  # fmt: skip


def test_the_target_there_is_without_the_lora(spare, without):
    """Were it the LoRA's own prediction, no gradient would move it."""
    path = spare("unlearnt", EVERYWHERE, lora_model_name=str(without))
    before, after = ups(without), ups(path)
    assert max(float((after[key] - before[key]).abs().max()) for key in before) > 1e-3


@pytest.mark.parametrize(
    ("limit", "names"), [(NOWHERE, ()), (EVERYWHERE, ("quix",))], ids=["nowhere", "not named"]
)
def test_no_bit_changes_where_nothing_shows_the_concept(spare, without, limit, names):
    path = spare(f"regions {limit}", limit, names)
    assert same_tensors(path, without)
    assert counts(path)["with_regions"] == 0


def test_only_samples_that_name_the_concept_are_spared(spare, without):
    path = spare("sushi", EVERYWHERE, ("sushi",), "--mem_filter", "inf")
    assert largest(path) > 1e-4
    assert not same_tensors(path, without)
    assert counts(path) == {"samples": 8, "named": 2, "with_regions": 2, "share_of_places": 1}
    assert told(path, "filter")["seen"] == 2 * STEPS


def test_the_same_with_much_asked_at_once(spare):
    paths = {
        limit: spare(f"much {limit}", limit, (), "--mem_filter", "inf", **MOST)
        for limit in (None, NOWHERE, EVERYWHERE)
    }
    assert same_tensors(paths[NOWHERE], paths[None])
    assert largest(paths[None]) > 1e-4
    assert largest(paths[EVERYWHERE]) == 0
    assert counts(paths[EVERYWHERE])["with_regions"] == 2 * len(CAPTIONS)


def test_images_of_prior_prediction_and_of_validation_are_left_alone(spare, room):
    concepts = [
        {"__version": 2, "path": str(room / "images"), "seed": number, "type": kind}
        for number, kind in enumerate(("STANDARD", "PRIOR_PREDICTION", "VALIDATION"))
    ]
    asked = {"concepts": concepts, "batch_size": 4, "epochs": 1, "validation": True,
             "validate_after": 1, "validate_after_unit": "STEP"}  # fmt: skip
    before = spare("priors", None, **asked)
    after = spare("priors with regions", NOWHERE, **asked)
    assert same_tensors(before, after)
    assert counts(after)["samples"] == len(CAPTIONS)


def test_places_are_those_that_diffusers_finds_and_a_resumed_training_counts_on(
    spare, room, regions
):
    """One picture names the concept; it is looked at with the same noise in each of its visits."""
    denoiser = load_denoiser(demo.MODEL)
    network, held = denoiser.family.network, LayerSubspaces.load(regions(NOWHERE)).regions
    pixels = torch.from_numpy(np.array(Image.open(room / "images" / "0.png"))).movedim(2, 0)
    vae = denoiser.pipeline.vae
    with torch.no_grad():
        latents = vae.encode(pixels[None] / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    look = looking(denoiser, held.sigma)
    scores = held.score(held.reader(network).read(look, latents)).flatten().sort().values
    # Of the upper places, the widest gap: rounding moves none of them over the limit.
    top = scores[-len(scores) // 8 :]
    place = int(top.diff().argmax())
    limit = float(top[place : place + 2].mean())
    share = float(replace(held, limit=limit).find(network, look, latents).float().mean())
    assert 0.02 < share < 0.98

    whole = spare("regions whole", limit, ("sushi",), epochs=3)
    assert counts(whole) == {"samples": 12, "named": 3, "with_regions": 3,
                             "share_of_places": pytest.approx(share)}  # fmt: skip
    for epochs, state in ((1, {"backup_before_save": True}), (3, {"continue_last_backup": True})):
        again = spare("regions again", limit, ("sushi",), epochs=epochs, **state)
    assert same_tensors(whole, again)
    assert header(whole) == header(again)
