"""The launcher on a real training of the demo model: what it changes, and what it does not."""

import json
from pathlib import Path

import pytest
from demo_subspaces import WIDTH, make_subspace
from diffusers_runs import LORA, header_of, records_of, residual, run, same, weights_of
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.filter import watch
from unmemorize.shared.training.protection import ProtectionFailed
from unmemorize.trainer_patch.hooks import STATE


def basis_of(path):
    return ConceptSubspace.load(path).basis


def test_nothing_asked_for_changes_nothing(train, plain):
    output = train("--mem_filter", "off")
    assert same(weights_of(output), plain)
    assert header_of(output) == header_of(train(protected=False))


def test_infinite_threshold_and_empty_subspace_change_no_bit(train, plain, tmp_path):
    # The script draws dropout masks and noise: one draw more or less would be seen.
    empty = make_subspace(tmp_path, WIDTH, rank=0)
    output = train("--mem_filter", "inf", "--project_concepts", str(empty))
    assert same(weights_of(output), plain)
    assert {"unmemorize.filter", "unmemorize.projection"} <= header_of(output).keys()
    assert not same(weights_of(train("--mem_filter", "inf", "--seed", "1")), plain)


def test_the_cheaper_filter_that_lets_everything_pass_changes_no_bit(train, plain):
    # The script's LoRA has dropout, and draws its timesteps and noise after each step.
    output = train("--mem_filter", "inf", "--mem_filter_recall", "9", "--max_train_steps", "6")
    assert same(weights_of(output), weights_of(train("--max_train_steps", "6", protected=False)))
    told = json.loads(header_of(output)["unmemorize.filter"])
    assert told["recall"] == 9
    assert 0 < told["measured"] < told["seen"] == 12
    assert sum(record["measured"] for record in records_of(output)) == told["measured"]
    always = train("--mem_filter", "q0.5", "--mem_filter_recall", "1")
    assert same(weights_of(always), weights_of(train("--mem_filter", "q0.5")))


def test_threshold_zero_learns_nothing(train, plain):
    learnt = {key: value for key, value in weights_of(train("--mem_filter", "0")).items()
              if "lora_B" in key}  # fmt: skip
    assert learnt
    assert not any(value.any() for value in learnt.values())
    assert any(value.any() for key, value in plain.items() if "lora_B" in key)


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_text_side_stays_outside_the_subspace(train, plain, subspace, accumulation):
    output = train(
        "--project_concepts", str(subspace), "--gradient_accumulation_steps", accumulation
    )
    assert residual(weights_of(output), basis_of(subspace)) < 1e-6
    assert residual(plain, basis_of(subspace)) > 0.1
    told = json.loads(header_of(output)["unmemorize.projection"])
    assert told["rank"] == 5
    assert told["steps"] == 4
    others = [key for key in plain if "attn1" in key and "lora_B" in key]
    assert any(weights_of(output)[key].any() for key in others)


def test_concept_in_words(train, images):
    # The demo's small encoder may fail the acceptance test: that is not what is looked at here.
    output = train("--project_concepts", "cat, kitten -> animal", "--project_force")
    told = json.loads(header_of(output)["unmemorize.projection"])
    assert told["concepts"] == [{"names": ["cat", "kitten"], "neutral": "animal"}]
    assert told["captions"] == {"retained": 5, "named a concept": 1}
    assert told["residual"] < 1e-6


def test_everything_together(train, subspace):
    # Halves, checkpointed activations and worker processes, with both methods on.
    common = ("--mixed_precision", "bf16", "--gradient_checkpointing",
              "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1",
              "--max_train_steps", "2")  # fmt: skip
    without = weights_of(train(*common, protected=False))
    assert same(weights_of(train(*common, "--mem_filter", "inf")), without)
    output = train(*common, "--mem_filter", "q0.9", "--project_concepts", str(subspace))
    assert residual(weights_of(output), basis_of(subspace)) < 1e-6
    halves = {key: value.bfloat16() for key, value in weights_of(output).items()}
    assert residual(halves, basis_of(subspace)) < 1e-3


def test_files_and_captions_are_recorded(train, images):
    output = train("--mem_filter", "inf")
    captions = json.loads((images / "captions.json").read_text("utf-8"))
    records = records_of(output)
    assert len(records) == 8
    for record in records:
        name = record["file"].rsplit("/", 1)[-1]
        assert record["file"] == str(images / name)
        assert record["caption"] == captions[name]
        assert 0 <= record["timestep"] < 1000
        assert record["score"] > 0
    report = json.loads((output / "pytorch_lora_weights.memorized.json").read_text("utf-8"))
    assert report["seen"] == 8
    assert {sample["file"] for sample in report["samples"]} == {each["file"] for each in records}


def test_watching_changes_no_bit_and_leaves_the_lora_on(train, plain):
    # The script's LoRA has dropout: the passes without it must not move what it draws.
    output = train("--mem_warn")
    assert same(weights_of(output), plain)
    assert json.loads(header_of(output)["unmemorize.filter"])["memorized_images"] == 0


def test_what_was_to_stop_and_never_was_judged_ends_in_an_error(train):
    with pytest.raises(ProtectionFailed, match=r"no verdict on any saved file: 0 of 6 images"):
        train("--mem_stop")


def test_a_training_that_memorizes_ends_at_a_checkpoint(images, tmp_path, monkeypatch):
    # Few visits are enough here, and any count counts: what is decided is tested elsewhere.
    monkeypatch.setattr(watch, "IMAGES", 2)
    monkeypatch.setattr(watch, "RARE", 2.0)
    given = ["--train_data_dir", str(images), "--mem_stop", "--checkpointing_steps", "18",
             "--max_train_steps", "36"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", given)
    assert ended.value.code == 0
    assert (tmp_path / "out" / "checkpoint-18" / LORA).is_file()
    assert (tmp_path / "out" / "checkpoint-18" / STATE).is_file()
    assert not (tmp_path / "out" / "checkpoint-36").exists()
    assert not (tmp_path / "out" / LORA).exists()
    report = json.loads((tmp_path / "out" / f"{Path(LORA).stem}.memorized.json").read_text())
    assert (report["seen"], report["last_inside"]) == (36, None)
