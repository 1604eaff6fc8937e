"""What concepts add is taken from what is taught: on a linear layer, where the truth is known.

The base predicts W x, images of the concept are drawn by W + C + R: C is what the adapter holds,
R is the rest, which the training is for.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.training.concept.adapter import ConceptAdapter, weight_samples
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.protection import Protection, ProtectionFailed
from unmemorize.shared.training.settings import (
    ProjectionSettings,
    ProtectionSettings,
    SubtractedConcept,
    SubtractionSettings,
)
from unmemorize.shared.training.subtracted import NothingSubtracted, SubtractedTraining

WIDTH = 5
NUMBERS = {
    "concept": 0.02, "others": -0.001, "threshold": 0.004, "recall": 1.0, "false_positives": 0.0,
}  # fmt: skip
NAMED, OTHER = Sample(file="a.png", caption="Zorp in rain"), Sample(file="b.png", caption="rain")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.Linear(WIDTH, WIDTH, dtype=torch.float64)})


@pytest.fixture
def concept(network, tmp_path):
    """Function that saves a concept of the network and returns its file."""

    def save(name="zorp", seed=1):
        pair = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
        pairs = {"attn": (pair[0], pair[1].T)}
        samples = weight_samples(network, {"attn": (network["attn"], 0)}, pairs)
        model = {"sha256": "0" * 64, "pipeline": "?", "network": "ModuleDict",
                 "parametrization": "epsilon"}  # fmt: skip
        made = {"from": "images"}
        account = {"model": model, "names": [name] * bool(name), "made": made, "numbers": NUMBERS}
        path = tmp_path / f"concept{seed}.safetensors"
        ConceptAdapter(pairs=pairs, samples=samples, account=account).save(path)
        return path

    return save


def training(*files, gain=1.0, captions=(), images=None, **chosen):
    concepts = tuple(SubtractedConcept(file=file, **chosen) for file in files)
    made = SubtractedTraining(SubtractionSettings(concepts=concepts, gain=gain))
    made.fit(captions, images)
    return made


def change_of(path):
    a, b = ConceptAdapter.load(path).pairs["attn"]
    return b @ a


def added(made, network, x, samples):
    """Return what is added to the predictions of a step, and to which rows."""
    shown = [set(rows) for rows in made.showing(samples)]
    rows = torch.tensor(sorted(set().union(*shown)))
    with torch.no_grad():
        change = made.added(
            rows, shown, network=network, predict=lambda rows: network["attn"](x[rows])
        )
    return rows, change


def test_what_is_taught_is_the_target_without_the_concept(network, concept):
    """By hand: y = (W + C + R) x, so y - C x = (W + R) x, to rounding; not with half of it."""
    path = concept()
    x, rest = torch.randn(4, WIDTH).double(), torch.randn(WIDTH, WIDTH).double()
    with torch.no_grad():
        target = network["attn"](x) + x @ (change_of(path) + rest).T
        expected = network["attn"](x) + x @ rest.T
    samples = [NAMED, OTHER, NAMED, NAMED]
    rows, change = added(training(path), network, x, samples)
    assert rows.tolist() == [0, 2, 3]
    torch.testing.assert_close(target[rows] - change, expected[rows], rtol=0, atol=1e-12)
    _, half = added(training(path, gain=0.5), network, x, samples)
    torch.testing.assert_close(half, change / 2)
    assert (target[rows] - half - expected[rows]).abs().max() > 0.1
    # A loss of the prediction so moved has the gradient of one against that target.
    prediction = torch.randn(4, WIDTH).double().requires_grad_()
    moved = (prediction[rows] + change - target[rows]).square().sum()
    meant = (prediction[rows] - expected[rows]).square().sum()
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, prediction)[0] for loss in (moved, meant))
    )


def test_several_concepts_each_from_its_own_samples(network, concept):
    first, second = concept(), concept("quix", seed=2)
    x = torch.randn(3, WIDTH).double()
    both = Sample(file="c.png", caption="a quix, a zorp")
    made = training(first, second)
    rows, change = added(made, network, x, [OTHER, NAMED, both])
    assert rows.tolist() == [1, 2]
    torch.testing.assert_close(change[0], change_of(first) @ x[1])
    torch.testing.assert_close(change[1], (change_of(first) + change_of(second)) @ x[2])
    counts = [(each["visits"], each["subtracted"], each["changed"]) for each in made.state_dict()]
    assert counts == [(3, 2, 2), (3, 1, 1)]


def test_samples_by_name_by_list_or_all(concept, tmp_path):
    path = concept()
    (tmp_path / "b.png").touch()
    files = [Sample(file=str(tmp_path / f"{name}.png")) for name in "ab"]
    listed = {"samples": "list.txt", "listed": frozenset([str(tmp_path / "b.png")])}
    assert training(path).showing([NAMED, OTHER]) == [[0]]
    assert training(path, samples="all").showing([NAMED, OTHER]) == [[0, 1]]
    assert training(path, **listed).showing(files) == [[1]]


def test_a_set_without_the_concept_is_refused_before_it_trains(concept):
    path, nameless = concept(), concept("", seed=2)
    with pytest.raises(NothingSubtracted, match="none of 1 captions names zorp"):
        training(path, captions=["rain"])
    with pytest.raises(NothingSubtracted, match="has no name"):
        training(nameless)
    listed = {"samples": "list.txt", "listed": frozenset(["/somewhere/b.png"])}
    with pytest.raises(NothingSubtracted, match="none of the training's 1 images"):
        training(path, images=["a.png"], **listed)
    training(path, captions=["rain", "zorp"])
    training(nameless, captions=["rain"], samples="all")


def test_a_training_that_subtracted_nothing_ends_in_error(network, concept, tmp_path):
    path = concept()
    settings = ProtectionSettings(
        subtraction=SubtractionSettings(concepts=(SubtractedConcept(file=path),))
    )
    protection = Protection(settings, output=tmp_path / "lora")
    protection.fit(lambda prompts: None, [])
    with pytest.raises(ProtectionFailed, match="was given no prediction"):
        protection.check_attached()
    assert not protection.metadata()
    made, x = protection.subtraction, torch.randn(2, WIDTH).double()
    assert made.showing([OTHER]) == [[]]
    protection.check_attached()
    with pytest.raises(ProtectionFailed, match="never subtracted: none of 1 samples is among"):
        protection.finish()
    frozen = lambda rows: x[rows]  # noqa: E731 (a network whose layers never run)
    made.showing([NAMED])
    made.added(torch.tensor([0]), [{0}], network=network, predict=frozen)
    with pytest.raises(ProtectionFailed, match="changed none of 1 predictions"):
        protection.finish()
    added(made, network, x, [NAMED, OTHER])
    protection.finish()
    assert protection.finished


def test_the_header_says_what_was_subtracted_and_a_resumed_training_counts_on(
    network, concept, tmp_path
):
    path = concept()
    settings = ProtectionSettings(
        subtraction=SubtractionSettings(concepts=(SubtractedConcept(file=path),), gain=1.3)
    )
    first, second = (Protection(settings, output=tmp_path / "lora") for _ in range(2))
    for each in (first, second):
        each.fit(lambda prompts: None, [])
    added(first.subtraction, network, torch.randn(2, WIDTH).double(), [NAMED, OTHER])
    told = json.loads(first.metadata()["unmemorize.subtraction"])
    assert told["gain"] == 1.3
    (one,) = told["concepts"]
    assert len(one.pop("sha256")) == 64
    assert one == {"file": path.name, "names": ["zorp"], "samples": "named", "visits": 2,
                   "subtracted": 1, "changed": 1}  # fmt: skip
    assert str(tmp_path) not in first.metadata()["unmemorize.subtraction"]
    assert first.scalars() == {"unmemorize/subtracted_share": 0.5}
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.metadata() == first.metadata()


def test_a_concept_of_another_model_and_regions_beside_it_are_refused(network, concept, tmp_path):
    path = concept()
    other = nn.ModuleDict({"attn": nn.Linear(WIDTH, WIDTH, dtype=torch.float64)})
    with pytest.raises(ModelError, match="another model"):
        added(training(path), other, torch.randn(1, WIDTH).double(), [NAMED])
    subtraction = SubtractionSettings(concepts=(SubtractedConcept(file=path),))
    regions = ProjectionSettings(layers=path, regions=True)
    with pytest.raises(ValueError, match="leave one out"):
        ProtectionSettings(projection=regions, subtraction=subtraction)
    ProtectionSettings(projection=replace(regions, regions=False), subtraction=subtraction)
