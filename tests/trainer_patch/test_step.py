"""The choreography of a step, on a trainer that brings what `TrainerAdapter` names and no more."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.concept.adapter import ConceptAdapter, weight_samples
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.filter.watch import VISITS
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import (
    FilterSettings,
    ProjectionSettings,
    ProtectionSettings,
    SubtractedConcept,
    SubtractionSettings,
)
from unmemorize.trainer_patch.step import Call, Step, TrainerAdapter, repeated

ROWS, CHANNELS, SIDE = 3, 4, 2
CAPTIONS = ("zorp", "a house", "zorp in a house")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, latents):
        return self.read(latents.flatten(2).mT).mT.unflatten(2, (SIDE, SIDE))


class Trainer:
    """Its prediction depends on text, LoRA and dropout."""

    device = torch.device("cpu")

    def __init__(self, repeats_rows=True):
        torch.manual_seed(0)
        self.repeats_rows, self.net, self.lora, self.passes = repeats_rows, Network(), 1.0, []
        self.dropout = 0.5

    def predict(self, latents, text):
        self.passes.append((len(latents), torch.is_grad_enabled()))
        drawn = nn.functional.dropout(latents, self.dropout)
        return self.net(drawn) + text[:, None, None, None] + self.lora * drawn

    def without_text(self, call, rows):
        some = call if rows is None else call.only(rows, ROWS)
        return some.again(text=repeated(torch.zeros(1), some.given["text"]))

    def with_text(self, call, rows):
        return (call if rows is None else call.only(rows, ROWS)).again()

    def network(self, call):
        return self.net

    @contextmanager
    def without_lora(self):
        self.lora = 0.0
        yield
        self.lora = 1.0

    def base(self, call, rows):
        assert not self.lora
        return call.again()[rows]

    def look(self, call, rows, latents):
        assert not self.lora
        torch.rand(7)  # what it draws must not be missed by `base`
        self.net(latents)


def call_of(trainer, latents, rows=range(ROWS)):
    return Call(
        run=trainer.predict,
        given={"latents": latents, "text": torch.arange(3.0) + 1},
        samples={row: Sample(file=f"{row}.png", caption=CAPTIONS[row]) for row in rows},
        timesteps=torch.tensor([100, 500, 900]),
    )


def begin(tmp_path, trainer, rows=range(ROWS), **asked):
    """Return the first step of a training, and its protection."""
    filtered = FilterSettings(**asked) if asked else None
    basis = torch.linalg.qr(torch.eye(CHANNELS).double()[:, :2]).Q
    regions = ConceptRegions(bases={"read": basis}, centres={"read": torch.zeros(2).double()},
                             units={"read": 1.0}, limit=-1.0, sigma=0.5)  # fmt: skip
    path = tmp_path / "layers.safetensors"
    held = LayerSubspaces(bases={"read": basis}, regions=regions, provenance={"names": ["zorp"]})
    held.save(path)
    projected = ProjectionSettings(layers=path, regions=True)
    settings = ProtectionSettings(filter=filtered, projection=projected)
    protection = Protection(settings, output=tmp_path / "lora")
    protection.fit(lambda prompts: None, [])
    call = call_of(trainer, torch.randn(ROWS, CHANNELS, SIDE, SIDE), rows)
    torch.manual_seed(3)
    return Step(protection, trainer, call), protection


def test_the_adapter_is_all_that_is_needed():
    assert isinstance(Trainer(), TrainerAdapter)
    assert not isinstance(nn.Linear(1, 1), TrainerAdapter)


@pytest.mark.parametrize("repeats_rows", [True, False])
def test_passes_start_from_the_steps_random_state_and_leave_no_trace(tmp_path, repeats_rows):
    trainer = Trainer(repeats_rows)
    step, protection = begin(tmp_path, trainer, limit=0.0)
    step.measure()
    prediction = step.call.again()
    weights = step.weights(prediction)
    step.target(torch.zeros_like(prediction), step.call.given["latents"])
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(prediction, step.call.again())
    assert torch.equal(after, torch.rand(3))
    assert weights.tolist() == [0.0] * ROWS
    # The same dropout in both: the difference is the text alone, which is known.
    assert protection.filter.latest == pytest.approx(2.0, rel=1e-5)
    assert trainer.passes[:3] == [(3, False), (3, True), (3, False)]


@pytest.mark.parametrize(("repeats_rows", "dropout", "rows"), [(1, 0, 1), (0, 0, 3), (1, 0.5, 3)])
def test_single_rows_are_repeated_only_where_they_can_be(tmp_path, repeats_rows, dropout, rows):
    trainer = Trainer(bool(repeats_rows))
    trainer.dropout = dropout
    first, protection = begin(tmp_path, trainer, limit=99.0, recall=9)
    first.measure()
    first.weights(first.call.again())
    new = {**first.call.samples, 1: Sample(file="new.png", caption="another")}
    second = Step(protection, trainer, replace(first.call, samples=new))
    trainer.passes.clear()
    second.measure()
    assert trainer.passes == [(rows, False)]
    second.weights(second.call.again())
    assert protection.filter.measured == 3 + rows


class Louder(Trainer):
    """Its LoRA doubles what the text adds."""

    def predict(self, latents, text):
        return super().predict(latents, (1 + self.lora) * text)


@pytest.mark.parametrize("repeats_rows", [True, False])
def test_controls_are_measured_without_the_lora_and_leave_no_trace(tmp_path, repeats_rows):
    trainer = Louder(repeats_rows)
    step, protection = begin(tmp_path, trainer, rows=[2, 1], warn=True)
    learnt = {}

    def learn_base(samples, timesteps, scores):
        visits = zip(timesteps.tolist(), scores.tolist(), strict=True)
        learnt.update(zip((sample.file for sample in samples), visits, strict=True))

    protection.filter.watch.learn_base = learn_base
    step.measure()
    step.weights(step.call.again())
    # The text alone, and not twice that: row 1 adds 2 and row 2 adds 3.
    assert learnt == {"1.png": (500, pytest.approx(2.0)), "2.png": (900, pytest.approx(3.0))}
    assert protection.filter.latest == pytest.approx(5.0)
    assert trainer.lora == 1.0
    after = torch.rand(3)
    torch.manual_seed(3)
    step.call.again()
    assert torch.equal(after, torch.rand(3))


def test_controls_are_measured_on_the_first_visits_alone(tmp_path):
    trainer = Trainer()
    step, protection = begin(tmp_path, trainer, warn=True)
    for _ in range(VISITS):
        step.measure()
        step.weights(step.call.again())
    trainer.passes.clear()
    step.measure()
    assert trainer.passes == [(ROWS, False)]
    assert not protection.controls_due(list(step.call.samples.values())).any()


def test_rows_without_a_sample_are_left_alone(tmp_path):
    step, protection = begin(tmp_path, Trainer(), rows=[2, 1], limit=2.5)
    step.measure()
    prediction = step.call.again()
    assert step.weights(prediction).tolist() == pytest.approx([1.0, 2.0, 0.0])
    assert protection.filter.seen == 2
    target = step.target(torch.zeros_like(prediction), step.call.given["latents"])
    assert not target[:2].any()
    assert protection.base_targets.account()["named"] == 1


def test_velocities_are_scaled_to_noise(tmp_path):
    step, protection = begin(tmp_path, Trainer(), limit=9.0)
    step.measure()
    signal = torch.zeros(1000)
    signal[step.call.timesteps] = torch.tensor([0.5, 0.5, 1.0])
    step.weights(step.call.again(), signal)
    assert protection.filter.latest == pytest.approx((0.5 + 1.0 + 3.0) / 3, rel=1e-5)


def test_targets_of_named_samples_are_predicted_without_the_lora(tmp_path):
    trainer = Trainer()
    step, _ = begin(tmp_path, trainer)
    prediction = step.call.again()
    target = step.target(torch.full_like(prediction, 9.0), step.call.given["latents"])
    torch.manual_seed(3)
    with trainer.without_lora():
        base = step.call.again()
    assert torch.equal(target[[0, 2]], base[[0, 2]])
    assert (target[1] == 9).all()
    assert not target.requires_grad


def begin_subtraction(tmp_path, trainer):
    """Return the first step of a training without a concept, and what the concept adds: C x."""
    pairs = {"read": (torch.randn(2, CHANNELS), torch.randn(CHANNELS, 2))}
    samples = weight_samples(trainer.net, {"read": (trainer.net.read, 0)}, pairs)
    numbers = {"concept": 1, "others": 0, "threshold": 0, "recall": 1, "false_positives": 0}
    model = {"sha256": "", "pipeline": "", "network": "", "parametrization": "epsilon"}
    account = {"names": ["zorp"], "model": model, "numbers": numbers, "made": {"from": "images"}}
    path = tmp_path / "concept.safetensors"
    ConceptAdapter(pairs=pairs, samples=samples, account=account).save(path)
    subtraction = SubtractionSettings(concepts=(SubtractedConcept(file=path),), gain=2.0)
    protection = Protection(ProtectionSettings(subtraction=subtraction), output=tmp_path / "lora")
    protection.fit(lambda prompts: None, CAPTIONS)
    torch.manual_seed(3)
    call = call_of(trainer, torch.randn(ROWS, CHANNELS, SIDE, SIDE))
    state = torch.get_rng_state()
    a, b = pairs["read"]
    drawn = nn.functional.dropout(call.given["latents"], trainer.dropout)
    added = torch.einsum("oc,rchw->rohw", b @ a, drawn)
    torch.set_rng_state(state)
    return Step(protection, trainer, call), added


def test_concepts_are_added_with_the_steps_own_dropout_and_leave_no_trace(tmp_path):
    """By hand for both kinds of trainers; the row that does not name the concept keeps each bit."""
    trainer = Trainer(repeats_rows=False)
    step, added = begin_subtraction(tmp_path, trainer)
    state = torch.get_rng_state()
    step.measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.passes == [(ROWS, False)] * 2  # without the adapter and with it
    assert trainer.lora == 1.0
    prediction = step.call.again()
    moved = step.subtracted(prediction)
    torch.testing.assert_close(moved[[0, 2]], (prediction + 2.0 * added)[[0, 2]])
    assert torch.equal(moved[1], prediction[1])
    assert moved.requires_grad
    assert added[[0, 2]].abs().max() > 0.1


def test_a_batch_without_the_concept_costs_nothing_and_changes_no_bit(tmp_path):
    trainer = Trainer()
    step, _ = begin_subtraction(tmp_path, trainer)
    step.call = replace(step.call, samples={0: Sample(file="0.png", caption="a house")})
    step.measure()
    assert not trainer.passes
    prediction = step.call.again()
    assert step.subtracted(prediction) is prediction


def test_what_cannot_be_repeated_is_refused():
    call = Call(run=print, given={}, timesteps=torch.tensor([1, 2]))
    call.check_timesteps(torch.tensor([1, 2]))
    with pytest.raises(HookMissing, match="drew other timesteps"):
        call.check_timesteps(torch.tensor([1, 3]))
    with pytest.raises(UnsupportedTraining, match="prompts of one length"):
        repeated(torch.zeros(1, 7), torch.zeros(2, 8))
