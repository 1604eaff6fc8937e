"""Which samples of a training are spared, where, and what is told of it: on a network of one layer.

The layer reads the latents of a place; the concept is what fills its first channel.
"""

import json
import math

import pytest
import torch
from torch import nn
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.spared import NothingSpared, SparedTraining

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


def ask(spared, network, latents, samples):
    """Return a step's target, which is 0 as taught and 1 without the LoRA, and the rows asked."""
    asked = []

    def base(places):
        asked.extend(places.tolist())
        return torch.ones_like(latents[places])

    target = torch.zeros_like(latents)
    rows = spared.naming(samples)
    return spared.target(
        target, latents, rows, base=base, network=network,
        look=lambda some: network["read"](some.flatten(2).transpose(1, 2)),
    ), asked  # fmt: skip


def test_a_place_and_its_neighbours_are_spared_in_samples_that_name_the_concept(network, regions):
    latents = torch.full((3, CHANNELS, SIDE, SIDE), 0.5)
    latents[:, 1] = 9.0  # of no concern: outside the basis
    latents[1:, 0, 2, 3] = 2.6  # 2.1 from the centre, more than the root of a unit: it shows
    latents[1:, 0, 0, 0] = 2.4  # 1.9, which does not
    latents[1:, 0, 5, 5] = -1.6
    spared = SparedTraining(regions, ["zorp"])
    target, asked = ask(spared, network, latents, [NAMED, OTHER, NAMED])
    assert asked == [0, 2]
    assert not target[:2].any()
    expected = torch.zeros(SIDE, SIDE)
    expected[1:4, 2:5] = 1.0
    expected[4:, 4:] = 1.0
    assert torch.equal(target[2], expected.expand(CHANNELS, SIDE, SIDE))
    told = spared.account()
    assert told.pop("share_of_places") == pytest.approx(13 / 36)
    assert told == {"samples": 3, "named": 2, "with_regions": 1}


def test_without_a_region_nothing_is_predicted_and_the_target_is_the_very_same(network, regions):
    spared = SparedTraining(regions, ["zorp"])
    latents = torch.full((1, CHANNELS, SIDE, SIDE), 0.5)
    target, asked = ask(spared, network, latents, [NAMED])
    assert not asked
    assert not target.any()
    assert spared.account()["share_of_places"] is None


def test_every_sample_is_looked_at_where_the_concept_has_no_name(regions):
    assert SparedTraining(regions, []).naming([NAMED, OTHER]) == [0, 1]
    assert SparedTraining(regions, ["zorp"]).naming([NAMED, OTHER]) == [0]
    assert SparedTraining(regions, ["quix"]).naming([NAMED, OTHER]) == []


def test_a_resumed_training_goes_on_counting(network, regions):
    first, second = SparedTraining(regions, ["zorp"]), SparedTraining(regions, ["zorp"])
    latents = torch.full((1, CHANNELS, SIDE, SIDE), 9.0)
    ask(first, network, latents, [NAMED])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.account() == first.account()
    for spared in (first, second):
        ask(spared, network, latents, [NAMED])
    assert second.account() == first.account()
    assert first.account()["with_regions"] == 2


def test_a_training_that_never_asked_fails_and_one_that_named_nothing_is_warned(regions, caplog):
    spared = SparedTraining(regions, ["zorp"])
    with pytest.raises(NothingSpared, match="No step's target"):
        spared.finish()
    assert spared.naming([OTHER]) == []
    spared.finish()
    assert "No caption named zorp" in caplog.text


def test_regions_of_no_layer_or_of_different_layers_are_refused(regions):
    for changed in ({"units": {}}, {"units": {"read": 1.0, "more": 1.0}}):
        given = {"bases": regions.bases, "centres": regions.centres, "units": regions.units}
        with pytest.raises(ValueError, match="of the same layers"):
            ConceptRegions(**(given | changed), limit=1.0, sigma=0.1)


def test_latents_whose_places_no_layer_sees_are_refused(network, regions):
    latents = torch.zeros(1, CHANNELS, SIDE, SIDE)
    with pytest.raises(ValueError, match="measured with another model"):
        regions.shown(network, lambda some: network["read"](some[:, :, 0].mT), latents)
