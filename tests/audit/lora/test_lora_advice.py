"""Causes are counts of this audit with a change in numbers; none where nothing comes back."""

import re
from dataclasses import replace

import pytest
from some_audit import make_audit, rate
from unmemorize.audit.lora.causes import find_causes
from unmemorize.trainer_patch.options import NAMES

KOHYA = {
    "max_train_epochs", "save_every_n_epochs", "network_dim", "shuffle_caption", "keep_tokens",
    "caption_tag_dropout_rate",
}  # fmt: skip
DIFFUSERS = {"num_train_epochs", "checkpointing_steps", "rank"}


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """Images 0 to 2 come back; 0 and 1 are the same file."""
    return make_audit(tmp_path_factory.mktemp("advice"), images=6, held_out=1)


def causes(audit):
    return {cause.kind: cause for cause in find_causes(audit)}


def with_images(audit, **change):
    """Return the audit with a field of its training images changed, by position."""
    (name, values), = change.items()  # fmt: skip
    images = tuple(
        replace(image, **{name: value})
        for image, value in zip(audit.training.images, values, strict=True)
    )
    return replace(audit, training=replace(audit.training, images=images))


def test_nothing_that_comes_back_has_no_cause(audit):
    for verdict in ("none", "near"):
        verdicts = tuple(replace(v, verdict=verdict) for v in audit.verdicts)
        assert find_causes(replace(audit, verdicts=verdicts)) == ()
    assert find_causes(audit)


def test_duplicates_are_counted_inside_and_outside(audit):
    found = causes(audit)["duplicates"]
    assert "2 of 6 training images" in found.evidence
    assert "Of these 2 come back, of the 4 others 1 comes back." in found.evidence
    assert "take 1 file out: 5 images remain" in found.change


def test_duplicates_that_do_not_come_back_are_no_cause(audit):
    """They stand on the page all the same, in the list of duplicates."""
    apart = replace(audit, duplicates=(replace(audit.duplicates[0], images=(3, 4)),))
    assert "duplicates" not in causes(apart)


def test_a_held_out_copy_is_no_training_duplicate(audit):
    with_control = replace(audit, duplicates=(replace(audit.duplicates[0], images=(0, 6)),))
    assert audit.training.images[6].held_out
    assert "duplicates" not in causes(with_control)


def test_one_caption_on_different_images(audit):
    assert "captions" not in causes(audit)  # the copies share theirs, and are one image
    same = with_images(audit, caption=["a thing"] * 4 + ["b", "c", "d"])
    found = causes(same)["captions"]
    assert "3 of 5 distinct training images share 1 caption" in found.evidence
    assert "3 captions instead of 1" in found.change


def test_repeats_fall_to_what_nothing_came_back_from(audit):
    some = causes(with_images(audit, repeats=[20, 20, 12, 5, 8, 8, 1]))["repeats"]
    assert "up to 20 times in an epoch, 80 times over 4 epochs" in some.evidence
    assert "from 20 to 8 (none of the 3 images repeated 8 times or less came back)" in some.change
    assert "says it: 8_name." in some.change
    all_the_same = causes(audit)["repeats"]
    assert "from 10 to 5 (a first step" in all_the_same.change
    assert "repeats" not in causes(with_images(audit, repeats=[1] * 7))


def test_the_last_epoch_inside_is_named(audit):
    found = causes(audit)["epochs"]
    assert "At epoch 4 3 of 6 come back; at epoch 2, 0 of 6" in found.evidence
    assert "Publish epoch 2 (000002.safetensors)" in found.change
    assert "--max_train_epochs 2" in found.flags
    assert "epochs" not in causes(replace(audit, best_epoch=3))
    outside = tuple(replace(p, inside=False, reproduced=rate(2, 6)) for p in audit.epochs)
    none = causes(replace(audit, epochs=outside, best_epoch=None))["epochs"]
    assert "stop before epoch 1, or halve the repeats" in none.change


def test_without_saved_epochs_they_are_asked_for(audit):
    alone = replace(audit, epochs=(), best_epoch=None)
    assert "--epochs" in causes(alone)["epochs"].change
    assert "epochs" not in causes(replace(alone, lora=replace(alone.lora, epoch=1)))


@pytest.mark.parametrize(
    ("rank", "lower"), [(4, None), (5, 4), (32, 4), (None, None)], ids=lambda v: str(v)
)
def test_rank_against_distinct_images(audit, rank, lower):
    found = causes(replace(audit, lora=replace(audit.lora, rank=rank))).get("rank")
    assert (found and found.flags) == (lower and f"--network_dim {lower}")


def test_rank_halves_what_many_images_allow(tmp_path):
    many = make_audit(tmp_path, images=21, held_out=0)
    assert "for 20 distinct images" in causes(many)["rank"].evidence
    assert causes(many)["rank"].flags == "--network_dim 8"
    few = replace(many, lora=replace(many.lora, rank=19))
    assert "rank" not in causes(few)
    assert "rank" not in causes(replace(many, lora=replace(many.lora, kinds=("lokr",))))


@pytest.mark.parametrize(("dialect", "known"), [("kohya", KOHYA), ("peft", DIFFUSERS)])
def test_flags_are_those_of_the_trainer(audit, dialect, known):
    same = with_images(audit, caption=["a thing"] * 7)
    found = find_causes(replace(same, lora=replace(audit.lora, dialect=dialect)))
    assert {cause.kind for cause in found} == {
        "duplicates", "captions", "repeats", "epochs", "rank"
    }  # fmt: skip
    flags = {name for cause in found for name in re.findall(r"--(\w+)", cause.flags)}
    assert flags <= known | set(NAMES)
    assert flags & known
    assert "mem_filter" in flags


def test_no_change_promises_anything(audit):
    text = " ".join(f"{c.evidence} {c.change}" for c in find_causes(audit)).lower()
    assert not re.search(r"\b(safe|prevents?|guarantees?|will not)\b", text)
