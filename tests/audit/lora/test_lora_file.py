"""What a LoRA file says of itself, against the folder and the base model; and lies in it."""

import hashlib
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from unmemorize import demo
from unmemorize.audit.lora.header import Folder, Header, parse_metadata, read_header
from unmemorize.audit.lora.read import lora_facts
from unmemorize.audit.lora.training_set import read_training_set
from unmemorize.shared.files.weights import ModelError

WIDTH = 768
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def kohya(rank: int = 4, width: int = WIDTH) -> dict[str, torch.Tensor]:
    return {
        f"{LAYER}.lora_down.weight": torch.ones(rank, width),
        f"{LAYER}.lora_up.weight": torch.ones(32, rank),
        f"{LAYER}.alpha": torch.tensor(1.0),
    }


def written(tmp_path, state=None, name="my.safetensors", **metadata):
    told = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }
    save_file(state or kohya(), tmp_path / name, metadata=told or None)
    return tmp_path / name


def facts_of(path, training, base):
    return lora_facts(path, read_header(path), training, base)


@pytest.fixture
def training(tmp_path):
    """Two images under `10_sks dog`, one of them with a caption of its own."""
    folder = tmp_path / "set"
    (folder / "10_sks dog").mkdir(parents=True)
    for index in range(2):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(folder / f"10_sks dog/{index}.png")
    (folder / "10_sks dog/1.txt").write_text("sks dog, Grass")
    return read_training_set(folder, Header())


@pytest.fixture
def checkpoint(tmp_path):
    """A single file with the keys that an SD 1 checkpoint is known by, over 1 MB."""
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    state = {
        key: torch.ones(320, WIDTH),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(300_000),
    }
    save_file(state, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


HEADER = {
    "ss_dataset_dirs": {"10_sks dog": {"n_repeats": 10, "img_count": 2}},
    "ss_reg_dataset_dirs": {"1_dog": {"n_repeats": 1, "img_count": 50}},
    "ss_tag_frequency": {"10_sks dog": {"sks dog": 2, "grass": 1}, "1_dog": {"dog": 50}},
    "ss_num_train_images": "20",
    "ss_network_dim": "4",
    "ss_epoch": "3",
    "ss_num_epochs": "10",
    "ss_steps": "60",
    "ss_sd_model_name": "base.safetensors",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "unmemorize.filter": {"threshold": 3},
}


def test_a_header_that_agrees(tmp_path, training, checkpoint):
    data = checkpoint.read_bytes()
    full, old = hashlib.sha256(data), hashlib.sha256(data[0x100000:0x110000])
    hashes = {"ss_new_sd_model_hash": full.hexdigest(), "ss_sd_model_hash": old.hexdigest()[:8]}
    path = written(tmp_path, **HEADER, **hashes)
    facts = facts_of(path, training, checkpoint)
    assert facts.warnings == ()
    assert (facts.dialect, facts.kinds, facts.rank, facts.modules) == ("kohya", ("lora",), 4, 1)
    assert (facts.epoch, facts.epochs, facts.steps, facts.images) == (3, 10, 60, 20)
    assert facts.base_hash == full.hexdigest()
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    module = {"ss_network_module": "lycoris.kohya"}
    named = written(tmp_path, name="lycoris.safetensors", **HEADER, **module)
    assert facts_of(named, training, checkpoint).dialect == "lycoris"
    told = " ".join(facts.says)
    assert "the hash in its header is the file's" in told
    assert "2 training images, as many" in told
    assert "hold the 2 tags" in told
    assert "with Unmemorize: filter" in told
    only_old = {**HEADER, "ss_sd_model_hash": hashes["ss_sd_model_hash"]}
    facts = facts_of(written(tmp_path, **only_old), training, checkpoint)
    assert "the hash in its header is the file's" in " ".join(facts.says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ss_new_sd_model_hash": "0" * 64}, r"not on base.safetensors \(hash [0-9a-f]{8}\)"),
        ({"ss_sd_model_hash": "0" * 8}, "not on base.safetensors"),
        ({"ss_sd_model_name": "other.ckpt"}, "names other.ckpt as its base model"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "on SDXL; .* is SD 1"),
        ({"ss_dataset_dirs": {"10_sks dog": {"n_repeats": 10, "img_count": 5}}}, "counts 5 .* 2:"),
        ({"ss_dataset_dirs": {"10_sks dog": {"n_repeats": 4, "img_count": 2}}}, "10 times .* 4"),
        ({"ss_tag_frequency": {"10_sks dog": {"sks dog": 2, "snow": 1}}}, "2 of 3 .*grass, snow"),
    ],
)
def test_each_difference_is_pointed_out(tmp_path, training, checkpoint, change, says):
    facts = facts_of(written(tmp_path, **HEADER | change), training, checkpoint)
    assert len(facts.warnings) == 1
    assert re.search(says, facts.warnings[0])
    assert facts.says[0] == facts.warnings[0]


def test_another_architecture_is_seen_in_the_shapes(tmp_path, training):
    facts = facts_of(written(tmp_path), training, demo.MODEL)
    assert "768 numbers a token, model of 128" in facts.warnings[0]
    assert "does not say what base model" in facts.says[-1]


def test_images_that_were_reserved_but_trained_on(tmp_path, training):
    reserved = read_training_set(training.folder, Header(), reserve=0.5)
    path = written(tmp_path, **HEADER)
    facts = facts_of(path, reserved, demo.MODEL)
    assert any("were trained on, and are no controls" in told for told in facts.warnings)
    honest = HEADER | {"ss_dataset_dirs": {"10_sks dog": {"n_repeats": 10, "img_count": 1}}}
    facts = facts_of(written(tmp_path, **honest), reserved, demo.MODEL)
    assert not any("controls" in told for told in facts.warnings)


