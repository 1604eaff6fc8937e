"""The parts of OneTrainer's adapter by themselves; tests/trainer_patch/onetrainer trains for real.

Also what is said where OneTrainer is missing, is another version, or is asked for too much.
"""

import math
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from unmemorize.shared.training.lora_factors import UnsupportedTraining
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.sample_log import read_records
from unmemorize.shared.training.settings import (
    FilterSettings,
    ProjectionSettings,
    ProtectionSettings,
)
from unmemorize.shared.training.subspace import ConceptSubspace
from unmemorize.trainer_patch.onetrainer_config import option_keys, output_of, span_of, validate
from unmemorize.trainer_patch.onetrainer_data import BatchSamples, TextSide, without_text
from unmemorize.trainer_patch.onetrainer_filter import StepFilter
from unmemorize.trainer_patch.onetrainer_hooks import check_hooks
from unmemorize.trainer_patch.options import NAMES, OptionError
from unmemorize.trainer_patch.wrapping import HookMissing

MODULE = "unmemorize.trainer_patch.onetrainer"


class Config:
    """A configuration that reads its keys as OneTrainer's does: by a table, the rest ignored."""

    def __init__(self, names):
        self.types = dict.fromkeys(names, int)
        self.nullables = dict.fromkeys(names, False)
        self.default_values = dict.fromkeys(names, 1)
        vars(self).update(self.default_values)

    @staticmethod
    def default_values():
        return Config(["epochs"])

    def from_dict(self, data, migrate=True):
        for name in self.types.keys() & data.keys():
            value = data[name]
            setattr(self, name, None if value is None else self.types[name](value))
        return self


def test_the_options_are_keys_of_the_configuration_while_a_training_is_launched():
    own = dict(vars(Config))
    with option_keys(Config):
        config = Config.default_values()
        assert all(getattr(config, name) is None for name in NAMES)
        config.from_dict({"epochs": 3, "mem_filter": 0.05, "project_force": True}, migrate=False)
        assert (config.epochs, config.mem_filter, config.project_force) == (3, "0.05", "True")
        with pytest.raises(OptionError, match="`mem_filters` is not an option"):
            config.from_dict({"mem_filters": "q0.9"})
    assert dict(vars(Config)) == own
    assert not hasattr(Config.default_values().from_dict({"mem_filter": "inf"}), "mem_filter")


class Kind(Enum):
    """Values of the configuration, which are told by their names."""

    LORA = 1
    FINE_TUNE = 2

    def __str__(self):
        return self.name


def config_of(family: str = "sd", trained: tuple[str, ...] = (), **changed) -> SimpleNamespace:
    """Return a configuration as far as it is read."""
    parts = ("text_encoder", "text_encoder_2")[: 1 if family == "sd" else 2]
    model_type = SimpleNamespace(
        is_stable_diffusion=lambda: family == "sd",
        is_stable_diffusion_xl=lambda: family == "sdxl",
        is_stable_diffusion_3=lambda: family == "sd3",
        is_flux_1=lambda: family == "flux",
        text_encoder_parts=lambda: parts,
    )
    train = {part: SimpleNamespace(train=part in trained) for part in ("text_encoder", *parts)}
    return SimpleNamespace(**{
        "model_type": model_type, "training_method": Kind.LORA, "multi_gpu": False,
        "cloud": SimpleNamespace(enabled=False), "train_any_embedding": lambda: False,
        "train_any_output_embedding": lambda: False, "min_noising_strength": 0.0,
        "max_noising_strength": 0.5, **train, **changed,
    })  # fmt: skip


@pytest.fixture
def projection(tmp_path):
    path = tmp_path / "subspace.safetensors"
    ConceptSubspace.empty(4).save(path)
    return ProtectionSettings(projection=ProjectionSettings(file=path))


