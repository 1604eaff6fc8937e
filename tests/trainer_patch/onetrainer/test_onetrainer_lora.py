"""LoRAs by the real OneTrainer: no trace when nothing is asked, and what was asked when it is."""

import json
from pathlib import Path

import pytest
from checkouts import CAPTIONS, CONCEPT, can_learn
from demo_subspaces import layer_residuals, make_layers
from onetrainer_lora import EVERYTHING, STEPS, header, largest_share, same_tensors, told
from safetensors.torch import load_file
from unmemorize.shared.training.concept.subspace import ConceptSubspace

pytestmark = pytest.mark.slow
SCALARS = (
    "loss/train_step", "unmemorize/residual", "unmemorize/filtered_share", "unmemorize/score",
)  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        EVERYTHING,
        {"rescale_noise_scheduler_to_zero_terminal_snr": True, "force_v_prediction": True,
         "text_encoder": {"train": True}},
    ],
    ids=["plain", "everything at once", "velocity, and the text encoder too"],
)  # fmt: skip
def test_settings_that_change_nothing_change_no_bit(train, room, plain, changed):
    name = str(len(changed))
    before = train(f"before {name}", door=False, **changed) if changed else plain
    options = ["--mem_filter", "inf", "--project_concepts", str(room / "empty.safetensors")]
    after = train(f"after {name}", *options, **changed)
    assert same_tensors(before, after)
    accumulated = changed.get("gradient_accumulation_steps", 1)
    assert told(after, "filter")["seen"] == 2 * STEPS * accumulated
    account = told(after, "projection")
    assert account["steps"] == STEPS
    trained = changed.get("text_encoder", {}).get("train", False)
    assert ("text_encoder" in account) == trained  # the loss of the guarantee is told
    ours = {"unmemorize.filter", "unmemorize.projection"}
    assert {k: v for k, v in header(after).items() if k not in ours} == header(before)


def test_a_threshold_of_zero_leaves_every_up_factor_at_zero(train, plain):
    path = train("zero", "--config-value", "mem_filter=0")
    nothing, learnt = load_file(path), load_file(plain)
    for key in (key for key in nothing if "lora_up" in key):
        assert not nothing[key].any()
        assert learnt[key].any() or not can_learn(key)


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [
        ({"optimizer": {"optimizer": "ADAFACTOR", "fused_back_pass": True},
          "output_model_format": "DIFFUSERS_LORA"}, 1e-6),
        ({"optimizer": {"optimizer": "SCHEDULE_FREE_ADAMW"},
          "output_model_format": "COMFY_LORA"}, 1e-6),
        (EVERYTHING | {"lora_weight_dtype": "BFLOAT_16", "output_dtype": "FLOAT_32"}, 1e-6),
        ({"lora_model_name": "PLAIN", "output_dtype": "FLOAT_16"}, 1e-3),
    ],
    ids=["fused", "schedule-free", "bf16", "from a LoRA that knows the concept"],
)  # fmt: skip
def test_the_saved_lora_is_off_the_subspace(train, plain, concept, changed, tolerance):
    changed = {key: str(plain) if value == "PLAIN" else value for key, value in changed.items()}
    basis = ConceptSubspace.load(concept).basis
    assert largest_share(plain, basis) > 0.1
    path = train(f"kept {len(str(changed))}", "--project_concepts", str(concept), **changed)
    assert largest_share(path, basis) < tolerance


def test_every_other_layer_is_kept_off_its_own_subspace(train, room, concept):
    layers = make_layers(room)
    options = ("--project_concepts", str(concept), "--project_layers", str(layers))
    path = train("layers", *options, output_model_format="DIFFUSERS_LORA")
    assert largest_share(path, ConceptSubspace.load(concept).basis) < 1e-6
    assert max(layer_residuals(load_file(path), layers)) < 1e-6
    assert told(path, "projection")["layers"]["count"] > 200


def test_the_command_line_and_the_configuration_say_the_same(train, room, concept):
    asked = {
        "project_concepts": CONCEPT, "project_force": True, "mem_filter": 0.3,
        "mem_filter_action": "downweight",
    }  # fmt: skip
    typed = [part for key, value in asked.items()
             for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]  # fmt: skip
    saving = {"save_every": 1, "save_every_unit": "EPOCH"}
    ways = [train("typed", *typed, **saving), train("written", **saving, **asked)]
    assert same_tensors(*ways)
    assert header(ways[0]) == header(ways[1])
    basis = ConceptSubspace.load(concept).basis
    (between,) = (room / "written" / "save").glob("*.safetensors")
    for path in (ways[1], between):
        assert largest_share(path, basis) < 1e-3  # OneTrainer's text path and diffusers' agree
        assert told(path, "projection")["residual"] < 1e-6
    counts = told(ways[1], "filter")
    assert 0 < counts["flagged"] < counts["seen"] == 2 * STEPS
    report = json.loads((ways[1].parent / "lora.memorized.json").read_text())
    found = {Path(sample["file"]).name: sample["caption"] for sample in report["samples"]}
    assert found == {f"{number}.png": caption for number, caption in enumerate(CAPTIONS)}
    # TensorBoard's files hold the names as plain text.
    logs = (room / "written" / "tensorboard").rglob("events.out.*")
    events = b"".join(path.read_bytes() for path in logs)
    assert all(name.encode() in events for name in SCALARS)


def test_a_resumed_training_is_the_uninterrupted_one(train, room, concept):
    options = ("--project_concepts", str(concept), "--mem_filter", "q0.5")
    whole = train("whole", *options, epochs=3)
    train("again", *options, epochs=1, backup_before_save=True)
    again = train("again", *options, epochs=3, continue_last_backup=True)
    assert same_tensors(whole, again)
    assert header(whole) == header(again)
    lines = [path.with_name("lora.memorized.jsonl").read_text().splitlines()
             for path in (whole, again)]  # fmt: skip
    records = [[(line["key"], line["value"]["score"]) for line in map(json.loads, each)]
               for each in lines]  # fmt: skip
    assert records[0] == records[1]


def test_images_of_prior_prediction_are_not_looked_at(train, room):
    concepts = [
        {"__version": 2, "path": str(room / "images"), "seed": number, "type": kind}
        for number, kind in enumerate(("STANDARD", "PRIOR_PREDICTION"))
    ]
    before = train("prior", door=False, concepts=concepts, batch_size=3, epochs=1)
    after = train("prior inf", "--mem_filter", "inf", concepts=concepts, batch_size=3, epochs=1)
    assert same_tensors(before, after)
    assert 0 < told(after, "filter")["seen"] <= len(CAPTIONS)


@pytest.mark.parametrize(
    ("asked", "changed", "message"),
    [
        ({"project_concepts": CONCEPT}, {}, "or force it"),
        ({"project_concepts": "FILE"}, {"lora_decompose": True}, "DoRA: it rescales"),
        ({"mem_filter": "inf"}, {"training_method": "FINE_TUNE"}, "only LORA is covered"),
        ({"mem_filters": "inf"}, {}, "`mem_filters` is not an option"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_before_the_first_step(
    train, concept, asked, changed, message
):
    given = {key: str(concept) if value == "FILE" else value for key, value in asked.items()}
    said = train("refused", fails=True, **changed, **given)
    assert message in said
    assert "step:" not in said


def test_a_lora_to_start_from_must_not_change_a_text_encoder(train, concept):
    start = train("with text", door=False, text_encoder={"train": True}, epochs=1)
    asked = {"project_concepts": str(concept), "lora_model_name": str(start)}
    said = train("refused", fails=True, **asked)
    assert "changes a text encoder" in said
    assert "step:" not in said