PAIR = {"lora_A.weight": (3, 8), "lora_B.weight": (8, 3)}
LOHA = {"hada_w1_a": (8, 5), "hada_w1_b": (5, 8), "hada_w2_a": (8, 5), "hada_w2_b": (5, 8)}


@pytest.mark.parametrize(
    ("stem", "factors", "dialect", "kinds", "rank"),
    [
        ("base_model.model.a", PAIR, "peft", ("lora",), 3),
        ("unet.a", PAIR, "diffusers", ("lora",), 3),
        ("unet.a", PAIR | {"lora_magnitude_vector": (8,)}, "diffusers", ("dora",), 3),
        ("lora_unet_a", LOHA, "lycoris", ("loha",), 5),
        ("lora_unet_a", {"lokr_w1": (2, 2), "lokr_w2": (4, 4)}, "lycoris", ("lokr",), None),
        ("lora_unet_a", {"lora_down.weight": (2, 8, 3, 3), "lora_up.weight": (8, 2, 1, 1)},
         "kohya", ("locon",), 2),
        ("lora_unet_a", {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "alpha": (),
                         "dora_scale": (8, 1)}, "lycoris", ("dora",), 2),
    ],
)  # fmt: skip
def test_dialects_and_kinds(tmp_path, training, stem, factors, dialect, kinds, rank):
    state = {f"{stem}.{name}": torch.ones(shape) for name, shape in factors.items()}
    facts = facts_of(written(tmp_path, state), training, demo.MODEL)
    assert (facts.dialect, facts.kinds, facts.rank, facts.modules) == (dialect, kinds, rank, 1)


def test_pefts_configuration_names_the_base(tmp_path, training):
    path = written(tmp_path, {f"base_model.model.a.{k}": torch.ones(s) for k, s in PAIR.items()})
    path.with_name("adapter_config.json").write_text('{"base_model_name_or_path": "me/model"}')
    facts = facts_of(path, training, demo.MODEL)
    assert (facts.base_name, facts.warnings) == ("me/model", ())
    path.with_name("adapter_config.json").write_text("[7]")
    assert facts_of(path, training, "someone/hub-id").base_name is None


def test_what_is_no_lora_is_refused(tmp_path, training):
    with pytest.raises(ModelError, match="is no LoRA: it holds 1 key and no factor"):
        facts_of(written(tmp_path, {"conv.weight": torch.ones(2)}), training, demo.MODEL)
    with pytest.raises(ModelError, match="no such file"):
        facts_of(tmp_path / "absent.safetensors", training, demo.MODEL)


def test_headers_of_configured_datasets(tmp_path):
    subsets = [
        {"image_dir": "dogs", "img_count": 4, "num_repeats": 6, "is_reg": False},
        {"image_dir": "class", "img_count": 9, "num_repeats": 1, "is_reg": True},
    ]
    datasets = [{"subsets": subsets, "tag_frequency": {"dogs": {"sks": 4}}}]
    header = read_header(written(tmp_path, ss_datasets=datasets))
    assert header.folders == {"dogs": Folder(repeats=6, images=4)}
    assert header.regularisation == {"class"}
    assert header.tags == {"dogs": {"sks": 4}}


@pytest.mark.parametrize(
    "value",
    ["", "None", "NOFILE", "[]", "7", "{", "[" * 5000, '{"a": null}', '{"a": {"n_repeats": -1}}',
     '[{"subsets": 3}]', '[{"subsets": [7]}]', '{"a": {"b": 1e999}}', "9" * 5000, "\x00\u202e<b>",
     '{"\\ud800": {"\\ud800": 1, "n_repeats": 1, "img_count": 1}}'],
)  # fmt: skip
def test_nonsense_is_left_out(tmp_path, training, value):
    keys = [*HEADER, "ss_datasets", "ss_new_sd_model_hash", "ss_sd_model_hash", "ss_network_module"]
    header = parse_metadata(dict.fromkeys(keys, value))
    assert header.images in (None, 7)
    facts = facts_of(written(tmp_path, **dict.fromkeys(keys, value)), training, demo.MODEL)
    assert "\u202e" not in json.dumps([facts.says, facts.base_name], ensure_ascii=False)
    "".join(facts.says).encode()


def test_what_is_left_out_and_absurd_scales_are_warnings_of_the_report(tmp_path, training):
    plain = facts_of(written(tmp_path), training, "m")
    assert not [text for text in plain.warnings if "multiplied" in text or "embedding" in text]
    state = kohya() | {"bundle_emb.zorp.clip_l": torch.ones(1, 4)}
    facts = facts_of(written(tmp_path, state), training, "m")
    assert any("1 embedding besides the LoRA, left out here: zorp." in w for w in facts.warnings)
    for alpha, told in ((400.0, False), (401.0, True), (-1e30, True), (float("nan"), True)):
        state = kohya() | {f"{LAYER}.alpha": torch.tensor(alpha)}
        facts = facts_of(written(tmp_path, state), training, "m")
        assert any("1 module is multiplied by more than 100" in w for w in facts.warnings) == told
        assert set(facts.warnings) <= set(facts.says)


def test_comfyui_s_own_names_are_a_dialect(tmp_path, training):
    state = {f"diffusion_model.{key}": torch.ones(4, 4) for key in
             ("double_blocks.0.img_attn.proj.lora_A.weight",
              "double_blocks.0.img_attn.proj.lora_B.weight")}  # fmt: skip
    assert facts_of(written(tmp_path, state), training, "m").dialect == "comfyui"