FILTER = ProtectionSettings(filter=FilterSettings())


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_what_is_supported_is_not_refused(family, projection):
    validate(config_of(family, trained=("text_encoder",)), FILTER)
    if family.startswith("sd") and family != "sd3":
        validate(config_of(family), projection)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"training_method": Kind.FINE_TUNE}, "only LORA is covered"),
        ({"multi_gpu": True}, "set multi_gpu to false"),
        ({"cloud": SimpleNamespace(enabled=True)}, "set cloud.enabled to false"),
        ({"family": "sana"}, "is not covered"),
        ({"family": "sd3"}, "mem_filter is supported"),
        ({"family": "sdxl", "trained": ("text_encoder", "text_encoder_2")},
         "set text_encoder.train and text_encoder_2.train to false"),
        ({"train_any_embedding": lambda: True}, "an embedding is trained"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_what_to_set(projection, changed, message):
    with pytest.raises(UnsupportedTraining, match=message):
        validate(config_of(**changed), projection)


def test_regions_are_refused(tmp_path):
    asked = ProjectionSettings(layers=tmp_path / "layers.safetensors", regions=True)
    with pytest.raises(UnsupportedTraining, match="project_regions is not there for this trainer"):
        validate(config_of("sd"), ProtectionSettings(projection=asked))


def test_all_faults_are_told_at_once(projection):
    config = config_of(
        multi_gpu=True, cloud=SimpleNamespace(enabled=True), trained=("text_encoder",)
    )
    with pytest.raises(UnsupportedTraining, match=r"cloud.*multi_gpu.*text_encoder\.train"):
        validate(config, projection)


def test_reports_stand_beside_the_lora(tmp_path):
    named = config_of(output_model_destination=str(tmp_path / "cats.safetensors"))
    assert output_of(named) == tmp_path / "cats.safetensors"
    folder = config_of(output_model_destination=str(tmp_path), save_filename_prefix="cats-")
    assert output_of(folder) == tmp_path / "cats"
    folder.save_filename_prefix = ""
    assert output_of(folder) == tmp_path / "lora"
    assert span_of(named) == (0.0, 500.0)


def test_a_batch_without_text_is_otherwise_the_same():
    batch = {"tokens": torch.ones(3, 7), "latent_image": torch.ones(3, 4), "prompt": ["a"] * 3}
    changed = without_text(batch, {"tokens": torch.zeros(1, 7), "tokens_mask": torch.zeros(1, 7)})
    assert changed["latent_image"] is batch["latent_image"]
    assert not changed["tokens"].any()
    assert changed["tokens"].shape == (3, 7)
    assert batch["tokens"].all()
    for empty in ({}, {"tokens": torch.zeros(1, 8)}):
        with pytest.raises(HookMissing, match="tokens"):
            without_text(batch, empty)


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
    predict = StepFilter(trainer, protection, Samples(), Text(trainer)).wrap(setup.predict)
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
        predict = StepFilter(trainer, protection, Samples(), Text(trainer)).wrap(setup.predict)
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


def test_another_version_is_refused_with_what_it_lacks():
    trainer = SimpleNamespace(model_setup=Setup(), model=None, model_saver=None, data_loader=None)
    with pytest.raises(HookMissing, match=r"after_optimizer_step.*_create_mgds.*loss_weight") as e:
        check_hooks(trainer)
    assert "model_setup.predict," not in str(e.value)


def test_elsewhere_the_launcher_says_where_it_belongs(run_python, tmp_path):
    for arguments in ((), ("scripts/train.py", "--config-path", "c.json")):
        done = run_python("-m", MODULE, *arguments, check=False, cwd=tmp_path)
        assert done.returncode == 2
        assert "cd OneTrainer" in done.stderr
    told = run_python("-m", MODULE, "--help", cwd=tmp_path).stdout
    assert all(f"--{name}" in told for name in NAMES)


def test_the_launcher_loads_nothing_of_the_trainer_by_itself(loaded_after):
    loaded = loaded_after(f"import {MODULE}")
    assert MODULE in loaded
    assert not {"mgds", "modules", "diffusers", "transformers"} & loaded
