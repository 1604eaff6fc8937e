"""Checkpoints, values next to the loss, prior preservation and validation images."""

import json
import shutil

import pytest
import torch
from diffusers_runs import LORA, header_of, records_of, run, same, weights_of


@pytest.mark.parametrize("cheaper", [(), ("--mem_filter_recall", "3")])
def test_resumed_is_uninterrupted(train, images, subspace, tmp_path, cheaper):
    # Whole epochs, since the script's own loader starts an epoch anew.
    common = ("--max_train_steps", "6", "--checkpointing_steps", "3", *cheaper,
              "--mem_filter", "q0.5", "--project_concepts", str(subspace))  # fmt: skip
    whole = train(*common)
    broken = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-3", broken / "checkpoint-3")
    report = "pytorch_lora_weights.memorized.jsonl"
    # Records of steps after the checkpoint are there when a training is killed: they are replaced.
    (broken / report).write_bytes((whole / report).read_bytes())
    resumed = ["--train_data_dir", str(images), *common]
    run(broken, [*resumed, "--resume_from_checkpoint", "checkpoint-3"])
    first, second = weights_of(whole), weights_of(broken)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value)
    assert records_of(broken) == records_of(whole)
    told = [json.loads(header_of(folder)["unmemorize.filter"]) for folder in (whole, broken)]
    assert told[0] == told[1]
    assert told[0]["seen"] == 12
    steps = json.loads(header_of(broken)["unmemorize.projection"])["steps"]
    assert steps == 6


def test_checkpoint_of_an_unprotected_training_is_taken(train, images, subspace, tmp_path):
    before = train("--checkpointing_steps", "3", "--max_train_steps", "6", protected=False)
    shutil.copytree(before / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    output = run(tmp_path / "out", [
        "--train_data_dir", str(images), "--max_train_steps", "6",
        "--resume_from_checkpoint", "checkpoint-3", "--project_concepts", str(subspace),
    ])  # fmt: skip
    assert json.loads(header_of(output)["unmemorize.projection"])["steps"] == 3


def test_saved_loras_of_checkpoints_are_stamped(train, subspace):
    output = train("--project_concepts", str(subspace), "--checkpointing_steps", "2")
    assert "unmemorize.projection" in header_of(output / "checkpoint-2")
    assert (output / "checkpoint-2" / LORA).is_file()


def test_values_stand_next_to_the_loss(train, subspace, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train(
        "--report_to", "tensorboard", "--mem_filter", "0.05", "--project_concepts", str(subspace)
    )
    events = EventAccumulator(str(output / "test")).Reload()
    names = events.Tags()["scalars"]
    assert {"train_loss", "unmemorize/filtered_share", "unmemorize/score",
            "unmemorize/residual"} <= set(names)  # fmt: skip
    assert [each.step for each in events.Scalars("unmemorize/score")] == [1, 2, 3, 4]
    bar = capsys.readouterr().err
    assert "filtered=" in bar
    assert "residual=" in bar


def test_class_images_are_not_looked_at(train):
    output = train("--with_prior_preservation", "--mem_filter", "0")
    # Two images and two class images in a batch: all images left out, the others learnt from.
    assert len(records_of(output)) == 8
    assert any(value.any() for key, value in weights_of(output).items() if "lora_B" in key)


def test_validation_images_are_not_looked_at(train):
    common = ("--validate", "--max_train_steps", "4")
    output = train(*common, "--mem_filter", "inf")
    assert len(records_of(output)) == 8
    assert same(weights_of(output), weights_of(train(*common, protected=False)))
