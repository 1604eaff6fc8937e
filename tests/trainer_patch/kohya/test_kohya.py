"""Both doors on a training in sd-scripts' order; those of tests/trainer_patch/kohya are the real.

Also what is said where sd-scripts is missing, is another version, or is asked for too much.
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.filter.sample_log import read_records
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.trainer_patch.options import NAMES

MODULE = "unmemorize.trainer_patch.kohya"
CONCEPT = "project_concepts=sushi, sushi roll -> bread"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts(root, tmp_path_factory) -> Path:
    """A folder like sd-scripts'."""
    folder = tmp_path_factory.mktemp("little") / "scripts"
    shutil.copytree(Path(__file__).with_name("little_sd_scripts"), folder)
    trainer = folder / "train_network.py"
    source = trainer.read_text("utf-8")
    demo = 'Path(__file__).resolve().parents[4] / "demo" / "model"'
    assert demo in source
    trainer.write_text(source.replace(demo, f"Path({str(root / 'demo' / 'model')!r})"), "utf-8")
    return folder


@pytest.fixture(scope="module")
def train(scripts, package_env, tmp_path_factory):
    """Function that trains and returns the saved LoRA, or what a training that failed said."""
    room = tmp_path_factory.mktemp("loras")

    def run(
        name: str, *pairs: str, launched: bool = False, toml: dict | str | None = None,
        fails: bool = False, folder: Path = scripts, **changed,
    ) -> Path | str:  # fmt: skip
        settings = {
            "network_module": MODULE if pairs and not launched else "networks.lora",
            "network_train_unet_only": True, "output_name": "lora",
            "output_dir": str(room / name),
        } | changed  # fmt: skip
        arguments = []
        for key, value in settings.items():
            arguments += (
                [f"--{key}"] if value is True else [f"--{key}", str(value)] if value else []
            )
        if toml is not None:
            path = room / f"{name}.toml"
            path.write_text(toml if isinstance(toml, str) else written(toml))
            arguments += ["--config_file", str(path)]
        if launched:
            start = ["-m", MODULE, "train_network.py"]
            arguments += [f"--{pair}" for pair in pairs]
        else:
            start = ["train_network.py"]
            arguments += ["--network_args", *pairs] if pairs else []
        done = subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=folder, env=package_env, capture_output=True, text=True, encoding="utf-8",
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stderr
        if fails:
            assert "Traceback" not in done.stderr
            assert done.stderr.splitlines()[-1].startswith("unmemorize: ")
            claims = [header(path) for path in (room / name).glob("*.safetensors")]
            assert not any(key.startswith("unmemorize.") for each in claims for key in each)
        return done.stderr if fails else room / name / "lora.safetensors"

    return run


def written(toml: dict) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in toml.items())


@pytest.fixture(scope="module")
def plain(train) -> Path:
    return train("plain")


@pytest.fixture(scope="module")
def unchanged(train, empty) -> Path:
    """With settings that change nothing."""
    return train("nothing", "mem_filter=inf", f"project_concepts={empty}")


@pytest.fixture(scope="module")
def middle(unchanged) -> float:
    """A threshold that about half of the samples pass."""
    records = read_records([unchanged.with_name("lora.memorized.jsonl")])
    return statistics.median(record.score for record in records)


@pytest.fixture(scope="module")
def cheaper(train) -> Path:
    """With a filter that lets everything pass and measures some samples only."""
    return train("cheaper", "mem_filter=inf", "mem_filter_recall=9", max_train_epochs=9)


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "empty.safetensors"
    ConceptSubspace.empty(128).save(path)
    return path


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_settings_that_change_nothing_change_no_bit(plain, unchanged):
    assert same_tensors(plain, unchanged)
    told = header(unchanged)
    assert json.loads(told.pop("unmemorize.filter"))["seen"] == 12
    assert json.loads(told.pop("unmemorize.projection"))["steps"] == 6
    assert told == header(plain) == {"ss_network_module": "networks.lora"}


def test_a_threshold_of_zero_leaves_every_up_factor_at_zero(train, plain):
    nothing, learnt = (load_file(path) for path in (train("zero", "mem_filter=0"), plain))
    for key in (key for key in nothing if "lora_up" in key):
        assert not nothing[key].any()
        assert learnt[key].any()


