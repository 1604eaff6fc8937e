"""ai-toolkit's own trainer: nothing asked changes nothing, and what is asked happens."""

import json
from pathlib import Path

import pytest
from ai_toolkit_lora import (
    JOBS,
    REFUSED,
    STEPS,
    USUAL,
    header,
    largest_share,
    same_tensors,
    ups,
)
from checkouts import CAPTIONS, can_learn
from safetensors.torch import load_file
from unmemorize.shared.training.concept.subspace import ConceptSubspace

pytestmark = pytest.mark.slow
SCALARS = ("unmemorize/residual", "unmemorize/filtered_share", "unmemorize/score")


@pytest.mark.parametrize("kind", ["", "mixed ", "cached ", "again "])
def test_settings_that_change_nothing_change_no_bit(trained, kind):
    """Also where a training goes on from its own LoRA."""
    before, after = trained(f"{kind}plain".strip()), trained(f"{kind}idle".strip())
    assert same_tensors(before, after)
    told = header(after)
    train = USUAL["train"] | JOBS[f"{kind}idle"][1].get("train", {})
    visits = train["batch_size"] * train["steps"] * train.get("gradient_accumulation", 1)
    assert told.pop("unmemorize.filter")["seen"] == visits
    assert told.pop("unmemorize.projection")["steps"] == train["steps"]
    assert told | {"ss_output_name": ""} == header(before) | {"ss_output_name": ""}


def test_a_threshold_of_zero_leaves_every_up_factor_at_zero(trained):
    assert not any(up.any() for up in ups(trained("zero")))
    learnt = load_file(trained("plain"))
    assert all(learnt[key].any() or not can_learn(key) for key in learnt if "lora_up" in key)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("both", 1e-3), ("kept ema", 1e-6), ("mixed kept", 1e-3), ("kept from plain", 1e-6)],
)
def test_the_saved_lora_is_off_the_subspace(trained, concept, name, tolerance):
    """1e-3 for "both" says that ai-toolkit's text path is that of diffusers."""
    basis = ConceptSubspace.load(concept).basis
    assert largest_share(trained("plain"), basis) > 0.1
    assert largest_share(trained(name), basis) < tolerance
    assert any(up.any() for up in ups(trained(name)))
    assert header(trained(name))["unmemorize.projection"]["residual"] < tolerance


def test_everything_that_is_left_behind_tells_what_happened(trained, room, concept):
    path = trained("both")
    for saved in (path, path.with_name("both_000000003.safetensors")):
        assert largest_share(saved, ConceptSubspace.load(concept).basis) < 1e-3
        assert header(saved)["unmemorize.projection"]["residual"] < 1e-6
    counts = header(path)["unmemorize.filter"]
    assert 0 < counts["flagged"] < counts["seen"] == 2 * STEPS
    report = json.loads((room / "both.memorized.json").read_text())
    found = {Path(sample["file"]).name: sample["caption"] for sample in report["samples"]}
    assert found == {f"{number}.png": caption for number, caption in enumerate(CAPTIONS)}
    # TensorBoard's files hold the names as plain text.
    events = b"".join(path.read_bytes() for path in (room / "logs").rglob("events.out.*"))
    assert all(name.encode() in events for name in SCALARS)
    # Its next run takes whatever in the folder begins with the name for a checkpoint.
    assert not list(path.parent.glob("both*memorize*"))


def test_a_resumed_training_goes_on_counting_and_projecting(trained, room, concept):
    path = trained("again both")
    assert header(path)["unmemorize.filter"]["seen"] == 2 * STEPS
    assert header(path)["unmemorize.projection"]["steps"] == STEPS
    assert largest_share(path, ConceptSubspace.load(concept).basis) < 1e-3
    report = json.loads((room / "again both.memorized.json").read_text())
    assert sum(sample["visits"] for sample in report["samples"]) == 2 * STEPS


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_refused_before_the_first_step(refused, message):
    assert message in refused


def test_nothing_was_trained_that_was_refused(refused, room):
    assert refused.count("Error running job") == len(REFUSED)
    assert not list(room.glob("refused*/*.safetensors"))
