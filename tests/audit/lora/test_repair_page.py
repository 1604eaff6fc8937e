"""The page of a repair: before and after, nothing foreign runs, training images only with leave."""

import json
from dataclasses import replace

import pytest
from needs import need_package
from some_audit import HOSTILE, drawings, make_audit
from unmemorize.audit.common.pages import image_uri
from unmemorize.audit.lora.page_images import LARGE
from unmemorize.audit.lora.repair.page import DOCUMENT, PAGE, tell, trial_chart
from unmemorize.audit.lora.repair.result import Pictured, Repair, Trial, back, rate_of

need_package("jinja2")


def trial(method: str, left: float, backs: int, kept: float) -> Trial:
    hits = rate_of([place < backs for place in range(3)])
    return Trial(method=method, left=left, back=hits, images=hits, kept=kept)


@pytest.fixture
def repair(tmp_path) -> Repair:
    before = make_audit(tmp_path / "before", epochs=False)
    after = make_audit(tmp_path / "after", reproduced=0, epochs=False)
    for name in ("base", "lora", "repaired"):
        drawings()[0][1].save(tmp_path / f"{name}.png")
    trials = (
        trial("strength", 0.0, 0, 0.0), trial("strength", 0.5, 1, 0.52),
        trial("strength", 0.25, 0, 0.24), trial("distillation", 0.0, 0, 0.91),
    )  # fmt: skip
    return Repair(
        before=before, after=after, trials=trials, chosen=trials[-1], held=9, measured=8,
        likeness=0.9, likeness_base=0.3, output=tmp_path / "repaired.safetensors",
        sha256="ef" * 32, folder=tmp_path,
        pictured=(Pictured(prompt="zyx in the sea", base="base.png", lora="lora.png",
                           repaired="repaired.png"),),
    )  # fmt: skip


def test_page_and_document_say_what_came_back_and_what_was_kept(repair):
    tell(repair, include_images=False)
    page = (repair.folder / PAGE).read_text("utf-8")
    assert "3 of 8 training images came back; after the repair none come back as a copy" in page
    assert "91\u00a0% of what the LoRA does to other prompts is kept" in page
    assert page.count("after, same words and seed") == 2 * 3  # caption and alternative text
    assert "zyx in the sea" in page
    document = json.loads((repair.folder / DOCUMENT).read_text("utf-8"))
    assert document["back"] == {"before": [i.name for i in repair.before.training.images[:3]],
                                "after": []}  # fmt: skip
    assert document["by_words"]["its caption"]["before"]["count"] == 2 * 3
    assert document["by_words"]["its caption"]["after"]["count"] == 0
    assert document["chosen"]["method"] == "distillation"
    assert str(repair.folder) not in json.dumps(document)


def test_the_best_of_each_method_gives_nothing_back(repair):
    assert {name: best.kept for name, best in repair.best_of.items()} == {
        "strength": 0.24, "distillation": 0.91,
    }  # fmt: skip
    assert back(repair.after) == []


def test_training_images_are_shown_only_with_leave(repair):
    image = drawings()[0][1].copy()
    image.thumbnail((LARGE, LARGE))
    whole = image_uri(image.convert("RGB"), quality=85)
    for leave in (False, True):
        tell(repair, include_images=leave)
        assert (whole in (repair.folder / PAGE).read_text("utf-8")) is leave


def test_what_others_wrote_stays_text(repair, tmp_path):
    hostile = make_audit(tmp_path / "hostile", epochs=False, text=HOSTILE)
    tell(replace(repair, before=hostile, pictured=(replace(repair.pictured[0], prompt=HOSTILE),),
                 after=make_audit(tmp_path / "done", reproduced=0, epochs=False, text=HOSTILE)),
         include_images=False)  # fmt: skip
    page = (repair.folder / PAGE).read_text("utf-8")
    assert "<img src=x" not in page
    assert "<script" not in page
    assert "script-src 'none'" in page


def test_an_audit_that_gives_no_verdict_of_none_is_not_called_clear(repair):
    assert repair.clear
    doubtful = replace(repair, after=replace(
        repair.after, headline=replace(repair.after.headline, given=False)))  # fmt: skip
    assert not doubtful.clear
    tell(doubtful, include_images=False)
    assert "This is no verdict of none." in (repair.folder / PAGE).read_text("utf-8")


def test_the_chart_marks_what_was_chosen(repair):
    other = replace(repair, chosen=repair.trials[2])
    assert trial_chart(repair, width=720).tobytes() != trial_chart(other, width=720).tobytes()
