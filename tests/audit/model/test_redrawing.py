"""What an audit says of images drawn without a word: gone, back, or another one."""

from functools import cache
from types import SimpleNamespace

import pytest
from PIL import Image
from unmemorize.audit.common.job import Job
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.model import redrawing
from unmemorize.audit.model.comparison import Comparison
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.images import Sampled
from unmemorize.audit.model.inputs import Inputs
from unmemorize.audit.model.result import NearestImage
from unmemorize.audit.model.work import Work
from unmemorize.shared.files.prompts import PromptSet

PROMPT = "an old red fox"
PLAN = [Sampled(index=3, prompt=PROMPT, seeds=(5, 7)), Sampled(index=4, prompt="a cat", seeds=(5,))]


def nearest(path: str = "training-1.png", caption: str = "fox", copied: bool | None = True):
    return NearestImage(path=path, caption=caption, similarity=0.9, ratio=0.2, own_ratio=0.2,
                        is_own=True, copied=copied)  # fmt: skip


def explained(words: list[str], falls: list[float]) -> dict:
    occlusions = [
        {"word": word, "index": index, "score_before": 9.0, "score_after": 9.0 - fall}
        for index, (word, fall) in enumerate(zip(words, falls, strict=True))
    ]
    occlusions.sort(key=lambda each: each["score_after"])
    return {"words": words, "occlusions": occlusions}


JUDGED = (("a dog", "images/00009-seed5.png"), ("a cow", "images/other-00001.png"))
EXPLANATIONS = {
    3: explained(PROMPT.split(), [0.1, -0.5, 2.0, 3.0]),
    4: explained(["a", "cat"], [1.0, 2.0]),
}


@pytest.fixture
def studio(tmp_path):
    """A job whose model draws grey images; `after` says what each is near to."""
    drawn, after, comparers = [], {}, []

    def generate(prompts, seeds, *, steps, cond_scale):
        drawn.append((prompts, seeds))
        return [Image.new("RGB", (8, 8)) for _ in seeds]

    def compare(pairs, judged):
        assert judged == [*pairs, *JUDGED]
        (tmp_path / "training-1.png").touch()
        (tmp_path / "training-2.png").touch()
        return {path: after[path] for _, path in pairs}

    def comparer():
        comparers.append(True)
        return SimpleNamespace(nearest=compare, judge=list)

    subject = Subject()
    vars(subject)["denoiser"] = SimpleNamespace(generate=generate)
    prompts = PromptSet(prompts=(PROMPT,), sources=(("a.txt:1",),), images=((),), read=1, empty=0)

    def work() -> Work:
        return Work(
            config=AuditConfig(), subject=subject, calibration=None, job=Job(tmp_path, "key"),
            inputs=Inputs(prompts=prompts, groups=(None,), controls_name="", controls=()),
            bars=silent,
        )  # fmt: skip

    def redraw(explanations, found):
        return redrawing.redraw(work(), PLAN, explanations, found, cache(comparer), 3)

    return SimpleNamespace(
        redraw=redraw, drawn=drawn, after=after, comparers=comparers, folder=tmp_path
    )


def comparison(**copied: bool | None) -> Comparison:
    """Images of the first prompt by seed (s5, s7) and of the second (other), copies or not."""
    names = {"s5": "images/00003-seed5.png", "s7": "images/00003-seed7.png",
             "other": "images/00004-seed5.png"}  # fmt: skip
    found = {path: nearest(copied=copied.get(name, False)) for name, path in names.items()}
    return Comparison(nearest=found, summary=None, judged=JUDGED)


@pytest.mark.parametrize(
    ("seen", "outcome", "sentence"),
    [
        (nearest(copied=False), "gone", "the image no longer comes back"),
        (nearest(copied=None), "unknown", "nothing can tell whether"),
        (nearest(), "back", "the image still comes back"),
        (nearest(path="training-2.png"), "back", "the image still comes back"),  # its twin
        (nearest(path="training-2.png", caption="cat"), "another", "another training image comes"),
    ],
)
def test_each_outcome_is_told(studio, seen, outcome, sentence):
    studio.after |= {f"images/00003-without{index}.png": seen for index in range(4)}
    (first, second) = studio.redraw(EXPLANATIONS, comparison(s7=True))[3]
    assert (first.word, first.index, first.prompt) == ("fox", 3, "an old red")
    assert (second.word, second.index, second.prompt) == ("red", 2, "an old fox")
    assert first.outcome == outcome
    assert str(first).startswith(f"without “fox” {sentence}")
    assert str(first).endswith("(drawn once, seed 7)")
    assert (studio.folder / first.path).is_file()


def test_the_seed_is_the_first_that_brought_the_copy(studio):
    studio.after |= {f"images/00003-without{index}.png": nearest() for index in range(4)}
    studio.redraw(EXPLANATIONS, comparison(s5=True, s7=True))
    assert studio.drawn == [(["an old red", "an old fox"], [5, 5])]


def test_prompts_without_a_copy_say_nothing_and_cost_nothing(studio):
    for nothing in (comparison(), comparison(s5=None), Comparison(nearest={}, summary=None)):
        assert studio.redraw(EXPLANATIONS, nothing) == {}
    assert studio.redraw({}, comparison(s5=True, other=True)) == {}
    assert studio.drawn == studio.comparers == []


def test_what_was_drawn_is_not_drawn_again(studio):
    studio.after |= {f"images/{name}.png": nearest() for name in (
        "00003-without2", "00003-without3", "00004-without0", "00004-without1")}  # fmt: skip
    done = comparison(s5=True, other=True)
    first = studio.redraw(EXPLANATIONS, done)
    assert [len(seeds) for _, seeds in studio.drawn] == [3, 1]  # three at once
    assert len(studio.comparers) == 1  # all training images are read once
    assert studio.redraw(EXPLANATIONS, done) == first
    assert (len(studio.drawn), len(studio.comparers)) == (2, 1)
    (studio.folder / first[4][0].path).unlink()
    assert studio.redraw(EXPLANATIONS, done) == first
    assert [len(seeds) for _, seeds in studio.drawn] == [3, 1, 3]
