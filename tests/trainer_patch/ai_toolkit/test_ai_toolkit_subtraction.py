"""Concept subtraction at ai-toolkit's hooks, on a small trainer that has them."""

import json
from types import SimpleNamespace

import little_ai_toolkit
import pytest
import torch
from little_ai_toolkit import CHANNELS, PLACES_LAYER, UP, LittleTrainer
from safetensors import safe_open
from safetensors.torch import load_file
from unmemorize.shared.training.concept.adapter import ConceptAdapter
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.trainer_patch.ai_toolkit.process import ProtectedProcess


class Trainer(ProtectedProcess, LittleTrainer):
    """As `get_process` makes it."""


@pytest.fixture(autouse=True)
def toolkit(monkeypatch):
    """The one function of ai-toolkit that is called by name."""
    little_ai_toolkit.install(monkeypatch)


@pytest.fixture
def made(tmp_path):
    """Function that makes a trainer with options."""
    numbers = {"concept": 1, "others": 0, "threshold": 0.5, "recall": 1, "false_positives": 0}
    model = {"sha256": "", "pipeline": "", "network": "", "parametrization": ""}
    account = {"names": ["sushi"], "model": model, "numbers": numbers, "made": {"from": "images"}}
    path = tmp_path / "concept.safetensors"
    pairs = {PLACES_LAYER: (torch.ones(1, CHANNELS), torch.ones(CHANNELS, 1))}
    ConceptAdapter(pairs=pairs, samples={}, account=account).save(path)

    def make(name, kind=Trainer, asked=None, **config):
        section = {"subtract_concepts": str(path)} | (asked or {})
        config |= {"training_folder": str(tmp_path), "unmemorize": section}
        return kind(0, SimpleNamespace(name=name), config)

    return make


def up(path):
    return load_file(path)[UP]


def test_what_is_learnt_from_moves_by_what_the_concept_adds(made):
    """By hand: with factors of ones, the sum of the channels is added to each of them."""
    seen = []

    class Looking(LittleTrainer):
        def predict_noise(
            self, noisy_latents, timesteps, conditional_embeds, batch, is_primary_pred=False
        ):
            prediction = super().predict_noise(noisy_latents, timesteps, conditional_embeds, batch)
            if torch.is_grad_enabled():
                seen.append((noisy_latents, prediction.detach()))
            return prediction

        def calculate_loss(self, noise_pred, noise, batch, prior_pred):
            seen[-1] += noise_pred.detach(), batch
            return super().calculate_loss(noise_pred, noise, batch, prior_pred)

    class Protected(ProtectedProcess, Looking):
        pass

    path = made("lora", Protected, {"mem_filter": "inf"}, steps=6).run()
    found = 0
    for noisy, prediction, moved, batch in seen:
        for row, item in enumerate(batch.file_items):
            named = "sushi" in item.raw_caption
            found += named
            added = noisy[row].sum(0).expand_as(noisy[row]) * named
            torch.testing.assert_close(moved[row] - prediction[row], added, atol=1e-5, rtol=1e-5)
    with safe_open(path, "pt") as file:
        (told,) = json.loads(file.metadata()["unmemorize.subtraction"])["concepts"]
    assert (told["visits"], told["subtracted"], told["changed"]) == (12, found, 3)


def test_it_leaves_no_trace(made):
    plain = up(made("plain", asked={"subtract_gain": "1e-30"}).run())
    assert torch.equal(plain, up(made("filter", asked={
        "subtract_concepts": None, "mem_filter": "inf"}).run()))  # fmt: skip
    assert not torch.equal(plain, up(made("subtracted").run()))


def test_a_prior_is_taught_as_it_is(made):
    """Then all of a batch is taught what the model predicts without the LoRA."""
    pairs = []

    class Looking(LittleTrainer):
        def calculate_loss(self, noise_pred, noise, batch, prior_pred):
            if prior_pred is not None:
                pairs.append((noise_pred - prior_pred).detach())
            return super().calculate_loss(noise_pred, noise, batch, prior_pred)

    class Protected(ProtectedProcess, Looking):
        pass

    prior = torch.ones(2, CHANNELS, 2, 2)  # from the second batch on
    for gain in ("1e-30", "3"):
        # The first batch names the concept too: its step is not the same.
        made(gain, Protected, {"subtract_gain": gain}, prior_pred=prior, steps=3).run()
    assert len(pairs) == 4
    moved = pairs[3] - pairs[1]  # of the last batch, which names the concept
    assert moved.abs().max() < 0.2  # three times what is added would be several units


def test_what_the_loss_must_be_against_is_told(made):
    class Other(LittleTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.train_config.loss_type = "wavelet"

    class Protected(ProtectedProcess, Other):
        pass

    with pytest.raises(UnsupportedTraining, match="loss_type: wavelet"):
        made("refused", Protected)
