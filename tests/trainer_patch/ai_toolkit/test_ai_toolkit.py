"""ai-toolkit's hooks on a small trainer that has them; tests of the folder `ai_toolkit` are real.

Also what is said where a version lacks a hook, or a configuration asks for too much.
"""

import json
import logging
from types import SimpleNamespace

import little_ai_toolkit
import pytest
import torch
from little_ai_toolkit import CAPTIONS, DOWN, UP, WIDTH, LittleTrainer
from safetensors import safe_open
from safetensors.torch import load_file
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.filter import watch
from unmemorize.shared.training.filter.sample_log import read_records
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import ProtectionFailed
from unmemorize.trainer_patch.ai_toolkit import AI_TOOLKIT_EXTENSIONS
from unmemorize.trainer_patch.ai_toolkit.adapter import captions_of
from unmemorize.trainer_patch.ai_toolkit.checks import check_section, settings_in
from unmemorize.trainer_patch.ai_toolkit.process import ProtectedProcess
from unmemorize.trainer_patch.options import OptionError


class Trainer(ProtectedProcess, LittleTrainer):
    """As `get_process` makes it."""


@pytest.fixture(autouse=True)
def toolkit(monkeypatch):
    """The one function of ai-toolkit that is called by name."""
    little_ai_toolkit.install(monkeypatch)


@pytest.fixture
def made(tmp_path):
    """Function that makes a trainer with some options; its jobs share one folder."""

    def make(asked=None, name="lora", kind=Trainer, **config):
        config |= {"training_folder": str(tmp_path), "unmemorize": asked}
        return kind(0, SimpleNamespace(name=name), config)

    return make


@pytest.fixture
def subspace(tmp_path):
    """Function that returns the file of a subspace of some dimensions."""

    def make(rank):
        path = tmp_path / f"{rank}.safetensors"
        random = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
        basis = torch.linalg.qr(random.double())[0][:, :rank]
        ConceptSubspace(basis=basis).save(path)
        return path

    return make


def same(one, other):
    first, second = load_file(one), load_file(other)
    return all(torch.equal(first[key], second[key]) for key in first)


def counts(path, part):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[f"unmemorize.{part}"])


def test_the_extension_is_what_the_loader_reads():
    assert [each.uid for each in AI_TOOLKIT_EXTENSIONS] == ["unmemorize"]


@pytest.mark.parametrize("asked", [{"mem_filter": False}, {"mem_filter": "off"}, "idle"])
def test_settings_that_change_nothing_change_no_bit(made, subspace, asked):
    plain = made(name="plain", kind=LittleTrainer).run()
    if asked == "idle":
        asked = {"mem_filter": "inf", "project_concepts": subspace(0)}
    assert same(plain, made(asked, name="after").run())


def test_a_threshold_of_zero_leaves_the_up_factor_at_zero(made):
    trainer = made({"mem_filter": 0})
    assert not load_file(trainer.run())[UP].any()
    assert trainer.told["unmemorize/filtered_share"] == 1
    assert trainer.told["loss"] > 0


def test_watching_changes_no_bit(made):
    plain = made(name="plain", kind=LittleTrainer).run()
    assert same(plain, made({"mem_warn": True}, name="watched").run())


class TextReader(LittleTrainer):
    """Its model reads text without the LoRA too."""

    def predict_noise(
        self, noisy_latents, timesteps, conditional_embeds, batch, is_primary_pred=False
    ):
        read = conditional_embeds.text_embeds.mean((1, 2))[:, None, None, None]
        return read + super().predict_noise(
            noisy_latents, timesteps, conditional_embeds, batch, is_primary_pred
        )


class ReadingTrainer(ProtectedProcess, TextReader):
    """As `get_process` makes it."""


