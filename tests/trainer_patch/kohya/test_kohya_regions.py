"""Regions of the concept in sd-scripts: everywhere, nowhere, and in captions that do not name it.

The layers' subspaces are arbitrary: what is shown is what happens in the regions, and that they are
those which diffusers finds.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_subspaces import make_layers
from kohya_lora import header, protect, same_tensors
from safetensors.torch import load_file
from test_kohya_projection import UNETS
from unmemorize import demo
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.fitting import layers_without_text
from unmemorize.shared.training.layers.regions import ConceptRegions, fit_regions, looking
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

pytestmark = pytest.mark.slow

EVERYWHERE, NOWHERE = -1.0, 1e9
"""Limits of scores, which are never negative."""
TOGETHER = {
    "mixed_precision": "bf16", "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
    "max_train_steps": 3,
}  # fmt: skip
OTHERS = {
    "asked": {"cache_latents": None, "network_dropout": 0.2, "max_data_loader_n_workers": 1,
              "min_snr_gamma": 5, "noise_offset": 0.1, "clip_skip": 2},
    "asked_sdxl": {"script": "sdxl_train_network.py", "cache_text_encoder_outputs": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser(demo.MODEL)


@pytest.fixture(scope="module")
def held(room, denoiser):
    """Subspaces of all layers, and the regions measured with them."""
    held = LayerSubspaces.load(make_layers(room))
    some = torch.randn(4, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    regions = fit_regions(denoiser, denoiser.family.network, held.bases, some)
    return replace(held, regions=regions)


@pytest.fixture(scope="module")
def asked(room, checkout, held):
    """Function that returns the options of a training: where the regions are, whose they are."""
    if "get_noise_pred_and_target" not in (checkout / "train_network.py").read_text("utf-8"):
        pytest.skip("this version of sd-scripts has no method that gives a step's target")

    def options(limit: float | None = None, names: tuple[str, ...] = ()) -> dict:
        path = room / f"{limit} {' '.join(names)}.layers.safetensors"
        regions = None if limit is None else replace(held.regions, limit=limit)
        replace(held, regions=regions, provenance={"names": list(names)}).save(path)
        return of_files(path, room / "empty.safetensors")

    return options


@pytest.fixture
def asked_sdxl(room, asked):
    """Function like `asked`; one of the layers sees places, all are named as in diffusers."""
    from diffusers import UNet2DConditionModel

    small = UNETS["sdxl_train_network.py"] | {"block_out_channels": (32, 64, 128)}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**small)
    widths = {name: layer.weight.shape[1] for name, layer in layers_without_text(unet).items()}
    bases = {name: torch.zeros(width, 0).double() for name, width in widths.items()}
    read = next(name for name in widths if name.endswith("attn1.to_q"))
    bases[read] = torch.eye(widths[read]).double()[:, :1]
    ConceptSubspace.empty(2048).save(room / "2048.safetensors")

    def options(limit: float | None = None) -> dict:
        path = room / f"sdxl {limit}.layers.safetensors"
        regions = None if limit is None else ConceptRegions(
            bases={read: bases[read]}, centres={read: torch.zeros(1).double()},
            units={read: 1.0}, limit=limit, sigma=0.5,
        )  # fmt: skip
        LayerSubspaces(bases=bases, regions=regions).save(path)
        return of_files(path, room / "2048.safetensors")

    return options


def of_files(layers: Path, text: Path) -> dict:
    """Return options that ask for regions where the layers' file has some."""
    spares = LayerSubspaces.load(layers).regions is not None
    pairs = (f"project_layers={layers}", f"project_concepts={text}")
    return protect(*pairs, *("project_regions=true",) * spares)


@pytest.fixture(scope="module")
def without(train, asked):
    given = asked()
    return train("without regions", *given.pop("extra"), **given)


def ups(path) -> float:
    """Return the largest entry of any up factor, which all start at 0."""
    return max(float(v.abs().max()) for k, v in load_file(path).items() if "lora_up" in k)


def counts(path) -> dict:
    return json.loads(header(path)["unmemorize.projection"])["regions"]


