"""What cannot be protected is refused before the first step; what was not done is not passed."""

import pytest
import tiny
import tiny_families
import torch
from diffusers_runs import SCRIPT, run
from torch.optim.optimizer import register_optimizer_step_post_hook
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.projection.projection import Projection
from unmemorize.shared.training.protection import ProtectionFailed
from unmemorize.trainer_patch.diffusers.loop import faults_of
from unmemorize.trainer_patch.options import OptionError, settings_from


@pytest.fixture
def refused(images, tmp_path, monkeypatch):
    """Function that returns why a training is refused; no step may have been done."""

    def step(*_, **__):
        pytest.fail("a step was done")

    def reason(*arguments, error=UnsupportedTraining):
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(error) as caught:
            run(tmp_path / "out", ["--train_data_dir", str(images), *arguments])
        return str(caught.value)

    return reason


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
def test_layers_that_read_text_through_a_projection_are_refused(tmp_path):
    """Sana's have the names of Stable Diffusion's, and states of another kind."""
    from peft import LoraConfig

    ConceptSubspace.empty(4).save(tmp_path / "subspace.safetensors")
    asked = settings_from({"project_concepts": str(tmp_path / "subspace.safetensors")})
    for pipeline, told in ((tiny_families.sana(), True), (tiny.PIPELINES["sd1"](), False)):
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        network.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
        faults = " ".join(faults_of(network, asked))
        assert ("read text through a projection of its own" in faults) == told
        assert bool(faults) == told


@pytest.mark.parametrize("method", ["mem_filter", "project_concepts"])
def test_trained_text_encoder(refused, subspace, method):
    value = {"mem_filter": "inf", "project_concepts": str(subspace)}[method]
    assert "--train_text_encoder" in refused(f"--{method}", value, "--train_text_encoder")


def test_dora(refused, subspace):
    assert "DoRA" in refused("--project_concepts", str(subspace), "--use_dora")


def test_lora_that_reads_no_text(refused, subspace):
    reason = refused("--project_concepts", str(subspace), "--lora_layers", "ff.net.0.proj")
    assert "No LoRA reads the text" in reason


def test_option_that_cannot_be_understood(refused):
    assert "--mem_filter" in refused("--mem_filter", "much", error=OptionError)


def test_script_that_never_steps(images, tmp_path, subspace):
    with pytest.raises(ProtectionFailed, match="No optimizer step"):
        run(tmp_path / "out", ["--train_data_dir", str(images), "--never_step",
                               "--project_concepts", str(subspace)])  # fmt: skip


def test_projection_that_does_nothing(images, tmp_path, subspace, monkeypatch):
    monkeypatch.setattr(Projection, "project_weights", lambda self: None)
    with pytest.raises(RuntimeError, match="reach into the prohibited subspace"):
        run(tmp_path / "out", ["--train_data_dir", str(images),
                               "--project_concepts", str(subspace)])  # fmt: skip


def test_script_without_a_lora(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.read_text("utf-8").split("    accelerator = ")[0] + "\n\nmain()\n", "utf-8"
    )
    given = ["--train_data_dir", str(tmp_path), "--mem_filter", "inf"]
    with pytest.raises(HookMissing, match="never gave a LoRA"):
        run(tmp_path / "out", given, script=script)
    off = [*given[:2], "--mem_filter", "off"]
    run(tmp_path / "out", off, script=script)  # nothing was asked for: nothing is missing
    with pytest.raises(OptionError, match="is asked for nothing"):
        run(tmp_path / "out", given[:2], script=script)


PREPARED = "accelerator.prepare(unet, optimizer, loader)"
ONE_BY_ONE = """(accelerator.prepare_model(unet), accelerator.prepare_optimizer(optimizer),
        accelerator.prepare_data_loader(loader))"""


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        ("parser.parse_args()", "parser.parse_known_args()[0]", "never called parse_args"),
        (PREPARED, ONE_BY_ONE, "never gave a LoRA of diffusers to accelerate"),
    ],
)
def test_a_script_that_never_calls_a_hook_ends_before_its_first_step(
    images, tmp_path, line, replacement, message
):
    source = SCRIPT.read_text("utf-8")
    assert line in source
    script = tmp_path / "script.py"
    script.write_text(source.replace(line, replacement), "utf-8")
    steps = []
    counting = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    with pytest.raises(HookMissing, match=message):
        run(tmp_path / "out", ["--train_data_dir", str(images), "--mem_filter", "inf"],
            script=script)  # fmt: skip
    counting.remove()
    assert not steps
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_key_nearly_like_an_option_is_refused_with_the_option(refused):
    said = refused("--mem_fliter", "inf", error=OptionError)
    assert "`mem_fliter` is not an option; type mem_filter" in said


def test_a_refusal_is_one_line(run_python, images, tmp_path):
    done = run_python(
        "-m", "unmemorize.trainer_patch.diffusers", str(SCRIPT), "--output_dir", str(tmp_path),
        "--pretrained_model_name_or_path", "none", "--train_data_dir", str(images),
        "--mem_filter", "much", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("unmemorize: --mem_filter cannot be 'much'")
    assert "Traceback" not in done.stderr


def test_hooks_are_taken_off_again(images, tmp_path):
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderShard
    from diffusers.loaders.lora_base import LoraBaseMixin
    from diffusers.loaders.peft import PeftAdapterMixin

    owners = (Accelerator, DataLoaderShard, LoraBaseMixin, PeftAdapterMixin)
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(OptionError):
        run(tmp_path / "out", ["--train_data_dir", str(images), "--mem_filter", "x"])
    assert [dict(vars(owner)) for owner in owners] == before


def test_missing_script(monkeypatch):
    with pytest.raises(SystemExit, match="examples/text_to_image"):
        run(SCRIPT.parent, [], script=SCRIPT.with_name("gone.py"))


def test_help_works_without_a_script(run_python):
    done = run_python("-m", "unmemorize.trainer_patch.diffusers", "--help")
    assert "--project_concepts" in done.stdout
    assert "--mem_filter" in done.stdout
