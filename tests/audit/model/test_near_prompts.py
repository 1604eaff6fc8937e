"""Near prompts of a job: what is measured for them, kept, and said where it cannot be told."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jsonschema
import pytest
from scripted import ScriptedDenoiser, noise
from tiny_audit import lines, schema
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.result import ModelInfo
from unmemorize.audit.common.subject import Facts, Subject
from unmemorize.audit.model import run
from unmemorize.audit.model.comparison import Comparison
from unmemorize.audit.model.families import Related, relate
from unmemorize.audit.model.images import Sampled
from unmemorize.audit.model.result import NearestImage
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.files.tensors import TensorFolder
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import control_differences, detect

CONFIG = DetectionConfig(seeds=(3, 4), schedule_steps=5)
TOLD = (2, 4)

FOX, HEN = noise(1)[0], noise(2)[0]
ADDED = {
    "a red fox on green grass": 5 * FOX + noise(11)[0],
    "a red fox on blue grass": 3 * FOX + noise(12)[0],  # its image, another word
    "a red hen on green grass": 5 * HEN + noise(13)[0],  # its words, another image
    "portrait with pearls": 4 * FOX + noise(14)[0],  # its image, no word of it
    "a castle": 5 * noise(3)[0],
    "a red fox on green sand": 5 * FOX,  # not flagged
}
PROMPTS = tuple(ADDED)
SCORES = {0: 9.0, 1: 5.0, 2: 8.0, 3: 7.0, 4: 6.0}


@pytest.fixture(scope="module")
def judge() -> Calibration:
    """A calibration from 60 controls."""
    controls = {f"control {k}": row for k, row in enumerate(noise(5, 60))}
    denoiser = ScriptedDenoiser(controls)
    magnitudes = Calibration.from_controls(
        detect(denoiser, [*controls], CONFIG), model="", settings=settings_of(denoiser, CONFIG),
        name="", false_positive_rate=0.05,
    )  # fmt: skip
    differences = control_differences(denoiser, [*controls], CONFIG, TOLD)
    return magnitudes.with_residual(differences, settings_of(denoiser, CONFIG, TOLD)).judge


@pytest.fixture
def job(tmp_path, judge):
    """Function that relates the prompts above, in a folder of its own; and the denoiser."""
    subject, denoiser = Subject(), ScriptedDenoiser(ADDED)
    vars(subject)["denoiser"] = denoiser  # as if it were loaded
    info = ModelInfo(
        name="m", fingerprint="", lora=None, parametrization="epsilon", dtype="float32",
        device="cpu", latent_shape=ScriptedDenoiser.latent_shape, guidance_distilled=False,
    )  # fmt: skip

    def related(judge=judge, scores=SCORES) -> Related:
        return relate(
            subject, Facts(info=info, settings={}, residual={}, rows=2, caveats=()), PROMPTS,
            scores, CONFIG, Journal(tmp_path / "families.jsonl"), judge=judge, job_key="key",
            folder=tmp_path / "families", bars=silent,
        )  # fmt: skip

    return SimpleNamespace(related=related, denoiser=denoiser, folder=tmp_path)


def test_words_and_image_make_a_family_neither_alone(job):
    related = job.related()
    assert list(related.cosines) == [(0, 1)]
    near = related.near()
    assert list(near) == [1]
    assert (near[1].index, near[1].prompt) == (0, PROMPTS[0])
    assert near[1].overlap == pytest.approx(5 / 7)
    assert near[1].cosine == related.cosines[0, 1] > 0.8
    assert related.near({1})[0].index == 1  # the other's own image came back
    assert related.near({0, 1}) == {}
    assert related.caveats == ()


def test_only_flagged_prompts_that_share_words_are_predicted_again(job):
    job.related()
    assert job.denoiser.rows == 3 + 1  # three prompts at one seed, and the empty one
    apart = job.related(scores={3: 9.0, 4: 8.0})
    assert apart.cosines == {}
    assert apart.caveats == ()
    assert job.denoiser.rows == 4


def test_a_continued_job_predicts_nothing_again(job, monkeypatch):
    put, kept = TensorFolder.put, []

    def stopped(folder, number, tensor):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(number)
        put(folder, number, tensor)

    monkeypatch.setattr(TensorFolder, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        job.related()
    monkeypatch.setattr(TensorFolder, "put", lambda *a: kept.append(a[1]) or put(*a))
    first = job.related()
    assert kept == [0, 1, 2]
    assert not (job.folder / "families").exists()
    rows = job.denoiser.rows
    assert job.related() == first
    assert job.denoiser.rows == rows
    assert job.related(scores=SCORES | {5: 8.5}) != first  # other flags, other pairs


def test_where_it_cannot_be_told_a_caveat_says_what_it_takes(job, judge):
    for short in (
        dataclasses.replace(judge, family_cosine=None),
        dataclasses.replace(judge, family_cosine=None, basis=None),
    ):
        related = job.related(short)
        assert related.near() == {}
        (caveat,) = related.caveats
        assert caveat.startswith("3 flagged prompts share at least half of their words")
        assert "at least 50 controls" in caveat
        assert job.related(short, {3: 9.0}).caveats == ()
    assert job.denoiser.rows == 0


def test_a_copy_of_its_own_image_alone_confirms_a_prompt():
    def image(**change) -> NearestImage:
        values = {"path": "t.png", "caption": "c", "similarity": 0.9, "ratio": 0.2,
                  "own_ratio": 0.2, "is_own": True, "copied": True}  # fmt: skip
        return NearestImage(**values | change)

    plan = [Sampled(index=i, prompt="c", seeds=(0, 1)) for i in range(5)]
    nearest = {
        "images/00000-seed1.png": image(),
        "images/00001-seed0.png": image(copied=False),
        "images/00002-seed0.png": image(copied=None),
        "images/00003-seed0.png": image(is_own=False),  # a copy of another one's
    }
    assert Comparison(nearest=nearest, summary=None).own_copied(plan) == {0}


def test_an_audit_names_its_near_prompts_and_still_flags_them(
    result, config, work, tmp_path, monkeypatch
):
    """The same finished audit, of which two flagged prompts are said to be related."""
    first, second = result.flagged[:2]
    pair = tuple(sorted((first.index, second.index)))
    prompts = tuple(entry.prompt for entry in result.entries)

    def said(subject, facts, given, scores, *args, **kwargs) -> Related:
        assert tuple(given) == prompts
        assert [*scores] == [entry.index for entry in result.flagged]
        return Related(prompts=prompts, scores=scores, cosines={pair: 0.875}, caveats=("a caveat",))

    monkeypatch.setattr(run, "relate", said)
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    again = run.run_audit(dataclasses.replace(config, output=output))
    assert work["rows"] == 0
    for entry, before in zip(again.entries, result.entries, strict=True):
        assert dataclasses.replace(entry, near=None) == before
        assert (entry.near is not None) == (entry.index == second.index)
    line = lines(output)[second.index]
    # These two share no words, which a line would never say of a real pair.
    jsonschema.validate(line | {"near": line["near"] | {"overlap": 0.5}}, schema("results"))
    assert line["memorized"]
    assert line["near"]["index"] == first.index
    assert line["near"]["prompt"] == first.prompt
    assert line["near"]["cosine"] == 0.875
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    jsonschema.validate(summary, schema("summary"))
    assert summary["counts"]["near"] == summary["near_rate"]["hits"] == 1
    assert summary["counts"]["flagged"] == len(result.flagged)
    assert summary["flagged_rate"] == result.summary["flagged_rate"]
    assert "a caveat" in summary["caveats"]
    assert [entry.index for entry in again.families][:2] == [first.index, second.index]
    assert "near a memorized one" in (output / "report.html").read_text("utf-8")
