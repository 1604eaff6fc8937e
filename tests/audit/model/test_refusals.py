"""What an audit refuses, before any work and without leaving anything behind."""

import dataclasses
import shutil

import pytest
from unmemorize import demo
from unmemorize.audit.common.job import FolderTaken
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.model.parts import make_calibration
from unmemorize.audit.model.run import run_audit
from unmemorize.shared.files.prompts import PromptError
from unmemorize.shared.files.storage import StorageError
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.rates import NotEnoughControls


@pytest.mark.parametrize(
    "change",
    [
        {"false_positive_rate": 0.5}, {"sample": 2}, {"detection": DetectionConfig(seeds=(0, 2))},
        {"images_per_prompt": 1}, {"dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
def test_another_job_in_the_folder_is_refused(change, result, config, work):
    before = (config.output / "results.jsonl").read_bytes()
    with pytest.raises(FolderTaken, match=r"holds another audit .*another --output.*--overwrite"):
        run_audit(dataclasses.replace(config, **change))
    assert (config.output / "results.jsonl").read_bytes() == before
    assert work["loads"] == 0


def test_a_folder_with_other_files_is_refused_before_any_work(config, work, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderTaken, match=r"'thesis.tex'.*--overwrite"):
        run_audit(dataclasses.replace(config, output=tmp_path))
    assert work["loads"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(config, work, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be written"):
            run_audit(dataclasses.replace(config, output=output))
    assert work["loads"] == 0


def test_a_model_that_cannot_be_loaded_leaves_no_folder(config, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        run_audit(
            dataclasses.replace(config, model=str(tmp_path / "none"), output=tmp_path / "out")
        )
    broken = tmp_path / "broken"
    shutil.copytree(demo.MODEL, broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="safetensors"):
        run_audit(dataclasses.replace(config, model=str(broken), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_too_few_controls_and_no_prompts_are_said(config, tmp_path):
    with pytest.raises(NotEnoughControls, match="not enough controls"):
        run_audit(dataclasses.replace(config, false_positive_rate=0.01, output=tmp_path / "a"))
    with pytest.raises(ValueError, match=r"No prompts were named.*--prompts"):
        run_audit(dataclasses.replace(config, prompts=(), output=tmp_path / "b"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(PromptError, match="holds no prompts"):
        run_audit(dataclasses.replace(config, prompts=(tmp_path / "empty.txt",)))


def test_what_cannot_work_claims_no_folder(result, config, tmp_path, work):
    """After an error that names an option, the command with that option must run."""
    output = tmp_path / "out"
    with pytest.raises(NotEnoughControls):
        run_audit(dataclasses.replace(config, false_positive_rate=0.01, output=output))
    assert not output.exists()
    assert work["rows"] == 0


@pytest.mark.parametrize(
    ("rate", "collapse", "message"),
    [(0.01, False, "at least 99 different controls, found 30"),
     (0.1, True, "a second stage needs at least 39 controls, found 30")],
)  # fmt: skip
def test_too_few_controls_are_told_before_a_model_is_loaded(tmp_path, rate, collapse, message):
    (tmp_path / "controls.txt").write_text("\n".join(f"a prompt {i}" for i in range(30)), "utf-8")
    with pytest.raises(NotEnoughControls, match=message):
        make_calibration(
            Subject(str(tmp_path / "no model")), controls=str(tmp_path / "controls.txt"),
            config=DetectionConfig(), rate=rate, score=None, collapse=collapse,
            output=tmp_path / "c.json", bars=silent,
        )  # fmt: skip
