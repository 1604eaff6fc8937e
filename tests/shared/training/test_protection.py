"""Both methods over whole trainings: what they keep, what they leave alone, and how they end."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_text import CAPTIONS, WIDTH, ZORBO, seeded, subspace_of, text_path
from torch import nn
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.filter.sample_log import Sample, read_records
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.projection import ProjectionFailed
from unmemorize.shared.training.protection import Protection, ProtectionFailed
from unmemorize.shared.training.replay import RandomState
from unmemorize.shared.training.settings import (
    FilterSettings,
    ProjectionSettings,
    ProtectionSettings,
)

STEPS, BATCH, RANK = 12, 4, 3
PROJECTION = ProjectionSettings(concepts=(ZORBO,))


class Lora(nn.Module):
    """Plain LoRA on a layer that reads text."""

    def __init__(self, seed: int):
        super().__init__()
        self.lora_down, self.lora_up = nn.Module(), nn.Module()
        down = seeded(RANK, WIDTH, seed=seed, dtype=torch.float32)
        self.lora_down.weight = nn.Parameter(down)
        self.lora_up.weight = nn.Parameter(torch.zeros(5, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.lora_down.weight.T @ self.lora_up.weight.T


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn2_to_k, self.attn2_to_v = Lora(1), Lora(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn2_to_k(x).tanh() + self.attn2_to_v(x)


class Training:
    """What a trainer does, in its order; each step has its own random input."""

    def __init__(self, settings: ProtectionSettings, output: Path, **kwargs):
        self.network = Network()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.02)
        self.protection = Protection(settings, output=output, **kwargs)
        self.protection.fit(text_path, CAPTIONS)
        self.protection.protect(self.network)
        self.done = 0

    def run(self, steps: int) -> "Training":
        self.protection.start()
        for _ in range(steps):
            self.done += 1
            x = seeded(BATCH, WIDTH, seed=100 + self.done, dtype=torch.float32)
            target = seeded(BATCH, 5, seed=200 + self.done, dtype=torch.float32)
            losses = (self.network(x) - target).square().mean(1)
            if self.protection.filter:
                losses = losses * self.weights()
            losses.mean().backward()
            self.protection.before_clip()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.protection.after_step()
            self.optimizer.zero_grad()
        return self

    def weights(self) -> torch.Tensor:
        """Image 0 is the one whose text moves it most."""
        size = torch.tensor([4.0, 1.0, 1.0, 1.0]).view(-1, 1, 1, 1)
        cond = size * seeded(BATCH, 4, 2, 2, seed=300 + self.done, dtype=torch.float32).abs()
        samples = [Sample(file=f"{row}.png", caption=f"caption {row}") for row in range(BATCH)]
        timesteps = torch.full((BATCH,), 500)
        due = self.protection.due(samples, timesteps)
        return self.protection.weigh(
            cond, torch.zeros_like(cond)[due], timesteps=timesteps, samples=samples
        )

    def save(self, path: Path) -> None:
        self.protection.before_save()
        tensors = {
            f"lora_unet_{k}": v.detach().clone() for k, v in self.network.state_dict().items()
        }
        save_file(tensors, path, metadata=self.protection.metadata())
        self.protection.after_save(path)

    def state(self) -> dict:
        """Everything a checkpoint of the trainer's keeps."""
        plain = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        told = json.loads(json.dumps(self.protection.state_dict(), allow_nan=False))
        return {"torch": torch.load(_saved(plain), weights_only=True), "told": told}

    def load(self, state: dict, done: int) -> "Training":
        self.network.load_state_dict(state["torch"]["network"])
        self.optimizer.load_state_dict(state["torch"]["optimizer"])
        self.protection.load_state_dict(state["told"])
        self.done = done
        return self


def _saved(value: dict):
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def same_weights(one: Training, other: Training) -> bool:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def inside(training: Training, basis: torch.Tensor) -> float:
    """Largest |B A V| / |B A| of the text-fed layers, in float64."""
    layers = [training.network.attn2_to_k, training.network.attn2_to_v]
    deltas = [layer.lora_up.weight.double() @ layer.lora_down.weight.double() for layer in layers]
    return max(float((delta @ basis).norm() / delta.norm()) for delta in deltas)


def filtering(**settings) -> ProtectionSettings:
    return ProtectionSettings(filter=FilterSettings(**settings))


