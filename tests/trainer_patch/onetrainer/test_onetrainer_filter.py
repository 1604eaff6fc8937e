"""The memorization filter in a step of OneTrainer, on a small trainer in its order.

tests/trainer_patch/onetrainer trains for real.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.filter.sample_log import read_records
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import FilterSettings, ProtectionSettings
from unmemorize.trainer_patch.onetrainer.adapter import StepAdapter
from unmemorize.trainer_patch.onetrainer.data import BatchSamples, TextSide


class Setup:
    """A trainer's step in OneTrainer's order: noise and timesteps come from the step's number."""

    def __init__(self, velocity: bool = False):
        torch.manual_seed(0)
        self.network = torch.nn.Linear(6, 2)
        self.kind = "v_prediction" if velocity else "epsilon"
        self.runs = 0

    def _get_timestep_discrete(self, generator, rows):
        return torch.randint(0, 1000, (rows,), generator=generator)

    def predict(self, model, batch, config, train_progress, *, deterministic=False):
        generator = torch.Generator().manual_seed(train_progress)
        timesteps = self._get_timestep_discrete(generator, len(batch["tokens"]))
        noise = torch.randn(len(timesteps), 2, generator=generator)
        self.runs += 1
        inputs = torch.cat([batch["latent_image"] + noise, batch["tokens"]], dim=1)
        predicted = self.network(torch.nn.functional.dropout(inputs, 0.5))
        return {"predicted": predicted, "target": noise, "timestep": timesteps,
                "prediction_type": self.kind}  # fmt: skip

    def loss(self, output, batch):
        losses = (output["predicted"] - output["target"]).square().mean(1)
        return (losses * batch["loss_weight"]).mean()


class Text(TextSide):
    """A text side whose empty prompt is zeros."""

    def encode(self, prompts):
        return {"tokens": torch.zeros(len(prompts), 4)}


class Samples(BatchSamples):
    """A data set without files."""

    def __init__(self):
        self._samples = {}


def batch_of(rows: int = 4, prior: int = 0) -> dict:
    generator = torch.Generator().manual_seed(5)
    return {
        "tokens": torch.randn(rows, 4, generator=generator),
        "latent_image": torch.randn(rows, 2, generator=generator),
        "loss_weight": torch.full((rows,), 0.5),
        "image_path": [f"{row}.png" for row in range(rows)],
        "concept_type": ["PRIOR_PREDICTION"] * prior + ["STANDARD"] * (rows - prior),
    }


def protect(trainer, protection: Protection, setup: Setup):
    """Return the trainer's `predict` as it is while its training is protected."""
    adapter = StepAdapter(trainer, protection, Samples(), Text(trainer))
    return adapter.protected(setup.predict)


def step(tmp_path, setup: Setup, batch: dict, **asked):
    """Return the gradient of one filtered step, and its protection."""
    protection = Protection(
        ProtectionSettings(filter=FilterSettings(**asked)), output=tmp_path / "lora.safetensors"
    )
    abar = torch.linspace(0.99, 0.01, 1000)
    trainer = SimpleNamespace(
        train_device=torch.device("cpu"), model_setup=setup,
        model=SimpleNamespace(noise_scheduler=SimpleNamespace(alphas_cumprod=abar)),
    )  # fmt: skip
    predict = protect(trainer, protection, setup)
    torch.manual_seed(3)
    output = predict(None, batch, None, 8)
    setup.loss(output, batch).backward()
    return setup.network.weight.grad, protection


def plain_step(batch: dict) -> torch.Tensor:
    setup = Setup()
    torch.manual_seed(3)
    setup.loss(setup.predict(None, batch, None, 8), batch).backward()
    return setup.network.weight.grad


def test_an_infinite_threshold_changes_no_bit_of_a_step(tmp_path):
    setup = Setup()
    gradient, protection = step(tmp_path, setup, batch_of(), limit=math.inf)
    assert torch.equal(gradient, plain_step(batch_of()))
    assert protection.filter.seen == 4
    assert setup.runs == 2


def test_samples_that_are_left_out_give_no_gradient(tmp_path):
    """Against the mean of the kept samples' gradients, each computed alone."""
    _, recorded = step(tmp_path, Setup(), batch_of(), limit=math.inf)
    recorded.flush()
    scores = scores_of(recorded, tmp_path)
    limit = sorted(scores)[2]
    gradient, protection = step(tmp_path, Setup(), batch_of(), limit=limit)
    assert protection.filter.flagged == 2
    kept = [row for row in range(4) if scores[row] < limit]
    expected = torch.zeros_like(gradient)
    for row in kept:
        alone = batch_of()
        alone["loss_weight"] = torch.zeros(4)
        alone["loss_weight"][row] = 0.5 * 4 / len(kept)
        expected += plain_step(alone)
    torch.testing.assert_close(gradient, expected)
    assert not torch.equal(gradient, plain_step(batch_of()))


def scores_of(protection: Protection, folder) -> list[float]:
    return [record.score for record in read_records([folder / "lora.memorized.jsonl"])]


def test_the_score_is_the_distance_to_the_prediction_without_text(tmp_path):
    batch, setup = batch_of(), Setup(velocity=True)
    _, protection = step(tmp_path, setup, batch, limit=math.inf)
    protection.flush()
    outputs, again = [], Setup(velocity=True)
    for tokens in (batch["tokens"], torch.zeros(4, 4)):
        torch.manual_seed(3)  # the same dropout
        outputs.append(again.predict(None, batch | {"tokens": tokens}, None, 8))
    difference = outputs[0]["predicted"] - outputs[1]["predicted"]
    signal = torch.linspace(0.99, 0.01, 1000).sqrt()[outputs[0]["timestep"]]
    expected = signal.double() * difference.double().square().mean(1).sqrt()
    measured = torch.tensor(scores_of(protection, tmp_path), dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=0)


def test_prior_prediction_and_validation_are_left_alone(tmp_path):
    batch = batch_of(prior=1)
    _, protection = step(tmp_path, Setup(), batch, limit=0.0)
    assert protection.filter.seen == 3
    assert batch["loss_weight"].tolist() == [0.5, 0.0, 0.0, 0.0]
    setup = Setup()
    with torch.no_grad():
        trainer = SimpleNamespace(model_setup=setup, train_device=torch.device("cpu"))
        predict = protect(trainer, protection, setup)
        predict(None, batch, None, 8, deterministic=True)
    assert setup.runs == 1


def test_a_prediction_that_cannot_be_repeated_is_refused(tmp_path):
    class Unseeded(Setup):
        def _get_timestep_discrete(self, generator, rows):
            self.drawn = getattr(self, "drawn", 0) + 1
            return torch.full((rows,), self.drawn)

    class Otherwise(Setup):
        def predict(self, *args, **kwargs):
            return {"predicted": self.network.weight, "timestep": torch.zeros(4)}

    for setup, message in ((Unseeded(), "drew other timesteps"), (Otherwise(), "draws no")):
        with pytest.raises(HookMissing, match=message):
            step(tmp_path, setup, batch_of(), limit=math.inf)
