"""The two doors of sd-scripts: one LoRA through both, and no trace when nothing is asked."""

import json
from pathlib import Path

import pytest
from checkouts import CAPTIONS, CONCEPT, can_learn
from kohya_lora import FLOWS, MODULE, USUAL, flow, header, largest_share, protect, same_tensors
from safetensors.torch import load_file
from unmemorize.shared.training.concept.subspace import ConceptSubspace

pytestmark = pytest.mark.slow
SCALARS = (
    "loss/current", "unmemorize/residual", "unmemorize/filtered_share", "unmemorize/score",
)  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mixed_precision": "bf16", "save_precision": "bf16", "gradient_checkpointing": True,
         "gradient_accumulation_steps": 2, "cache_latents": None, "network_dropout": 0.2,
         "max_data_loader_n_workers": 1, "min_snr_gamma": 5, "noise_offset": 0.1, "clip_skip": 2},
        {"v_parameterization": True, "zero_terminal_snr": True, "caption_dropout_rate": 0.3,
         "max_token_length": 150, "shuffle_caption": True},
    ],
    ids=["plain", "everything at once", "velocity and long captions"],
)  # fmt: skip
def test_settings_that_change_nothing_change_no_bit(train, room, plain, changed):
    name = str(len(changed))
    before = train(f"before {name}", **changed) if changed else plain
    asked = protect("mem_filter=inf", f"project_concepts={room / 'empty.safetensors'}")
    after = train(f"after {name}", *asked.pop("extra"), **(changed | asked))
    assert same_tensors(before, after)
    told = header(after)
    steps = USUAL["max_train_steps"] * changed.get("gradient_accumulation_steps", 1)
    assert json.loads(told.pop("unmemorize.filter"))["seen"] == 2 * steps
    assert json.loads(told.pop("unmemorize.projection"))["steps"] == USUAL["max_train_steps"]
    assert told == header(before)  # also the network module, as if there were no door


def test_a_threshold_of_zero_leaves_every_up_factor_at_zero(train, plain):
    asked = protect("mem_filter=0")
    nothing = load_file(train("zero", *asked.pop("extra"), **asked))
    learnt = load_file(plain)
    for key in (key for key in nothing if "lora_up" in key):
        assert not nothing[key].any()
        assert learnt[key].any() or not can_learn(key)


def test_the_cheaper_filter_that_lets_everything_pass_changes_no_bit(train):
    longer = {"max_train_steps": 12, "train_batch_size": 3}
    asked = protect("mem_filter=inf", "mem_filter_recall=9")
    after = train("cheaper", *asked.pop("extra"), **(longer | asked))
    assert same_tensors(train("longer", **longer), after)
    told = json.loads(header(after)["unmemorize.filter"])
    assert 0 < told["measured"] < told["seen"] == 36
    lines = (after.parent / "lora.memorized.jsonl").read_text().splitlines()
    measured = [json.loads(line)["value"]["measured"] for line in lines]
    # Some batches were measured in part.
    assert any(0 < sum(measured[at : at + 3]) < 3 for at in range(0, len(measured), 3))


def test_a_text_encoder_that_is_trained_too_is_filtered(train):
    trained = {"network_train_unet_only": None}
    asked = protect("mem_filter=inf")
    after = train("text filtered", *asked.pop("extra"), **(trained | asked))
    assert same_tensors(train("text trained", **trained), after)
    assert any("lora_te" in key for key in load_file(after))


