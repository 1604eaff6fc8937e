"""No verdict without the words of the training: refused before anything is drawn, or doubted."""

import numpy as np
import pytest
from needs import need_package, need_sscd
from PIL import Image
from small_audit import example_lora
from test_lora_asking import training_set
from typer.testing import CliRunner
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.header import Folder, Header
from unmemorize.audit.lora.remarks import unknown_captions
from unmemorize.audit.lora.run import run_lora_audit
from unmemorize.cli import app
from unmemorize.shared.files.prompts import PromptError
from unmemorize.shared.models.adapter import PipelineDenoiser

need_package("faiss")
need_package("peft")


@pytest.fixture
def folder(tmp_path):
    """Twelve images without captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for place in range(12):
        cells = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        cells.resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{place:02d}.png")
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing would fail."""
    need_sscd()

    def generate(*args, **kwargs):
        raise AssertionError("something was drawn")

    monkeypatch.setattr(PipelineDenoiser, "generate", generate)


def config(root, folder, **settings) -> LoraAuditConfig:
    return LoraAuditConfig(lora=example_lora(root), images=folder, output=folder.parent / "out",
                           device="cpu", generation_steps=1, **settings)  # fmt: skip


def test_without_captions_trigger_or_header_it_is_refused_before_drawing(root, folder, undrawn):
    with pytest.raises(PromptError, match="None of the 12 images has a caption") as told:
        run_lora_audit(config(root, folder))
    for remedy in ("caption files", "--instance-prompt", "--trigger"):
        assert remedy in str(told.value)
    with pytest.raises(AssertionError, match="something was drawn"):
        run_lora_audit(config(root, folder, instance_prompt="a photo of zorp"))


def test_trained_words_that_nobody_gave_are_wrong_usage():
    """An option is missing: 2, as for any other."""
    from unmemorize.audit.lora.training_set import TrainedWordsUnknown
    from unmemorize.cli.common.terminal import WRONG_USAGE, exit_code_of

    assert exit_code_of(TrainedWordsUnknown("give --trigger")) == WRONG_USAGE


def test_the_command_refuses_too(root, folder, undrawn):
    asked = ["audit", "demo", "--lora", str(example_lora(root)), "--images", str(folder),
             "--output", str(folder.parent / "other")]  # fmt: skip
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 2
    assert "--instance-prompt" in told.output


def test_too_few_images_are_refused_before_drawing(root, folder, undrawn, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    (folder / "00.png").rename(few / "00.png")
    with pytest.raises(PromptError, match="Nothing was drawn, since 16 controls"):
        run_lora_audit(config(root, few, trigger="zorp", images_per_prompt=2))


def test_captions_that_hold_nothing_the_header_counts_are_noticed():
    header = Header(folders={"1_x": Folder(repeats=1, images=3)},
                    tags={"1_x": {"zorp": 3, "a red tree": 1}})  # fmt: skip
    assert unknown_captions(header, training_set(["Zorp, b", "a red tree", "photo 3"])) == (2,)
    assert unknown_captions(header, training_set(["a red tree", ""])) == ()
    assert unknown_captions(Header(), training_set(["a"])) is None


def test_the_header_may_name_the_words(root, folder):
    from unmemorize.audit.lora.training_set import read_training_set

    header = Header(folders={"1_x": Folder(repeats=1, images=12)}, tags={"1_x": {"zorp": 12}})
    training = read_training_set(folder, header)
    assert {image.caption for image in training.images} == {"zorp"}


def test_the_model_is_not_needed_to_refuse(root, folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(Subject, "denoiser", property(lambda self: loaded.append(1)))
    with pytest.raises(PromptError):
        run_lora_audit(config(root, folder))
    assert not loaded