def test_both_doors_and_the_file_say_the_same(train, plain, middle):
    pairs = (CONCEPT, f"mem_filter={middle:.4f}", "project_cap=4")
    options = dict(pair.split("=") for pair in pairs)
    made = [
        train("loaded", *pairs, "project_force=true", "base_module=networks.lora"),
        train("launched", *pairs, "project_force", launched=True),
        train("file", toml=options | {"project_force": True}, network_module=MODULE),
        train("launched file", launched=True, toml=options | {"project_force": True}),
    ]
    for path in made[1:]:
        assert same_tensors(made[0], path)
        assert header(made[0]) == header(path)
    assert not same_tensors(made[0], plain)
    told = json.loads(header(made[0])["unmemorize.projection"])
    assert (told["modules"], told["steps"], told["rank"], told["accepted"]) == (2, 6, 4, False)
    assert told["residual"] < 1e-6
    between = json.loads(header(made[0].with_name("lora-1.safetensors"))["unmemorize.projection"])
    assert between["steps"] == 2
    counts = json.loads(header(made[0])["unmemorize.filter"])
    assert 0 < counts["flagged"] < counts["seen"] == 12
    ranked = json.loads(made[0].with_name("lora.memorized.json").read_text())
    assert {sample["file"] for sample in ranked["samples"]} == {f"images/{n}.png" for n in range(4)}
    logged = json.loads(made[0].with_name("logs.json").read_text())[-1]
    assert set(logged) == {
        "loss/current", "unmemorize/residual", "unmemorize/filtered_share", "unmemorize/score",
    }  # fmt: skip
    assert logged["unmemorize/filtered_share"] == counts["flagged"] / counts["seen"]


def test_the_cheaper_filter_that_lets_everything_pass_changes_no_bit(train, cheaper):
    assert same_tensors(cheaper, train("plain, longer", max_train_epochs=9))
    told = json.loads(header(cheaper)["unmemorize.filter"])
    assert 0 < told["measured"] < told["seen"] == 36
    records = read_records([cheaper.with_name("lora.memorized.jsonl")])
    assert sum(record.measured for record in records) == told["measured"]
    # Rows of the same batch: one was measured, the other expected.
    pairs = zip(records[::2], records[1::2], strict=True)
    assert any(one.measured != other.measured for one, other in pairs)


def test_the_cheaper_filter_measures_what_the_full_one_does(train, cheaper):
    full = train("full", "mem_filter=inf", max_train_epochs=9)
    pairs = zip(
        *(read_records([path.with_name("lora.memorized.jsonl")]) for path in (full, cheaper)),
        strict=True,
    )
    for one, other in pairs:
        assert (one.sample, one.timestep) == (other.sample, other.timestep)
        if other.measured:
            assert other.score == pytest.approx(one.score, rel=1e-4)


@pytest.mark.parametrize("cheaper", [(), ("mem_filter_recall=3",)])
def test_resumed_is_as_if_never_interrupted(train, middle, cheaper):
    pairs = (CONCEPT, "project_force=true", f"mem_filter={middle:.4f}", *cheaper)
    whole = train(f"whole{len(cheaper)}", *pairs)
    again = train(f"again{len(cheaper)}", *pairs, resume=str(whole.with_name("1")))
    assert same_tensors(whole, again)
    assert header(whole) == header(again)


def test_a_lora_that_is_trained_on_is_projected_first(train, plain):
    path = train(
        "on", CONCEPT, "project_force=1", network_weights=str(plain), dim_from_weights=True
    )
    assert json.loads(header(path)["unmemorize.projection"])["residual"] < 1e-6


