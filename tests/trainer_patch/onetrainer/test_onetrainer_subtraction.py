"""Concept subtraction in a step of OneTrainer, on the small trainer of the regions' tests.

tests/trainer_patch/onetrainer trains for real.
"""

from types import SimpleNamespace

import pytest
import torch
from test_onetrainer_regions import CHANNELS, LAYER, Flow, Samples, Setup, Text, batch_of, plain
from unmemorize.shared.training.concept.adapter import ConceptAdapter
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import (
    ProtectionSettings,
    SubtractedConcept,
    SubtractionSettings,
)
from unmemorize.trainer_patch.onetrainer.adapter import StepAdapter


@pytest.fixture
def step(tmp_path):
    """Function that returns what a step's prediction gives, and the account of the concept."""
    numbers = {"concept": 1, "others": 0, "threshold": 0.5, "recall": 1, "false_positives": 0}
    model = {"sha256": "", "pipeline": "", "network": "", "parametrization": ""}
    account = {"names": ["zorp"], "model": model, "numbers": numbers, "made": {"from": "images"}}
    path = tmp_path / "concept.safetensors"
    pairs = {LAYER: (torch.ones(1, CHANNELS), torch.ones(CHANNELS, 1))}
    ConceptAdapter(pairs=pairs, samples={}, account=account).save(path)
    subtraction = SubtractionSettings(concepts=(SubtractedConcept(file=path),))

    def made(setup, batch, named=2):
        protection = Protection(ProtectionSettings(subtraction=subtraction), output=tmp_path)
        protection.fit(lambda prompts: None, [])
        kind = SimpleNamespace(
            is_stable_diffusion=lambda: not setup.flows, is_stable_diffusion_xl=lambda: False
        )
        model = SimpleNamespace(**{"transformer" if setup.flows else "unet": setup.unet})
        trainer = SimpleNamespace(
            train_device=torch.device("cpu"), model_setup=setup, model=model,
            config=SimpleNamespace(model_type=kind),
        )  # fmt: skip
        adapter = StepAdapter(trainer, protection, Samples(named), Text(trainer))
        torch.manual_seed(3)
        output = adapter.protected(setup.predict)(model, batch, None, 8)
        return output, protection.subtraction.account()["concepts"][0]

    return made


@pytest.mark.parametrize("kind", [Setup, Flow])
def test_predictions_move_by_what_the_concept_adds_to_the_base_model(step, kind):
    """The layer's weight with the adapter's change in it must give the same, without the LoRA."""
    setup, batch = kind(), batch_of()
    output, told = step(setup, batch)
    after = torch.rand(3)
    expected = plain(kind(), batch)
    assert torch.equal(after, torch.rand(3))  # the random state is the plain step's
    assert torch.equal(output["target"], expected["target"])
    assert torch.equal(output["predicted"][2:], expected["predicted"][2:])
    setup.hooked = False
    base = plain(setup, batch)["predicted"]
    with torch.no_grad():
        setup.unet.get_submodule(LAYER).weight += 1.0
    added = plain(setup, batch)["predicted"] - base
    moved = output["predicted"] - expected["predicted"]
    torch.testing.assert_close(moved[:2], added[:2], rtol=1e-4, atol=1e-5)
    assert added[:2].abs().max() > 0.5
    assert (told["visits"], told["subtracted"], told["changed"]) == (4, 2, 2)


def test_a_batch_without_the_concept_and_prior_predictions_are_left_alone(step):
    setup, batch = Setup(), batch_of()
    output, told = step(setup, batch, named=0)
    assert torch.equal(output["predicted"], plain(Setup(), batch)["predicted"])
    assert len(setup.unet.calls) == 1
    assert told["subtracted"] == 0
    output, told = step(Setup(), batch_of(prior=1))
    expected = plain(Setup(), batch_of(prior=1))
    assert torch.equal(output["predicted"][[0, 2, 3]], expected["predicted"][[0, 2, 3]])
    assert (told["visits"], told["subtracted"]) == (3, 1)
