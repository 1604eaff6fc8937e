"""One's own loop: the example of the documentation as it stands, and what it may not do."""

import json
import re

import pytest
import torch
from demo_subspaces import WIDTH, make_subspace
from diffusers import StableDiffusionPipeline
from diffusers_runs import header_of, records_of, residual, same, weights_of
from peft import LoraConfig
from unmemorize import demo
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import ProtectionFailed
from unmemorize.trainer_patch.diffusers.loop import protect
from unmemorize.trainer_patch.options import OptionError

LORA = "lora/pytorch_lora_weights.safetensors"
OPTION = '    mem_filter="x1.5",\n'


@pytest.fixture
def example(root):
    """The runnable block of the documentation."""
    page = (root / "docs" / "trainers" / "own_loop.md").read_text("utf-8")
    (block,) = re.findall(r"<!-- [^>]*test_diffusers_loop.py. -->\n```python\n(.*?)```", page, re.S)
    assert OPTION in block
    return block


@pytest.fixture
def run_example(example, tmp_path, monkeypatch):
    """Function that runs the example with other options and returns the LoRA's folder."""

    def run(name, options):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        torch.manual_seed(0)
        exec(compile(example.replace(OPTION, options), "docs/trainers/own_loop.md", "exec"), {})
        return tmp_path / name / "lora"

    return run


def test_the_example_runs(run_example):
    output = run_example("as it stands", OPTION)
    assert {record["file"] for record in records_of(output)} == {"apple.png", "car.png"}
    assert json.loads(header_of(output)["unmemorize.filter"])["seen"] == 8


def test_settings_that_change_nothing(run_example, tmp_path):
    empty = make_subspace(tmp_path, WIDTH, rank=0)
    without = weights_of(run_example("nothing", ""))
    nothing = run_example("empty", f'mem_filter="inf", project_concepts={str(empty)!r}')
    assert same(weights_of(nothing), without)
    assert any(value.any() for key, value in without.items() if "lora_B" in key)


def test_projection(run_example, tmp_path):
    subspace = make_subspace(tmp_path, WIDTH)
    output = run_example("projected", f"project_concepts={str(subspace)!r}")
    basis = ConceptSubspace.load(subspace).basis
    assert residual(weights_of(output), basis) < 1e-6


@pytest.fixture
def parts():
    """A pipeline with a LoRA and its optimizer."""
    pipeline = StableDiffusionPipeline.from_pretrained(demo.MODEL)
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]))
    factors = [each for each in pipeline.unet.parameters() if each.requires_grad]
    return pipeline, torch.optim.AdamW(factors)


def test_block_without_a_step_fails(parts, tmp_path):
    subspace = make_subspace(tmp_path, WIDTH)
    with (
        pytest.raises(ProtectionFailed, match="No optimizer step"),
        protect(*parts, output=tmp_path / "lora", project_concepts=str(subspace)),
    ):
        pass


def test_own_error_is_not_hidden(parts, tmp_path):
    pipeline, _ = parts
    with pytest.raises(KeyError), protect(*parts, output=tmp_path / "lora", mem_filter="inf"):
        raise KeyError
    assert not pipeline.unet._forward_hooks
    assert not list(tmp_path.iterdir())


def test_option_that_is_none(parts, tmp_path):
    with (
        pytest.raises(OptionError, match="`memfilter` is not an option"),
        protect(*parts, output=tmp_path / "lora", memfilter="inf"),
    ):
        pass


def test_optimizer_of_something_else(parts, tmp_path):
    pipeline, _ = parts
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    subspace = make_subspace(tmp_path, WIDTH)
    with (
        pytest.raises(UnsupportedTraining, match="No optimizer trains all"),
        protect(pipeline, other, output=tmp_path / "lora", project_concepts=str(subspace)),
    ):
        pass