def test_layers_are_kept_off_their_own_subspaces(train, plain, empty, tmp_path):
    basis = torch.linalg.qr(torch.eye(4, 2, dtype=torch.float64) + 0.3).Q
    held = {"attn1.to_q": basis, "mid_block.attentions.0.proj_in": basis}
    # The little network's own names, as its LoRA has them, and one layer that it lacks.
    held = {name.replace("attn1.", "attn1_"): value for name, value in held.items()}
    LayerSubspaces(bases=held).save(tmp_path / "layers.safetensors")
    options = (f"project_layers={tmp_path / 'layers.safetensors'}", f"project_concepts={empty}")
    path = train("layers", *options)
    key = "lora_unet_attn1_to_q.lora_down.weight"
    shares = [
        float((down.double() @ basis).norm() / down.double().norm())
        for down in (load_file(path)[key], load_file(plain)[key])
    ]
    assert shares[0] < 1e-6
    assert shares[1] > 0.1
    told = json.loads(header(path)["unmemorize.projection"])
    assert (told["layers"]["count"], told["modules"], told["steps"]) == (1, 3, 6)
    launched = train("layers, launched", *options, launched=True)
    assert same_tensors(path, launched)
    said = train("layers alone", options[0], fails=True)
    assert "2 of the LoRA's 3 layers have no subspace: lora_unet_attn2_to_k" in said


def test_no_metadata_is_none_of_ours(train):
    path = train("silent", "mem_filter=inf", no_metadata=True)
    assert header(path) == {"ss_network_module": "networks.lora"}


@pytest.mark.parametrize(
    ("pairs", "changed", "message"),
    [
        ((CONCEPT,), {"save_model_as": "ckpt"}, "use --save_model_as safetensors"),
        (("mem_filter=1",), {"deepspeed": True}, "leave out --deepspeed"),
        (
            (f"project_layers={__file__}", "project_regions=true"),
            {},
            "project_regions needs sd-scripts from v0.10 on",
        ),
        (("project_concept=sushi",), {}, "`project_concept` is not an option"),
        (("mem_fliter=x1.5",), {}, "`mem_fliter` is not an option; type mem_filter"),
        ((), {"network_module": MODULE}, "is asked for nothing"),
        ((), {"toml": "[a.b]\nmem_filter = 1", "network_module": MODULE}, "stands in `b`"),
        ((), {"toml": "mem_fliter = 1", "network_module": MODULE}, "type mem_filter"),
        ((CONCEPT,), {}, "or force it"),
    ],
)
def test_what_is_not_supported_is_refused(train, pairs, changed, message):
    assert message in train("refused", *pairs, fails=True, **changed)


@pytest.mark.parametrize(
    ("pairs", "changed", "message"),
    [
        ((CONCEPT,), {"network_module": "networks.dylora"}, "use networks.lora"),
        ((CONCEPT,), {"toml": 'network_args = ["algo=ia3"]'}, "ia3 has no factor"),
        ((CONCEPT,), {"toml": 'network_args = ["dora_wd=True"]'}, "leave out dora_wd"),
        (("mem_fliter=1",), {}, "type mem_filter"),
        (("mem_filter=q95",), {}, "--mem_filter"),
        ((), {"toml": "[a.b]\nmem_filter = 1"}, "stands in `b`"),
        ((), {"toml": 'network_args = ["mem_filter"]'}, "`mem_filter` is no key=value"),
        ((), {}, "is asked for nothing"),
        ((f"project_concepts={__file__[:-3]}.safetensors",), {}, "there is no file"),
    ],
)
def test_the_launcher_refuses_before_a_model_is_loaded(train, pairs, changed, message):
    said = train("early", *pairs, launched=True, fails=True, **changed)
    assert message in said
    assert "Loading weights" not in said


def test_options_among_the_network_arguments_are_not_lost_by_the_launcher(train, plain):
    path = train("among", launched=True, toml={"network_args": ["mem_filter=0"]})
    assert not any(v.any() for k, v in load_file(path).items() if "lora_up" in k)
    assert header(path)["ss_network_module"] == "networks.lora"


def test_what_a_window_chose_is_kept(train, scripts):
    """kohya_ss writes its choices to the file; additional parameters replace them."""
    shutil.copy(scripts / "networks" / "lora.py", scripts / "networks" / "chosen.py")
    chosen = {"network_module": "networks.chosen", "network_args": ["dropout=0.25"]}
    window = train("window", toml=chosen, network_module=None)
    path = train("protected window", "mem_filter=inf", toml=chosen)
    assert same_tensors(window, path)
    told = header(path)
    assert json.loads(told.pop("unmemorize.filter"))["seen"] == 12
    assert told == header(window)
    assert (told["ss_network_module"], told["ss_network_args"]) == (
        "networks.chosen", '{"dropout": "0.25"}',
    )  # fmt: skip