def test_a_training_that_memorizes_ends_at_a_saved_file(made, tmp_path, monkeypatch):
    # What is decided is tested elsewhere: here any count is one that chance does not explain.
    monkeypatch.setattr(watch, "IMAGES", 2)
    monkeypatch.setattr(watch, "RARE", 2.0)
    trainer = made({"mem_stop": True}, kind=ReadingTrainer, steps=2 * watch.VISITS)
    with pytest.raises(SystemExit) as ended:
        trainer.run()
    assert ended.value.code == 0
    assert trainer.protection.finished
    assert counts(tmp_path / "lora" / "lora.safetensors", "filter")["seen"] == 4 * watch.VISITS
    assert json.loads((tmp_path / "lora.memorized.json").read_text())["last_inside"] is None


def test_the_saved_factor_is_off_the_subspace(made, subspace):
    paths = [made(asked, name=name).run() for asked, name in (
        ({"mem_filter": False}, "plain"), ({"project_concepts": subspace(3)}, "kept"),
    )]  # fmt: skip
    basis = ConceptSubspace.load(subspace(3)).basis
    shares = []
    for path in paths:
        down = load_file(path)[DOWN].double()
        shares.append((down @ basis).norm() / down.norm())
    assert shares[0] > 0.1
    assert shares[1] < 1e-6
    assert counts(paths[1], "projection")["steps"] == 3


def test_gradients_are_off_the_subspace_when_they_are_clipped(made, subspace, monkeypatch):
    trainer = made({"project_concepts": subspace(3)})
    basis = ConceptSubspace.load(subspace(3)).basis
    clip, shares = trainer.accelerator.clip_grad_norm_, []

    def look(parameters, norm):
        gradient = trainer.network.pair.lora_down.weight.grad.double()
        shares.append((gradient @ basis).norm())
        return clip(parameters, norm)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", look)
    trainer.run()
    assert max(shares) < 1e-7
    assert trainer.accelerator.clip_grad_norm_ is look  # the hook is off again


def test_velocities_are_measured_as_noise(made, tmp_path):
    """Score of noise = score of velocity times sqrt(abar), which falls from 1 to 0 here."""
    scores = []
    for name in ("epsilon", "v_prediction"):
        made({"mem_filter": "inf"}, name=name, prediction_type=name).run()
        scores.append(read_records([tmp_path / f"{name}.memorized.jsonl"]))
    for noise, velocity in zip(*scores, strict=True):
        signal = 1 - noise.timestep / 999
        assert velocity.score == pytest.approx(signal * noise.score, rel=1e-5)


def test_a_cheaper_filter_leaves_predictions_out(made):
    path = made({"mem_filter": 10, "mem_filter_recall": 100}, steps=60).run()
    told = counts(path, "filter")
    assert told["measured"] < told["seen"] == 120


def test_what_is_logged_is_printed_although_logging_is_off(made, subspace, capsys):
    logging.disable(logging.WARNING)
    try:
        made({"mem_filter": "inf", "project_concepts": str(subspace(3))}).run()
        assert logging.root.manager.disable == logging.WARNING
    finally:
        logging.disable(logging.NOTSET)
    said = capsys.readouterr().out
    assert said.count("Concept subspace: 3 of 16 dimensions") == 1
    assert "all samples:" in said


def test_reports_name_files_and_captions_beside_the_folder(made, tmp_path):
    made({"mem_filter": "inf"}).run()
    report = json.loads((tmp_path / "lora.memorized.json").read_text())
    found = {sample["file"]: sample["caption"] for sample in report["samples"]}
    assert found == {f"{number}.png": caption for number, caption in enumerate(CAPTIONS)}
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["lora.safetensors"]


def test_reading_captions_leaves_those_of_the_training_alone():
    items = [little_ai_toolkit.Item(number) for number in (0, 0, 1)]
    dataset = SimpleNamespace(file_list=items, caption_dict=None)
    assert captions_of(SimpleNamespace(dataset=dataset), None) == list(CAPTIONS[:2])
    assert [item.raw_caption for item in items] == [None] * 3


def test_a_resumed_training_goes_on_counting(made, subspace):
    asked = {"mem_filter": 0.1, "project_concepts": subspace(3)}
    made(asked, steps=2).run()
    path = made(asked, steps=3).run()
    assert counts(path, "filter")["seen"] == 6
    assert counts(path, "projection")["steps"] == 3