def test_training_stays_off_the_subspace_and_a_plain_one_does_not(tmp_path):
    settings = ProtectionSettings(projection=PROJECTION)
    kept = Training(settings, tmp_path / "kept").run(STEPS)
    plain = Training(ProtectionSettings(), tmp_path / "plain").run(STEPS)
    basis = kept.protection.subspace.basis
    assert inside(kept, basis) < 1e-6
    assert inside(plain, basis) > 0.1
    kept.save(tmp_path / "kept.safetensors")
    kept.protection.finish()
    told = json.loads(kept.protection.metadata()["unmemorize.projection"])
    assert (told["modules"], told["steps"], told["accepted"]) == (2, STEPS, True)
    assert told["concepts"] == [{"names": ["zorbo", "big zorb"], "neutral": "thing"}]
    assert told["residual"] < 1e-6
    assert kept.protection.scalars() == {"unmemorize/residual": told["residual"]}


def test_factors_trained_in_half_precision_and_widened_are_saved_without_its_rounding(tmp_path):
    kept = Training(ProtectionSettings(projection=PROJECTION), tmp_path / "kept")
    kept.network.half()
    kept.protection.protect(kept.network)
    kept.protection.start()
    kept.network.float()
    assert max(kept.protection.projection.residuals().values()) > 1e-6
    kept.save(tmp_path / "kept.safetensors")
    assert max(kept.protection.projection.residuals().values()) < 1e-6


@pytest.mark.parametrize("empty", [ProtectionSettings(), filtering(), filtering(limit=1e9)])
def test_what_changes_nothing_changes_no_bit(tmp_path, empty):
    plain = Training(ProtectionSettings(), tmp_path / "plain").run(STEPS)
    assert same_weights(plain, Training(empty, tmp_path / "empty").run(STEPS))
    assert not same_weights(plain, Training(filtering(limit=1.5), tmp_path / "other").run(STEPS))


def test_an_empty_subspace_changes_no_bit_and_passes_the_checks(tmp_path):
    file = tmp_path / "empty.safetensors"
    ConceptSubspace.empty(WIDTH).save(file)
    settings = ProtectionSettings(projection=ProjectionSettings(file=file))
    empty = Training(settings, tmp_path / "empty").run(STEPS)
    assert same_weights(empty, Training(ProtectionSettings(), tmp_path / "plain").run(STEPS))
    empty.save(tmp_path / "lora.safetensors")
    empty.protection.finish()


def test_layers_are_kept_off_their_own_subspaces(tmp_path):
    """Without a subspace of text states, a file may hold text-fed layers too."""
    file = tmp_path / "layers.safetensors"
    bases = {"attn2_to_k": subspace_of(WIDTH, 3).basis, "attn2_to_v": subspace_of(WIDTH, 5).basis}
    untrained = {"attn1_to_q": subspace_of(8, 2).basis}
    LayerSubspaces(bases=bases | untrained, provenance={"names": ["zorbo"]}).save(file)
    settings = ProtectionSettings(projection=ProjectionSettings(layers=file))
    kept = Training(settings, tmp_path / "kept").run(STEPS)
    plain = Training(ProtectionSettings(), tmp_path / "plain").run(STEPS)
    for name, basis in bases.items():
        for training, most in ((kept, 1e-6), (plain, 1.0)):
            layer = getattr(training.network, name)
            up, down = layer.lora_up.weight.detach(), layer.lora_down.weight.detach()
            delta = up.double() @ down.double()
            share = float((delta @ basis).norm() / delta.norm())
            assert share < most
            assert most < 1 or share > 0.1
    kept.save(tmp_path / "lora.safetensors")
    kept.protection.finish()
    told = json.loads(kept.protection.metadata()["unmemorize.projection"])
    assert told["layers"] == {"names": ["zorbo"], "count": 2}
    assert (told["modules"], told["steps"]) == (2, STEPS)
    with torch.no_grad():
        kept.network.attn2_to_v.lora_down.weight.add_(0.1)
    tensors = {f"lora_unet_{k}": v for k, v in kept.network.state_dict().items()}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ProjectionFailed, match="1 of 2"):
        kept.protection.after_save(tmp_path / "other.safetensors")
    kept.protection.clear_rounding(tensors, source="other")
    save_file(tensors, tmp_path / "cleared.safetensors")
    kept.protection.after_save(tmp_path / "cleared.safetensors")


def test_nothing_asked_leaves_nothing(tmp_path):
    plain = Training(ProtectionSettings(), tmp_path / "lora").run(2)
    plain.save(tmp_path / "lora.safetensors")
    plain.protection.finish()
    assert not plain.protection.scalars()
    assert not plain.protection.metadata()
    assert not plain.protection.state_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_the_cheaper_filter_says_what_it_measured(tmp_path):
    made = Training(filtering(limit=20.0, recall=4), tmp_path / "lora").run(STEPS)
    assert 0.25 <= made.protection.scalars()["unmemorize/measured_share"] < 0.5
    made.protection.finish()
    report = json.loads((tmp_path / "lora.memorized.json").read_text())
    assert report["recall"] == 4
    assert report["measured"] == sum(sample["measured"] for sample in report["samples"])
    assert BATCH * STEPS / 4 <= report["measured"] < report["seen"] == BATCH * STEPS
    text = (tmp_path / "lora.memorized.txt").read_text()
    assert f"{report['measured']} scores were measured" in text
    told = json.loads(made.protection.metadata()["unmemorize.filter"])
    assert told["measured"] == report["measured"]


