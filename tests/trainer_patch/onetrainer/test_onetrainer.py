"""The parts of OneTrainer's adapter by themselves; tests/trainer_patch/onetrainer trains for real.

Also what is said where OneTrainer is missing, is another version, or is asked for too much.
"""

from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.settings import (
    FilterSettings,
    ProjectionSettings,
    ProtectionSettings,
)
from unmemorize.trainer_patch.onetrainer.checks import (
    check_configuration,
    check_hooks,
    option_keys,
)
from unmemorize.trainer_patch.onetrainer.data import without_text
from unmemorize.trainer_patch.onetrainer.training import output_of, span_of
from unmemorize.trainer_patch.options import NAMES, OptionError

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
        is_wuerstchen=lambda: family == "wuerstchen",
        is_video_model=lambda: family == "video",
        text_encoder_parts=lambda: parts,
    )
    train = {part: SimpleNamespace(train=part in trained) for part in ("text_encoder", *parts)}
    return SimpleNamespace(**{
        "model_type": model_type, "training_method": Kind.LORA, "multi_gpu": False,
        "cloud": SimpleNamespace(enabled=False), "train_any_embedding": lambda: False,
        "train_any_output_embedding": lambda: False, "min_noising_strength": 0.0,
        "max_noising_strength": 0.5,
        "transformer": SimpleNamespace(offloading_enabled=lambda: False), **train, **changed,
    })  # fmt: skip


@pytest.fixture
def projection(tmp_path):
    path = tmp_path / "subspace.safetensors"
    ConceptSubspace.empty(4).save(path)
    return ProtectionSettings(projection=ProjectionSettings(file=path))


FILTER = ProtectionSettings(filter=FilterSettings())


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "z_image"])
def test_what_is_supported_is_not_refused(family, projection):
    check_configuration(config_of(family, trained=("text_encoder",)), FILTER)
    if family in ("sd", "sdxl"):
        check_configuration(config_of(family, trained=("text_encoder",)), projection)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"training_method": Kind.FINE_TUNE}, "only LORA is covered"),
        ({"multi_gpu": True}, "set multi_gpu to false"),
        ({"cloud": SimpleNamespace(enabled=True)}, "set cloud.enabled to false"),
        ({"family": "sana"}, "does not know their names"),
        ({"family": "wuerstchen"}, "noise levels from 0 to 1"),
        ({"family": "video"}, "learns clips"),
        ({"family": "sd3"}, "mem_filter is supported"),
        ({"train_any_embedding": lambda: True}, "an embedding is trained"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_what_to_set(projection, changed, message):
    with pytest.raises(UnsupportedTraining, match=message):
        check_configuration(config_of(**changed), projection)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_regions_are_refused_beside_offloaded_layers(tmp_path, family):
    layers = ProjectionSettings(layers=tmp_path / "layers.safetensors", regions=True)
    asked = ProtectionSettings(projection=layers)
    check_configuration(config_of(family), asked)
    offloaded = SimpleNamespace(offloading_enabled=lambda: True)
    if family in ("sd", "sdxl"):  # their layers are never offloaded
        check_configuration(config_of(family, transformer=offloaded), asked)
    else:
        with pytest.raises(UnsupportedTraining, match="offload_fraction to 0"):
            check_configuration(config_of(family, transformer=offloaded), asked)


def test_all_faults_are_told_at_once(projection):
    config = config_of(
        multi_gpu=True, cloud=SimpleNamespace(enabled=True), train_any_embedding=lambda: True
    )
    with pytest.raises(UnsupportedTraining, match=r"cloud.*multi_gpu.*embedding"):
        check_configuration(config, projection)


def test_regions_need_the_text_as_it_was(tmp_path):
    layers = ProjectionSettings(layers=tmp_path / "layers.safetensors", regions=True)
    config = config_of("sdxl", trained=("text_encoder", "text_encoder_2"))
    with pytest.raises(UnsupportedTraining, match=r"text_encoder\.train and text_encoder_2\.train"):
        check_configuration(config, ProtectionSettings(projection=layers))


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
    with pytest.raises(HookMissing, match="tokens"):
        without_text(batch, {})
    with pytest.raises(UnsupportedTraining, match=r"\(7,\).*\(8,\)"):
        without_text(batch, {"tokens": torch.zeros(1, 8)})


def test_another_version_is_refused_with_what_it_lacks():
    trainer = SimpleNamespace(
        model_setup=SimpleNamespace(predict=print), model=None, model_saver=None, data_loader=None
    )
    with pytest.raises(
        HookMissing, match=r"after_optimizer_step.*prior_model.*_create_mgds.*loss_weight"
    ) as e:
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
