"""Which targets of a training are replaced, where, and what is counted: on a network of one layer.

The layer reads the latents of a place; the concept is what fills its first channel.
"""

import json
import math

import pytest
import torch
from torch import nn
from unmemorize.shared.training.base_targets import BaseTargets, NoTargetSeen
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.layers.regions import ConceptRegions

CHANNELS, SIDE = 3, 6
NAMED = Sample(file="0.png", caption="a house, Zorp!")
OTHER = Sample(file="1.png", caption="a house")


@pytest.fixture
def network():
    return nn.ModuleDict({"read": nn.Linear(CHANNELS, 1)})


@pytest.fixture
def regions():
    basis = torch.eye(CHANNELS, dtype=torch.float64)[:, :1]
    return ConceptRegions(
        bases={"read": basis}, centres={"read": torch.tensor([0.5]).double()},
        units={"read": 4.0}, limit=math.log(1 + 1.0), sigma=0.1,
    )  # fmt: skip


def step(base_targets, network, latents, samples, dtype=torch.float32):
    """Return a target, 0 as taught and 1 without the LoRA, and the rows that were predicted."""
    predicted = []

    def base(places):
        predicted.extend(places.tolist())
        return torch.ones_like(latents[places])

    target = torch.zeros_like(latents, dtype=dtype)
    rows = base_targets.naming(samples)
    return base_targets.target(
        target, latents, rows, base=base, network=network,
        look=lambda some: network["read"](some.flatten(2).transpose(1, 2)),
    ), predicted  # fmt: skip


def test_a_place_and_its_neighbours_are_replaced_in_samples_that_name_the_concept(network, regions):
    latents = torch.full((3, CHANNELS, SIDE, SIDE), 0.5)
    latents[:, 1] = 9.0  # of no concern: outside the basis
    latents[1:, 0, 2, 3] = 2.6  # 2.1 from the centre, more than the root of a unit: it shows
    latents[1:, 0, 0, 0] = 2.4  # 1.9, which does not
    latents[1:, 0, 5, 5] = -1.6
    base_targets = BaseTargets(regions, ["zorp"])
    target, predicted = step(base_targets, network, latents, [NAMED, OTHER, NAMED])
    assert predicted == [0, 2]
    assert not target[:2].any()
    expected = torch.zeros(SIDE, SIDE)
    expected[1:4, 2:5] = 1.0
    expected[4:, 4:] = 1.0
    assert torch.equal(target[2], expected.expand(CHANNELS, SIDE, SIDE))
    counts = base_targets.account()
    assert counts.pop("share_of_places") == pytest.approx(13 / 36)
    assert counts == {"samples": 3, "named": 2, "with_regions": 1}
    half, _ = step(base_targets, network, latents, [NAMED, OTHER, NAMED], torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, target.half())


def test_without_a_region_nothing_is_predicted_and_the_target_is_the_very_same(network, regions):
    base_targets = BaseTargets(regions, ["zorp"])
    latents = torch.full((1, CHANNELS, SIDE, SIDE), 0.5)
    target, predicted = step(base_targets, network, latents, [NAMED])
    assert not predicted
    assert not target.any()
    assert base_targets.account()["share_of_places"] is None


def test_every_sample_is_looked_at_where_the_concept_has_no_name(regions):
    assert BaseTargets(regions, []).naming([NAMED, OTHER]) == [0, 1]
    assert BaseTargets(regions, ["zorp"]).naming([NAMED, OTHER]) == [0]
    assert BaseTargets(regions, ["quix"]).naming([NAMED, OTHER]) == []


def test_a_resumed_training_goes_on_counting(network, regions):
    first, second = BaseTargets(regions, ["zorp"]), BaseTargets(regions, ["zorp"])
    latents = torch.full((1, CHANNELS, SIDE, SIDE), 9.0)
    step(first, network, latents, [NAMED])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.account() == first.account()
    for base_targets in (first, second):
        step(base_targets, network, latents, [NAMED])
    assert second.account() == first.account()
    assert first.account()["with_regions"] == 2


def test_a_training_that_showed_no_target_fails_and_one_that_named_nothing_is_warned(
    regions, caplog
):
    base_targets = BaseTargets(regions, ["zorp"])
    with pytest.raises(NoTargetSeen, match="No training step"):
        base_targets.finish()
    assert base_targets.naming([OTHER]) == []
    base_targets.finish()
    assert "No caption named zorp" in caplog.text


def test_regions_of_no_layer_or_of_different_layers_are_refused(regions):
    for changed in ({"units": {}}, {"units": {"read": 1.0, "more": 1.0}}):
        given = {"bases": regions.bases, "centres": regions.centres, "units": regions.units}
        with pytest.raises(ValueError, match="the same layers"):
            ConceptRegions(**(given | changed), limit=1.0, sigma=0.1)


def test_latents_whose_places_no_layer_sees_are_refused(network, regions):
    latents = torch.zeros(1, CHANNELS, SIDE, SIDE)
    with pytest.raises(ValueError, match="measured with another model"):
        regions.shown(network, lambda some: network["read"](some[:, :, 0].mT), latents)
