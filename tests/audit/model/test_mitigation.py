"""Prompts as they are and mitigated, on the demo model at a few sampling steps."""

import dataclasses
import json
import shutil

import pytest
from PIL import Image, ImageChops
from tiny_audit import MARKUP, lines
from unmemorize.audit.common.result import finite
from unmemorize.audit.model.mitigation import chosen_methods, run_mitigation
from unmemorize.audit.model.mitigation_result import UNMITIGATED, MitigationConfig
from unmemorize.shared.mitigation import DEFAULT, METHODS


@pytest.fixture(scope="module")
def mitigation(config, captions, tmp_path_factory) -> MitigationConfig:
    return MitigationConfig(
        audit=dataclasses.replace(
            config,
            prompts=(),
            output=tmp_path_factory.mktemp("mitigation") / "out",
            false_positive_rate=0.08,
        ),
        texts=(captions["verbatim"][0], captions["held_out"][12], MARKUP),
        methods=(DEFAULT, "random_words"),
        images=1,
    )


@pytest.fixture(scope="module")
def done(mitigation):
    return run_mitigation(mitigation)


def picture(result, image):
    with Image.open(result.folder / image.path) as opened:
        return opened.convert("RGB")


def test_acts_above_the_threshold_and_leaves_the_rest_bit_by_bit(done):
    memorized, ordinary, _ = done.entries
    assert memorized.memorized
    assert not ordinary.memorized
    for entry in done.entries:
        usual = picture(done, entry.trials[0].images[0])
        for trial in entry.trials[1:]:
            difference = ImageChops.difference(usual, picture(done, trial.images[0]))
            assert (difference.getbbox() is not None) == trial.acted
        # The gate decides as the verdict does.
        assert {trial.acted for trial in entry.trials[1:]} == {entry.memorized}
    default = memorized.trials[1]
    assert default.score_after <= done.calibration.judge.threshold < memorized.score
    assert default.change


def test_rewordings_are_verified_and_only_for_what_is_above(done):
    memorized, ordinary, _ = done.entries
    assert any(edit.under_threshold for edit in memorized.rewordings)
    for edit in memorized.rewordings:
        assert edit.under_threshold == (edit.score <= done.calibration.judge.threshold)
    assert ordinary.rewordings == ()


def test_everything_is_written_and_escaped(done):
    folder, summary = done.folder, done.summary
    assert len(lines(folder)) == len(done.entries)
    assert json.loads((folder / "summary.json").read_text("utf-8")) == finite(summary)
    assert set(summary["methods"]) == {UNMITIGATED, DEFAULT, "random_words"}
    assert 1 <= summary["methods"][DEFAULT]["acted_on"] <= 2
    page = (folder / "mitigation.html").read_text("utf-8")
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    with Image.open(folder / "sheets" / "00000.png") as sheet:
        assert sheet.height > 3 * sheet.width  # three ways, one seed


def test_a_finished_job_is_used_again_without_loading_the_model(done, mitigation, work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(done.folder, output)
    audit = dataclasses.replace(mitigation.audit, output=output)
    again = run_mitigation(dataclasses.replace(mitigation, audit=audit))
    assert work == {"loads": 0, "rows": 0, "images": 0}
    assert again.entries == done.entries
    for name in ("results.jsonl", "summary.json", "mitigation.html"):
        assert (output / name).read_bytes() == (done.folder / name).read_bytes()


def test_a_lost_picture_is_drawn_again_and_nothing_else(done, mitigation, work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(done.folder, output)
    (output / done.entries[1].trials[1].images[0].path).unlink()
    audit = dataclasses.replace(mitigation.audit, output=output)
    run_mitigation(dataclasses.replace(mitigation, audit=audit))
    assert work["images"] == 1


def test_methods_by_name():
    assert chosen_methods(()) == (DEFAULT,)
    assert chosen_methods(("random_words", "random_words")) == ("random_words",)
    assert set(chosen_methods(("all",))) == set(METHODS) - {"neighbour"}
    assert set(chosen_methods(("all",), training=True)) == set(METHODS)
    assert chosen_methods(("neighbour",), training=True) == ("neighbour",)
    with pytest.raises(ValueError, match="There is no method 'none'"):
        chosen_methods(("none",))
    with pytest.raises(ValueError, match="give their folder with --training"):
        chosen_methods(("neighbour",))