def test_a_cheaper_filter_that_measures_always_is_the_filter(tmp_path):
    full = Training(filtering(quantile=0.75), tmp_path / "full").run(40)
    always = Training(filtering(quantile=0.75, recall=1), tmp_path / "always").run(40)
    assert same_weights(full, always)
    assert always.protection.filter.measured == 40 * BATCH


def test_under_dropout_a_batch_is_repeated_whole_or_not_at_all(tmp_path):
    protection = Protection(filtering(limit=100.0, recall=9), output=tmp_path / "lora")
    known, fresh = Sample(file="known"), Sample(file="fresh")

    def due(protection: Protection, *samples: Sample) -> list[bool]:
        return protection.due(samples, torch.full((len(samples),), 500)).tolist()

    def step(*, draws: bool) -> None:
        cond, before = torch.ones(1, 4, 2, 2), RandomState.now()
        if draws:
            torch.rand(1)
        told = {"timesteps": torch.tensor([500]), "samples": [known], "before": before}
        protection.weigh(cond, 0 * cond, **told)

    step(draws=False)
    assert due(protection, known, fresh) == [False, True]
    step(draws=True)
    assert due(protection, known, fresh) == [True, True]
    assert due(protection, known, known) == [False, False]
    step(draws=False)  # by chance, or since a schedule turned it off: it may again
    resumed = Protection(filtering(limit=100.0, recall=9), output=tmp_path / "again")
    resumed.load_state_dict(protection.state_dict())
    assert due(resumed, known, fresh) == [True, True]


def test_a_damaged_state_is_told_as_such(tmp_path):
    """Continued as before, or refused by a message of this package."""
    made = Training(filtering(quantile=0.75, recall=1), tmp_path / "made").run(STEPS)
    text = json.dumps(made.protection.state_dict())

    def places(value, way=()):
        yield way
        if isinstance(value, dict) and len(way) < 3:
            for key in value:
                yield from places(value[key], (*way, key))

    refused = 0
    for way in places(json.loads(text)):
        for strange in (None, "x", [[]]):
            state = holder = {"whole": json.loads(text)}
            *above, last = ("whole", *way)
            for key in above:
                holder = holder[key]
            holder[last] = strange
            protection = Protection(filtering(quantile=0.75, recall=1), output=tmp_path / "again")
            try:
                protection.load_state_dict(state["whole"])
            except ValueError as error:
                refused += 1
                assert "cannot be continued" in str(error)  # noqa: PT017
    assert refused > 10


def test_everything_left_out_leaves_the_up_factors_at_zero(tmp_path):
    made = Training(filtering(limit=0.0), tmp_path / "lora").run(STEPS)
    assert not made.network.attn2_to_k.lora_up.weight.any()
    assert made.protection.scalars()["unmemorize/filtered_share"] == 1.0


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize(
    "asked", [filtering(quantile=0.75), filtering(limit=1.5), filtering(limit=1.5, recall=3)]
)
def test_resumed_is_as_if_never_interrupted(tmp_path, asked, cut):
    settings = ProtectionSettings(projection=PROJECTION, filter=asked.filter)
    whole = Training(settings, tmp_path / "whole").run(40)
    first = Training(settings, tmp_path / "cut").run(cut)
    state = first.state()
    first.run(3)  # lost by the interruption
    resumed = Training(settings, tmp_path / "cut").load(state, cut).run(40 - cut)
    assert same_weights(whole, resumed)
    for training in (whole, resumed):
        training.save(tmp_path / "lora.safetensors")
        training.protection.finish()
    reports = [json.loads((tmp_path / f"{n}.memorized.json").read_text()) for n in ("whole", "cut")]
    assert reports[0] == reports[1]
    assert whole.protection.metadata() == resumed.protection.metadata()


def test_a_new_training_does_not_continue_the_records_of_another(tmp_path):
    for steps in (5, 2):
        Training(filtering(), tmp_path / "lora").run(steps).protection.finish()
        assert len(read_records([tmp_path / "lora.memorized.jsonl"])) == steps * BATCH