def altered(scripts: Path, tmp_path: Path, line: str, replacement: str) -> Path:
    """Return a copy of the scripts with another line in its place."""
    folder = tmp_path / "scripts"
    shutil.copytree(scripts, folder)
    path = folder / "train_network.py"
    source = path.read_text("utf-8")
    assert line in source
    path.write_text(source.replace(line, replacement), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("line", "replacement", "pair", "message"),
    [
        ("def all_reduce_network(", "def reduce_network(", "mem_filter=inf",
         "NetworkTrainer has no all_reduce_network"),
        ("noisy_latents, timesteps, text_conds", "noisy_latents, timesteps, conds",
         "mem_filter=inf", "call_unet(text_conds)"),
        ('batch["loss_weights"]', 'batch.get("loss_weights")', "mem_filter=inf",
         "does not read"),
        ("train(", "start(", "mem_filter=inf", "is made by `train` of sd-scripts"),
        ("optimizer.step()", "pass", CONCEPT, "No optimizer step was projected"),
        ("pred = self.call_unet(", "pred = self.predict(", "mem_filter=inf", "does not read"),
        ("accelerator.unwrap_model(network).prepare_grad_etc(text_encoder, unet)", "pass", CONCEPT,
         "never given to the projection. The training ends before its first step"),
        ("accelerator.unwrap_model(network).on_epoch_start(text_encoder, unet)", "pass", CONCEPT,
         "never given to the projection. The training ends before its first step"),
    ],
)  # fmt: skip
def test_another_version_is_refused_and_one_that_never_steps_fails(
    train, scripts, tmp_path, line, replacement, pair, message
):
    folder = altered(scripts, tmp_path, line, replacement)
    pairs = (pair, "project_force=true") if pair == CONCEPT else (pair,)
    assert message in train("other", *pairs, fails=True, folder=folder)


READING = "train_util.read_config_from_file(parser.parse_args(), parser)"


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (READING, "parser.parse_args()", "never called read_config_from_file"),
        ("importlib.import_module(args.network_module)", "importlib.import_module('networks.lora')",
         "made no network"),
        ("set_seed(args.seed)", "return", "made no network"),
        ("        save_model(args.output_name)", "        save_model('other')", "without saving"),
        ("class NetworkTrainer:", "class Other:", "trains no network"),
    ],
)  # fmt: skip
def test_the_launcher_notices_that_nothing_was_protected(
    train, scripts, tmp_path, line, replacement, message
):
    folder = altered(scripts, tmp_path, line, replacement)
    said = train(f"renamed {message}", "mem_filter=inf", launched=True, fails=True, folder=folder)
    assert message in said


def test_arguments_may_be_read_by_a_module_of_their_own(train, scripts, tmp_path):
    """Since v0.11 `library.args` reads them, and `train_util` only names its function again."""
    folder = tmp_path / "scripts"
    shutil.copytree(scripts, folder)
    (folder / "library" / "train_util.py").rename(folder / "library" / "args.py")
    (folder / "library" / "train_util.py").write_text(
        "from library.args import read_config_from_file"
    )
    path = folder / "train_network.py"
    source = path.read_text("utf-8").replace("train_util", "args as args_util", 1)
    path.write_text(source.replace("train_util.", "args_util."), "utf-8")
    nothing = load_file(train("v0.11", "mem_filter=0", launched=True, folder=folder))
    assert not any(nothing[key].any() for key in nothing if "lora_up" in key)


def test_help_needs_no_sd_scripts(run_python, tmp_path):
    shown = " ".join(run_python("-m", MODULE, "--help", cwd=tmp_path).stdout.split())
    assert all(f"--{name}" in shown for name in NAMES)
    assert "typed in the folder of sd-scripts" in shown


@pytest.mark.parametrize("script", [(), ("train_network.py",)])
def test_another_folder_is_said_to_be_one(run_python, tmp_path, script):
    done = run_python("-m", MODULE, *script, "--mem_filter", "1", check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "Type: cd sd-scripts" in done.stderr
    (tmp_path / "train_network.py").write_text("")
    done = run_python("-m", MODULE, "train_network.py", check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "no folder of a supported sd-scripts" in done.stderr
    assert "Traceback" not in done.stderr
