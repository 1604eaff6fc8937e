"""What a LoRA is asked, and that nothing is asked twice."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unmemorize.audit.lora.ask import left_out, paraphrases, plan_shots, questions
from unmemorize.audit.lora.config import POWER, SEEDS, LoraAuditConfig, power_of
from unmemorize.audit.lora.result import TrainingImage, TrainingSet


def training_set(captions, *, held_out=(), trigger="zorp", repeats=None) -> TrainingSet:
    """Return a set of images that nobody opens."""
    images = [
        TrainingImage(name=f"{i:03d}.png", sha256=f"{i:064x}", caption=caption, size=(8, 8),
                      repeats=(repeats or [1] * len(captions))[i] if i < len(captions) else 1,
                      held_out=i >= len(captions))
        for i, caption in enumerate([*captions, *held_out])
    ]  # fmt: skip
    return TrainingSet(folder=Path("x"), layout="plain", images=tuple(images), trigger=trigger)


def config(**settings) -> LoraAuditConfig:
    return LoraAuditConfig(lora=Path("a.safetensors"), images=Path("x"), **settings)


captions = st.lists(st.text("ab, c", max_size=9), min_size=1, max_size=6)


@given(captions=captions, held_out=captions, count=st.integers(1, 3))
def test_no_prompt_is_drawn_from_one_noise_twice(captions, held_out, count):
    shots = plan_shots(training_set(captions, held_out=held_out), config(images_per_prompt=count))
    drawn = Counter((shot.prompt, shot.seed, shot.mode) for shot in shots)
    assert max(drawn.values()) == 1
    assert len({shot.path for shot in shots}) == len(shots)


def test_every_question_is_asked_with_the_lora_and_without():
    shots = plan_shots(training_set(["a, b", "c"], held_out=["d"]), config())
    on, off = ({(s.prompt, s.asked, s.source, s.seed) for s in shots if s.mode == mode}
               for mode in ("on", "off"))  # fmt: skip
    assert on == off
    assert {asked for _, asked, _, _ in on} == {"caption", "paraphrase", "trigger", "empty"}
    assert {source for _, asked, source, _ in on if asked == "caption"} == {0, 1, 2}


def test_captions_come_first_one_seed_after_the_other():
    shots = plan_shots(training_set(["a, b", "c"]), config(), ["my example"])
    stages = list(dict.fromkeys((shot.stage, shot.asked) for shot in shots))
    assert stages == [
        ("a first look", "caption"), ("captions", "caption"), ("other words", "example"),
        ("other words", "paraphrase"), ("other words", "trigger"), ("other words", "empty"),
        ("attack", "attack"),
    ]  # fmt: skip
    modes = [shot.mode for shot in plan_shots(training_set(list("abcdefg")), config(batch_size=3))]
    assert modes[:14] == [*["on"] * 3, *["off"] * 3, *["on"] * 3, *["off"] * 3, "on", "off"]
    first = [shot for shot in shots if shot.stage == "a first look"]
    assert Counter((shot.source, shot.mode) for shot in first) == {
        (source, mode): 1 for source in (0, 1) for mode in ("on", "off")
    }
    examples = [shot for shot in shots if shot.asked == "example"]
    assert Counter(shot.mode for shot in examples) == {"on": SEEDS, "off": SEEDS}
    assert {shot.source for shot in examples} == {None}


def test_so_many_seeds_find_an_image_as_surely_as_is_said():
    """Every outcome of so many seeds, of which each brings the image with probability 1 in 3."""
    for seeds in range(1, 6):
        found = sum(
            2 ** outcome.count(0) for outcome in product((0, 1), repeat=seeds) if any(outcome)
        )
        assert power_of(seeds) == pytest.approx(found / 3**seeds)
    assert power_of(SEEDS) >= POWER > power_of(SEEDS - 1)


def test_images_that_share_a_caption_are_asked_for_equally_often():
    asked = questions(training_set(["same"] * 5), config(images_per_prompt=3))
    seeds = [question.seeds for question in asked if question.asked == "caption"]
    assert sorted(sum(seeds, ())) == list(range(15))
    assert {len(some) for some in seeds} == {3}


def test_the_attack_asks_for_trained_images_only_and_can_be_left_out():
    training = training_set(["a", "b"], held_out=["c"])
    attacked = [shot for shot in plan_shots(training, config()) if shot.mode == "attack"]
    assert Counter(shot.source for shot in attacked) == {0: 4, 1: 4}
    assert not any(s.mode == "attack" for s in plan_shots(training, config(attack_images=0)))
    silent = plan_shots(training_set(["", ""]), config())
    assert {shot.prompt for shot in silent if shot.mode == "attack"} == {"zorp"}


def test_of_many_captions_the_most_repeated_are_asked():
    repeats = [1] * 30
    repeats[7] = repeats[21] = 9
    asked = questions(training_set([f"c{i}" for i in range(30)], repeats=repeats),
                      config(captions=5))  # fmt: skip
    sources = {question.source for question in asked if question.asked == "caption"}
    assert {7, 21} < sources
    assert len(sources) == 5


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("cat, red, park", ("park, red, cat", "cat, park", "a picture of cat, red, park")),
        ("a cat on it", ("it on cat a", "a on", "a picture of a cat on it")),
        ("cat", ("a picture of cat",)),
    ],
)
def test_paraphrases(caption, expected):
    assert paraphrases(caption) == expected


@pytest.mark.parametrize("field", ["captions", "images_per_prompt", "processes", "batch_size"])
def test_settings_refuse_nonsense(field):
    with pytest.raises(ValueError, match=f"`{field}` must be at least 1, got 0"):
        config(**{field: 0})
    with pytest.raises(ValueError, match="`reserve` must be"):
        config(reserve=1.0)
    with pytest.raises(ValueError, match="Give `held_out` or `reserve`, not both"):
        config(reserve=0.1, held_out=Path("y"))


def test_captions_that_are_not_asked_are_told_of():
    training = training_set(["a", "b", "c", ""], held_out=["d"])
    assert left_out(training, config(captions=3)) == ""
    told = left_out(training, config(captions=2))
    assert told.startswith("The captions of 2 of 3 training images are used as prompts")