def test_a_state_of_another_step_is_not_taken(made, tmp_path, capsys):
    asked = {"mem_filter": "inf"}
    made(asked, steps=2).run()
    state = tmp_path / "lora.unmemorize.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 1}))
    assert counts(made(asked, steps=3).run(), "filter")["seen"] == 2
    assert "does not belong to step 2" in capsys.readouterr().out


def test_a_trainer_that_never_comes_to_its_hooks_fails_at_the_end(made, subspace):
    class Skips(Trainer):
        def hook_train_loop(self, batch):
            return {}

    for asked, fault in (
        ({"mem_filter": "inf"}, "saw no sample"),
        ({"project_concepts": subspace(3)}, "No optimizer step was projected"),
    ):
        with pytest.raises(ProtectionFailed, match=fault):
            made(asked, name=fault, kind=Skips).run()


def test_another_version_is_refused(made):
    class Older(LittleTrainer):
        def predict_noise(self, noisy_latents, timesteps, conditional_embeds, batch):
            pass

    class Protected(ProtectedProcess, Older):
        pass

    with pytest.raises(HookMissing, match="predict_noise"):
        made({"mem_filter": "inf"}, kind=Protected)
    assert made({"mem_filter": False}, kind=Protected)  # nothing is asked of it


def test_everything_that_is_not_supported_is_said_at_once(made, subspace):
    class Other(LittleTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.train_config.train_text_encoder = self.train_config.do_cfg = True
            self.train_config.loss_type = "mean_flow"
            self.network_config.type, self.model_config.arch = "lokr", "flux"
            self.adapter_config = object()

    class Protected(ProtectedProcess, Other):
        pass

    with pytest.raises(UnsupportedTraining) as refused:
        made({"mem_filter": 0.1, "project_concepts": subspace(3), "project_regions": True,
              "project_layers": subspace(3)}, kind=Protected)  # fmt: skip
    for part in ("train_text_encoder", "do_cfg", "mean_flow", "network.type: lokr", "arch: flux",
                 "`adapter`", "project_regions` is there for sd1"):  # fmt: skip
        assert part in str(refused.value)


@pytest.mark.parametrize("part", ["x0_pred", "encode_control_in_text_embeddings"])
def test_models_without_an_empty_prompt_to_compare_with_are_refused(made, part):
    trainer = made({"mem_filter": "inf"})
    trainer.sd = SimpleNamespace(x0_pred=False, encode_control_in_text_embeddings=False)
    trainer.hook_after_model_load()
    setattr(trainer.sd, part, True)
    with pytest.raises(UnsupportedTraining):
        trainer.hook_after_model_load()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mem_filters": 0.1}, "`mem_filters` is not an option"),
        ({"lr": 0.1}, "`lr` is not an option"),
        ("q0.95", "must hold options"),
        ({"project_cap": 3}, "does nothing without --project_concepts"),
    ],
)
def test_a_section_that_cannot_be_understood_is_refused(section, message):
    with pytest.raises(OptionError, match=message):
        settings_in(section)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "`type: unmemorize` is asked for nothing"),
        ({"unmemorize": {}}, "is asked for nothing"),
        ({"mem_filter": 1}, "`mem_filter` stands beside `unmemorize:`"),
        ({"mem_fliter": 1}, "`mem_fliter` is not an option; type mem_filter"),
        ({"train": {"mem_filter": 1}}, "`mem_filter` stands in `train`"),
        ({"datasets": [{"mem_filter": 1}]}, "`mem_filter` stands in `datasets`"),
    ],
)
def test_an_option_where_nobody_reads_it_is_refused(config, message):
    given = {"unmemorize": {"mem_filter": 1}} | config if config else {"unmemorize": None}
    with pytest.raises(OptionError, match=message):
        check_section(given)


def test_yaml_has_numbers_and_switches():
    assert settings_in({"mem_filter": 0.3}).filter.limit == 0.3
    assert settings_in({"mem_filter": 0}).filter.limit == 0
    assert settings_in({"mem_filter": float("inf")}).filter.limit == float("inf")
    assert not settings_in({"mem_filter": False, "project_concepts": None})  # off, nothing typed