def test_the_most_memorized_sample_leads_the_report_of_all_processes(tmp_path):
    trainings = [
        Training(filtering(limit=1.5), tmp_path / "lora.safetensors", process=p, processes=2).run(5)
        for p in (0, 1)
    ]
    trainings[1].protection.flush()
    trainings[0].protection.finish()
    report = json.loads((tmp_path / "lora.memorized.json").read_text())
    assert [sample["visits"] for sample in report["samples"]] == [10] * BATCH
    assert report["samples"][0]["file"] == "0.png"
    assert report["samples"][0]["flagged"] > 5 > report["samples"][1]["flagged"]
    assert (report["threshold"], report["action"], report["seen"]) == ("1.5", "drop", 20)
    text = (tmp_path / "lora.memorized.txt").read_text().splitlines()
    assert text[4].endswith("0.png")


def test_a_training_that_never_stepped_fails_at_the_end(tmp_path):
    settings = ProtectionSettings(projection=PROJECTION, filter=FilterSettings())
    idle = Training(settings, tmp_path / "lora")
    idle.protection.start()
    with pytest.raises(ProtectionFailed, match=r"No optimizer step.*saw no sample") as caught:
        idle.protection.finish()
    assert "not what was requested" in str(caught.value)
    unbound = Protection(ProtectionSettings(projection=PROJECTION), output=tmp_path / "lora")
    with pytest.raises(ProtectionFailed, match="No LoRA was ever given"):
        unbound.finish()


def test_a_training_is_not_attached_before_the_trainer_has_called_it(tmp_path):
    settings = ProtectionSettings(projection=PROJECTION, filter=FilterSettings())
    idle = Protection(settings, output=tmp_path / "lora")
    with pytest.raises(ProtectionFailed, match=r"never given.*no prediction.*before its first"):
        idle.check_attached()
    begun = Training(settings, tmp_path / "lora")
    with pytest.raises(ProtectionFailed, match="was given no prediction"):
        begun.run(0).protection.check_attached()
    begun.run(1).protection.check_attached()
    Protection(ProtectionSettings(), output=tmp_path / "lora").check_attached()


def test_no_file_claims_what_did_not_happen(tmp_path):
    settings = ProtectionSettings(projection=PROJECTION, filter=FilterSettings())
    path = tmp_path / "lora.safetensors"
    idle = Training(settings, path)
    idle.protection.start()
    idle.save(path)
    assert not claims_of(path)
    made = Training(settings, path).run(2)
    made.save(path)
    assert claims_of(path) == {"unmemorize.projection", "unmemorize.filter"}
    before = load_file(path)
    with torch.no_grad():
        made.network.attn2_to_v.lora_down.weight.add_(0.1)
    with pytest.raises(ProtectionFailed):
        made.protection.finish()
    assert not made.protection.finished
    assert not claims_of(path)
    after = load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def claims_of(path):
    with safe_open(path, "pt") as file:
        return {key for key in file.metadata() or {} if key.startswith("unmemorize.")}


def test_weights_that_someone_else_wrote_are_found_in_the_file(tmp_path):
    made = Training(ProtectionSettings(projection=PROJECTION), tmp_path / "lora").run(2)
    made.save(tmp_path / "lora.safetensors")
    with torch.no_grad():
        made.network.attn2_to_v.lora_down.weight.add_(0.1)
    tensors = {f"lora_unet_{k}": v for k, v in made.network.state_dict().items()}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ProjectionFailed, match="1 of 2"):
        made.protection.after_save(tmp_path / "other.safetensors")
    with pytest.raises(ProtectionFailed, match="1 of 2"):
        made.protection.finish()
    made.save(tmp_path / "lora.safetensors")  # saving projects, whatever was written before
    made.protection.finish()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProjectionSettings(), "Give `concepts`, `file` or `layers`"),
        (lambda: ProjectionSettings(concepts=(ZORBO,), file=Path("a")), "either `concepts`"),
        (lambda: ProjectionSettings(concepts=(ZORBO,), energy=0.0), "`energy` must be"),
        (lambda: ProjectionSettings(concepts=(ZORBO,), cap=0), "`cap` must be"),
        (lambda: FilterSettings(limit=1.0, quantile=0.5), "Give one of `limit`"),
        (lambda: FilterSettings(ratio=1.5, quantile=0.5), "Give one of `limit`"),
        (lambda: FilterSettings(ratio=1.0), "`ratio` must be above 1"),
        (lambda: FilterSettings(limit=-1.0), "at least 0"),
        (lambda: FilterSettings(recall=0), "`recall` must be at least 1"),
        (lambda: FilterSettings(limit=math.nan), "at least 0"),
        (lambda: FilterSettings(quantile=1.0), "between 0 and 1"),
    ],
)
def test_settings_refuse_nonsense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
