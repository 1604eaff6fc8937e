"""An audit that was stopped continues, and nothing is computed twice."""

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from unmemorize.audit.common.measure import SilentBar
from unmemorize.audit.model.run import run_audit
from unmemorize.shared.files.storage import StorageError
from unmemorize.shared.files.tensors import TensorFolder


def test_a_finished_job_is_used_again_without_loading_the_model(result, config, work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    again = run_audit(dataclasses.replace(config, output=output))
    assert work == {"loads": 0, "rows": 0, "images": 0}
    assert again.entries == result.entries
    for name in ("results.jsonl", "report.html", "calibration.json"):
        assert (output / name).read_bytes() == (config.output / name).read_bytes()


@pytest.mark.parametrize("phase", ["detection", "explanations", "images"])
def test_a_torn_job_computes_only_what_is_missing(phase, result, config, work, tmp_path):
    """Cut the last line of one journal in half, as a kill does, and everything after it."""
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    phases = ["detection", "explanations", "images", "similarity"]
    path = output / "journal" / f"{phase}.jsonl"
    content = path.read_bytes()
    lost = content.splitlines(keepends=True)[-1]
    path.write_bytes(content[: -len(lost) // 2])
    for later in phases[phases.index(phase) + 1 :]:
        (output / "journal" / f"{later}.jsonl").unlink()
    again = run_audit(dataclasses.replace(config, output=output))
    assert again.entries == result.entries
    assert (output / "results.jsonl").read_bytes() == (config.output / "results.jsonl").read_bytes()
    keys = [json.loads(line)["key"] for line in path.read_bytes().splitlines()]
    assert len(keys) == len(set(keys)) == content.count(b"\n")
    assert work["loads"] == 1
    if phase == "images":
        assert work["images"] == len(json.loads(lost)["value"]["files"])


def test_controls_of_the_residual_that_were_finished_are_not_measured_again(
    result, config, work, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "journal" / "controls")  # as before the residual's controls were done
    put, kept = TensorFolder.put, []

    def stopped(folder, number, tensor):
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept.append(number)
        put(folder, number, tensor)

    same = dataclasses.replace(config, output=output)
    monkeypatch.setattr(TensorFolder, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_audit(same)
    monkeypatch.setattr(TensorFolder, "put", put)
    again = run_audit(same)
    assert again.calibration == result.calibration
    assert torch.equal(again.calibration.judge.basis.mean, result.calibration.judge.basis.mean)
    basis, whole = (each.calibration.observed.basis for each in (again, result))
    assert torch.equal(basis.directions, whole.directions)
    assert again.entries == result.entries
    for folder in ("first", "differences"):
        assert not (output / "journal" / "controls" / folder).exists()


OPEN = {
    "detection": "4 of 8 prompts have no score yet",
    "explanation": "flagged prompts were not left out yet",
    "images": "of 5 images were not drawn yet",
    "further images": "The magnitudes beside the scores were not measured yet",
    "controls, magnitude": "The magnitudes beside the scores were not measured yet",
}
"""What a page says of a job that was stopped while this bar moved."""


def test_stopped_in_each_phase_it_leaves_a_page_and_ends_with_the_same_bytes(
    result, config, work, tmp_path
):
    output, page = tmp_path / "out", tmp_path / "out" / "report.html"
    small = dataclasses.replace(config.detection, batch_size=4)
    once = dataclasses.replace(config, output=output, detection=small)
    for phase, expected in OPEN.items():

        def stopping(description, total, initial, unit, phase=phase):
            class Bar(SilentBar):
                def update(self, n):
                    if description == phase:
                        raise KeyboardInterrupt

            return Bar()

        pages = []
        with pytest.raises(KeyboardInterrupt):
            run_audit(once, stopping, lambda known, to=pages: to.append(known.open))
        said, text = " ".join(pages[-1]), page.read_text("utf-8")
        assert expected in said
        assert "Not finished." in text
        assert all(sentence in text for sentence in pages[-1])
        assert not (output / "results.jsonl").exists()
    run_audit(once)
    assert "Not finished." not in page.read_text("utf-8")
    whole = dataclasses.replace(once, output=tmp_path / "whole")
    assert run_audit(whole).open == ()
    for name in ("results.jsonl", "report.html", "calibration.json", "calibration.safetensors"):
        assert (output / name).read_bytes() == (whole.output / name).read_bytes()


def test_the_first_page_comes_before_words_and_images(result, known):
    first, *others = known
    assert others == []
    assert [e.memorized for e in first.entries] == [e.memorized for e in result.entries]
    assert {(e.explanation, e.images) for e in first.entries} == {(None, ())}
    assert {e.score for e in first.entries} == {e.score for e in result.entries}
    assert first.open[-1].startswith("All that takes about")
    assert result.open == ()


def test_batch_size_is_no_other_job(result, config, work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    other = dataclasses.replace(config.detection, batch_size=1)
    again = run_audit(dataclasses.replace(config, output=output, detection=other))
    assert again.entries == result.entries
    assert work["rows"] == 0


def test_overwrite_replaces_another_job_and_continues_the_same(result, config, work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    (output / "mine.txt").write_text("keep me")
    other = dataclasses.replace(
        config, output=output, images_per_prompt=0, explain=0, overwrite=True
    )
    assert run_audit(other).summary["counts"]["images"] == 0
    assert (output / "mine.txt").read_text() == "keep me"
    assert not (output / "images").exists()
    assert work["rows"] > 0
    work["rows"] = 0
    run_audit(other)
    assert work["rows"] == 0


def test_no_space_left_keeps_what_was_computed(config, result, work, tmp_path, monkeypatch):
    output, replace = tmp_path / "out", os.replace

    def full(part, path):
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(part, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"No space left to write .*run the same command again"):
        run_audit(dataclasses.replace(config, output=output))
    monkeypatch.setattr(os, "replace", replace)
    rows, images = work["rows"], work["images"]
    assert images == 3  # the first of each prompt: they could not be written
    again = run_audit(dataclasses.replace(config, output=output))
    assert again.entries == result.entries
    assert work["images"] - images == result.summary["counts"]["images"]
    whole = work["rows"]  # the pipeline's own call is not counted there
    run_audit(dataclasses.replace(config, output=tmp_path / "fresh"))
    assert rows < whole == work["rows"] - whole  # nothing was computed twice
