"""Regions of the concept in sd-scripts: everywhere, nowhere, and in captions that do not name it.

The layers' subspaces are arbitrary: what is shown is what happens in the regions, not where they
are.
"""

import json
from dataclasses import replace

import pytest
import torch
from diffusers_runs import make_layers
from kohya_lora import flow, header, protect, same_tensors
from safetensors.torch import load_file
from test_kohya_projection import UNETS
from unmemorize import demo
from unmemorize.shared.models import load_denoiser
from unmemorize.shared.training.layer_fitting import silent_layers
from unmemorize.shared.training.layer_subspaces import LayerSubspaces
from unmemorize.shared.training.region_fitting import fit_regions
from unmemorize.shared.training.regions import ConceptRegions
from unmemorize.shared.training.subspace import ConceptSubspace

pytestmark = pytest.mark.slow

EVERYWHERE, NOWHERE = -1.0, 1e9
"""Limits of scores, which are never negative."""


@pytest.fixture(scope="module")
def asked(room, checkout):
    """Function that returns the options of a training: where the regions are, whose they are."""
    if "get_noise_pred_and_target" not in (checkout / "train_network.py").read_text("utf-8"):
        pytest.skip("this version of sd-scripts has no method that gives a step's target")
    denoiser = load_denoiser(demo.MODEL)
    held = LayerSubspaces.load(make_layers(room))
    some = torch.randn(4, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    regions = fit_regions(denoiser, denoiser.family.network, held.bases, some)

    def options(limit: float | None = None, names: tuple[str, ...] = ()) -> dict:
        path = room / f"{limit} {' '.join(names)}.layers.safetensors"
        found = replace(regions, limit=regions.limit if limit is None else limit)
        replace(held, regions=found, provenance={"names": list(names)}).save(path)
        pairs = (f"project_layers={path}", f"project_concepts={room / 'empty.safetensors'}")
        return protect(*pairs, *("project_regions=true",) * (limit is not None))

    return options


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


@pytest.mark.usefixtures("asked")
def test_layers_of_sdxl_are_found_by_their_names_in_diffusers(train, room):
    from diffusers import UNet2DConditionModel

    script = "sdxl_train_network.py"
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[script] | {"block_out_channels": (32, 64, 128)})
    widths = {name: layer.weight.shape[1] for name, layer in silent_layers(unet).items()}
    bases = {name: torch.zeros(width, 0).double() for name, width in widths.items()}
    read = next(name for name in widths if name.endswith("attn1.to_q"))
    bases[read] = torch.eye(widths[read]).double()[:, :1]
    regions = ConceptRegions(
        bases={read: bases[read]}, centres={read: torch.zeros(1).double()}, units={read: 1.0},
        limit=EVERYWHERE, sigma=0.5,
    )  # fmt: skip
    LayerSubspaces(bases=bases, regions=regions).save(room / "sdxl.layers.safetensors")
    ConceptSubspace.empty(2048).save(room / "2048.safetensors")
    given = protect(
        f"project_layers={room / 'sdxl.layers.safetensors'}", "project_regions=true",
        f"project_concepts={room / '2048.safetensors'}",
    )  # fmt: skip
    path = train("sdxl spared", *given.pop("extra"), **given, script=script, max_train_steps=2)
    assert ups(path) == 0
    assert counts(path)["share_of_places"] == 1


def test_models_whose_step_is_another_are_refused(train, checkout, asked):
    if not (checkout / "flux_train_network.py").exists():
        pytest.skip("this version of sd-scripts does not train it")
    path = asked(NOWHERE)["extra"][1].removeprefix("project_layers=")
    given = flow("flux") | {"project_layers": path, "project_regions": True}
    said = train("flux spared", door="door", fails=True, **given)
    assert "project_regions is there for SD 1, SD 2 and SDXL" in said
    assert "steps:" not in said