def test_both_doors_train_the_same_lora_from_the_same_file(train, room, plain, concept):
    toml = {
        "project_concepts": CONCEPT, "project_force": True, "mem_filter": 0.3,
        "mem_filter_action": "downweight", "save_every_n_epochs": 1, "max_train_steps": 12,
        "logging_dir": str(room / "logs"),
    }  # fmt: skip
    launched = train("launched", toml=toml, door="door")
    loaded = train("loaded", toml=toml | {"network_module": MODULE})
    assert same_tensors(launched, loaded)
    heads = [header(path) for path in (launched, loaded)]
    assert heads[0] == heads[1]
    for key in ("ss_output_name", "ss_network_module", "ss_network_args"):
        assert heads[0].get(key) == header(plain).get(key)
    basis = ConceptSubspace.load(concept).basis
    assert largest_share(plain, basis) > 0.1
    for path in (launched, launched.with_name("lora-000001.safetensors")):
        assert largest_share(path, basis) < 1e-3  # sd-scripts' text path and diffusers' agree
        assert json.loads(header(path)["unmemorize.projection"])["residual"] < 1e-6
    counts = json.loads(heads[0]["unmemorize.filter"])
    assert 0 < counts["flagged"] < counts["seen"] == 24
    report = json.loads((launched.parent / "lora.memorized.json").read_text())
    found = {Path(sample["file"]).name: sample["caption"] for sample in report["samples"]}
    assert found == {f"{number}.png": caption for number, caption in enumerate(CAPTIONS)}
    # TensorBoard's files hold the names as plain text.
    events = b"".join(path.read_bytes() for path in (room / "logs").rglob("events.out.*"))
    assert all(name.encode() in events for name in SCALARS)


def test_sdxl_with_cached_text(train):
    sdxl = {"script": "sdxl_train_network.py", "cache_text_encoder_outputs": True,
            "max_train_steps": 3}  # fmt: skip
    before = train("sdxl plain", **sdxl)
    asked = {"mem_filter": "inf"}
    assert same_tensors(before, train("sdxl inf", door="door", **(sdxl | asked)))
    asked |= {"project_concepts": CONCEPT, "project_force": True}
    path = train("sdxl kept", door="door", **(sdxl | asked))
    told = json.loads(header(path)["unmemorize.projection"])
    assert (told["modules"], told["width"], told["encoders"]) == (140, 2048, [768, 1280])
    assert told["residual"] < 1e-6
    assert not same_tensors(before, path)


@pytest.mark.parametrize("cached", [True, None], ids=["cached text", "text encoded in each step"])
@pytest.mark.parametrize("kind", list(FLOWS))
def test_flow_models_are_filtered(train, checkout, kind, cached):
    if not (checkout / f"{kind}_train_network.py").exists():
        pytest.skip("this version of sd-scripts does not train it")
    if kind == "hunyuan_image" and cached:
        pytest.skip("numpy 2 cannot make sd-scripts' own batches of its cached text")
    settings = flow(kind) | {"cache_text_encoder_outputs": cached}
    before = train(f"{kind} plain {cached}", **settings)
    same = train(f"{kind} inf {cached}", door="door", **settings, mem_filter="inf")
    assert same_tensors(before, same)
    assert json.loads(header(same)["unmemorize.filter"])["seen"] == 8
    report = json.loads((same.parent / "lora.memorized.json").read_text())
    assert min(sample["highest"] for sample in report["samples"]) > 0
    lines = (same.parent / "lora.memorized.jsonl").read_text().splitlines()
    timesteps = [json.loads(line)["value"]["timestep"] for line in lines]
    assert max(timesteps) > 100  # of 1000, also where the trainer counts to 1
    nothing = load_file(train(f"{kind} zero {cached}", door="door", **settings, mem_filter="0"))
    assert not any(nothing[key].any() for key in nothing if "lora_up" in key)
    refused = train("refused", door="door", fails=True, **settings, project_concepts=CONCEPT)
    also = kind in ("flux", "sd3")
    assert f"--mem_filter {'are' if also else 'is'} supported" in refused
    assert ("--project_layers" in refused) == also


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_flow_models_whose_text_encoder_is_trained_too_are_filtered(train, checkout, kind):
    if not (checkout / f"{kind}_train_network.py").exists():
        pytest.skip("this version of sd-scripts does not train it")
    settings = flow(kind) | {"network_train_unet_only": None, "cache_text_encoder_outputs": None}
    before = train(f"{kind} text trained", **settings)
    same = train(f"{kind} text filtered", door="door", **settings, mem_filter="inf")
    assert same_tensors(before, same)
    assert any("lora_te" in key and value.any() for key, value in load_file(same).items())
    nothing = load_file(train(f"{kind} text zero", door="door", **settings, mem_filter="0"))
    assert not any(nothing[key].any() for key in nothing if "lora_up" in key)
