"""Regions of the concept with SD3 and Flux, whose trainers in sd-scripts make their own steps."""

import json
import math

import pytest
import torch
from kohya_lora import flow, header, same_tensors
from safetensors.torch import load_file
from unmemorize.shared.models.lora.layer_names import cores
from unmemorize.shared.training.layers.regions import ConceptRegions, still_noise
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

pytestmark = pytest.mark.slow

READERS = {"flux": ("x_embedder", 64), "sd3": ("proj_out", 128)}
"""A layer without a LoRA that sees places, and its width; Flux' reads the noisy patches."""
SILENT = ("attn_to_q", "attn_to_out_0", "ff_net_0_proj", "ff_net_2")
"""Layers of a block that see places, too; nothing of what they read is the concept's."""
EVERYWHERE, NOWHERE = -0.5, 1e99
"""Energies, which are never negative."""
SIDE = 4
"""Patches in a row of a picture."""


@pytest.fixture(scope="module", params=READERS)
def kind(request, checkout):
    if not (checkout / f"{request.param}_train_network.py").exists():
        pytest.skip("this version of sd-scripts does not train it")
    return request.param


@pytest.fixture(scope="module")
def plain(train, kind):
    return train(f"{kind} unspared", **flow(kind))


@pytest.fixture(scope="module")
def spare(train, room, plain, kind):
    """Function that trains with regions above some energy; nothing is kept out of the LoRA.

    All layers go by their names in diffusers.
    """
    reader, width = READERS[kind]
    bases = {reader: torch.eye(width).double()}
    for key, down in load_file(plain).items():
        if key.endswith(end := ".lora_down.weight"):
            bases[cores(key.removesuffix(end))[0]] = torch.zeros(down.shape[1], 0).double()
    heard = {reader, *(f"transformer_blocks_0_{layer}" for layer in SILENT)}

    def run(name: str, energy: float):
        regions = ConceptRegions(
            bases={layer: bases[layer] for layer in heard},
            centres={layer: torch.zeros(bases[layer].shape[1]).double() for layer in heard},
            units=dict.fromkeys(heard, 1.0), limit=math.log1p(energy) / len(heard), sigma=1.0,
        )  # fmt: skip
        path = room / f"{kind} {name}.layers.safetensors"
        LayerSubspaces(bases=bases, regions=regions).save(path)
        given = flow(kind) | {"project_layers": str(path), "project_regions": True}
        return train(f"{kind} {name}", door="door", **given)

    return run


def ups(path) -> float:
    return max(float(v.abs().max()) for k, v in load_file(path).items() if "lora_up" in k)


def counts(path) -> dict:
    return json.loads(header(path)["unmemorize.projection"])["regions"]


def test_nothing_is_learnt_where_everything_is_the_concept(spare, plain):
    path = spare("everywhere", EVERYWHERE)
    assert ups(path) == 0
    assert ups(plain) > 1e-4
    assert counts(path) == {
        "samples": 8, "named": 8, "with_regions": 8, "share_of_places": 1,
    }  # fmt: skip


def test_no_bit_changes_where_nothing_shows_the_concept(spare, plain):
    path = spare("nowhere", NOWHERE)
    assert same_tensors(path, plain)
    assert counts(path)["with_regions"] == 0


@pytest.mark.parametrize("kind", ["flux"], indirect=True, scope="module")
def test_places_are_found_in_the_noise_that_is_the_same_in_every_step(spare, plain):
    """At the highest level there is nothing but that noise, so the places are known beforehand."""
    noise = still_noise(torch.zeros(1, 16, 2 * SIDE, 2 * SIDE))[0]
    patches = noise.view(16, SIDE, 2, SIDE, 2).square().sum((0, 2, 4))
    second, first = patches.flatten().sort().values[-2:].tolist()
    shown = (patches == first).nonzero()[0].tolist()
    near = sum(abs(row - shown[0]) < 2 and abs(column - shown[1]) < 2
               for row in range(SIDE) for column in range(SIDE))  # fmt: skip
    path = spare("somewhere", (first + second) / 2)
    assert counts(path) == {
        "samples": 8, "named": 8, "with_regions": 8, "share_of_places": near / SIDE**2,
    }  # fmt: skip
    assert 0 < ups(path)
    assert not same_tensors(path, plain)