def test_nothing_is_learnt_where_everything_is_the_concept(train, asked, without):
    given = asked(EVERYWHERE)
    path = train("everywhere", *given.pop("extra"), **given)
    assert ups(path) == 0
    assert ups(without) > 1e-4
    seen = counts(path)
    assert seen["samples"] == seen["named"] == seen["with_regions"] > 4
    assert seen["share_of_places"] == 1


def test_the_target_there_is_without_the_lora(train, asked, without):
    """Were it the LoRA's own prediction, no gradient would move it."""
    given = asked(EVERYWHERE) | {"network_weights": str(without)}
    path = train("unlearnt", *given.pop("extra"), **given)
    before, after = load_file(without), load_file(path)
    assert max(float((after[k] - before[k]).abs().max()) for k in before if "lora_up" in k) > 1e-3


@pytest.mark.parametrize(
    ("limit", "names"), [(NOWHERE, ()), (EVERYWHERE, ("quix",))], ids=["nowhere", "not named"]
)
def test_no_bit_changes_where_nothing_shows_the_concept(train, asked, without, limit, names):
    given = asked(limit, names)
    path = train(f"regions {limit}", *given.pop("extra"), **given)
    assert same_tensors(path, without)
    assert counts(path)["with_regions"] == 0


def test_only_samples_that_name_the_concept_are_spared(train, asked, without):
    given = asked(EVERYWHERE, ("sushi",))
    path = train("sushi", *given.pop("extra"), "mem_filter=inf", **given)
    assert ups(path) > 1e-4
    assert not same_tensors(path, without)
    seen = counts(path)
    assert 0 < seen["named"] == seen["with_regions"] < seen["samples"]


@pytest.mark.parametrize("model", OTHERS)
def test_the_same_with_much_asked_at_once(train, request, model):
    """Also with SDXL, whose layers sd-scripts names otherwise than diffusers."""
    paths = {}
    for limit in (None, NOWHERE, EVERYWHERE):
        given = request.getfixturevalue(model)(limit) | TOGETHER | OTHERS[model]
        paths[limit] = train(f"{model} {limit}", *given.pop("extra"), **given)
    assert same_tensors(paths[NOWHERE], paths[None])
    assert ups(paths[None]) > 1e-4
    assert ups(paths[EVERYWHERE]) == 0
    every = 2 * 2 * 3  # samples of a batch, batches of a step, steps
    assert counts(paths[EVERYWHERE]) == {
        "samples": every, "named": every, "with_regions": every, "share_of_places": 1,
    }  # fmt: skip


def test_places_are_those_that_diffusers_finds_and_a_resumed_training_counts_on(
    train, room, asked, held, denoiser
):
    """One picture names the concept; it is looked at with the same noise in each of its visits."""
    limit = 0.35
    given = asked(limit, ("sushi",)) | {
        "cache_latents_to_disk": True, "max_train_steps": 18, "save_every_n_epochs": 1,
        "save_state": True,
    }  # fmt: skip
    extra = given.pop("extra")
    whole = counts(train("regions whole", *extra, **given))
    [file] = (room / "images").rglob("0_*.npz")
    with np.load(file) as cached:
        latents = next(cached[key] for key in cached if key.startswith("latents"))
    latents = torch.from_numpy(latents)[None] * denoiser.pipeline.vae.config.scaling_factor
    regions, network = replace(held.regions, limit=limit), denoiser.family.network
    share = float(regions.find(network, looking(denoiser, regions.sigma), latents).float().mean())
    assert 0.1 < share < 0.9
    assert whole["share_of_places"] == pytest.approx(share)
    assert whole["samples"] == 36
    assert 0 < whole["named"] == whole["with_regions"] < 36
    again = counts(train(
        "regions again", *extra, **given, skip_until_initial_step=True,
        resume=str(room / "regions whole" / "lora-000001-state"),
    ))  # fmt: skip
    assert again["share_of_places"] == pytest.approx(share)
    assert again["samples"] == 36
    first = counts(room / "regions whole" / "lora-000001.safetensors")
    assert first["samples"] == 12
    assert first["named"] < again["named"] == again["with_regions"]
