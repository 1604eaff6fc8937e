"""Models as they are published: variants, hub repositories, marks of the training, foreign code."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.checks import require_weights, variant_of, weight_files
from unmemorize.shared.models.load import load_denoiser, model_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd1"
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def as_variant(folder, variant: str, shard_size: str = "10GB"):
    """Save the tiny model again, in a variant alone."""
    shutil.rmtree(folder)
    tiny.stable_diffusion().save_pretrained(folder, variant=variant, max_shard_size=shard_size)
    return folder


@pytest.mark.parametrize(
    ("variant", "shards"),
    [("fp16", "10GB"), ("bf16", "10GB"), ("bf16", "30KB"), ("non_ema", "10GB")],
)
def test_a_folder_that_has_a_variant_alone_is_the_same_model(saved, folder, variant, shards):
    as_variant(folder, variant, shards)
    files = weight_files(folder / "unet")
    assert variant_of(files) == variant
    assert (len(files) > 1) == (shards == "30KB")
    loaded, expected = (load_denoiser(each, device="cpu") for each in (folder, saved))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(each.pipeline, part).state_dict() for each in (loaded, expected))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert len(model_fingerprint(folder)) == 64


def test_plain_weights_come_before_their_variants(folder):
    unet = folder / "unet"
    for variant in ("bf16", "fp16"):
        shutil.copy(unet / "diffusion_pytorch_model.safetensors",
                    unet / f"diffusion_pytorch_model.{variant}.safetensors")  # fmt: skip
    (unet / "openvino_model.safetensors").write_bytes(b"")
    assert [file.name for file in require_weights(unet)] == ["diffusion_pytorch_model.safetensors"]
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert variant_of(require_weights(unet)) == "fp16"


@pytest.mark.parametrize(
    "text", ["no", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_of_shards_is_named(folder, text):
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(
        ModelError, match=r"index\.json .*(expected|lacks the fields \['weight_map)"
    ):
        load_denoiser(folder, device="cpu")


@pytest.mark.parametrize("text", ["no", "[]", "{}", '{"_class_name": 3}', "\x00"])
def test_a_broken_model_index_is_named(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json .*expected"):
        load_denoiser(folder, device="cpu")


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "unet", "own_part"])
def test_another_library_s_class_is_refused_whatever_part_asks_for_it(folder, part):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: ["own", "Own"]}))
    marker = folder / "RAN"
    (folder / part).mkdir(exist_ok=True)
    (folder / part / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ModelError, match=f"asks for own.Own as {part}: only classes of"):
        load_denoiser(folder, device="cpu")
    checkpoint = folder / "model.safetensors"
    save_file(tiny.original_checkpoint(tiny.stable_diffusion()), checkpoint)
    with pytest.raises(ModelError, match="only classes of"):
        load_denoiser(checkpoint, config=folder, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("entry", [["diffusers"], ["diffusers", 3], ["diffusers", "a.b"], [1, "X"]])
def test_an_entry_of_the_index_that_is_none_is_named(folder, entry):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": entry}))
    with pytest.raises(ModelError, match=r'scheduler is "\[.*expected a library|only classes of'):
        load_denoiser(folder, device="cpu")


def test_parts_that_are_not_loaded_may_be_of_any_library(folder):
    index = json.loads((folder / "model_index.json").read_text())
    old = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps(index | old))
    load_denoiser(folder, device="cpu")


def test_quantized_models_are_refused_by_name(folder, tmp_path):
    config = json.loads((folder / "unet" / "config.json").read_text())
    how = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "unet" / "config.json").write_text(json.dumps(config | how))
    with pytest.raises(ModelError, match=r"unet is quantized \(bitsandbytes\)"):
        load_denoiser(folder, device="cpu")
    state = tiny.original_checkpoint(tiny.stable_diffusion())
    scale = {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}
    save_file(state | scale, tmp_path / "fp8.safetensors")
    with pytest.raises(ModelError, match=r"is quantized \(1 key such as .*scale_weight"):
        load_denoiser(tmp_path / "fp8.safetensors", config=folder, device="cpu")
    (tmp_path / "flux.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelError, match="is a GGUF file: quantized weights of the network alone"):
        load_denoiser(tmp_path / "flux.gguf", device="cpu")


# Checkpoints in one file


def checkpoint(tmp_path, *marks: str, dtype=torch.float32, **header: str):
    original = tiny.original_checkpoint(tiny.stable_diffusion())
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in original.items()}
    path = tmp_path / "model.safetensors"
    save_file(state | {mark: torch.tensor([]) for mark in marks}, path, metadata=header or None)
    return path


SAYS_V = {"modelspec.prediction_type": "v"}


EULER, PNDM, DDIM = "EulerDiscreteScheduler", "PNDMScheduler", "DDIMScheduler"


@pytest.mark.parametrize(
    ("scheduler", "marks", "header", "predicts", "to_pure_noise"),
    [
        (EULER, (), {}, "epsilon", False),
        (PNDM, (), {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        (PNDM, ("v_pred",), {}, "v_prediction", False),
        (EULER, ("v_pred", "ztsnr"), {}, "v_prediction", True),
        (PNDM, ("v_pred", "ztsnr"), SAYS_V, "v_prediction", True),
        (DDIM, (), SAYS_V, "v_prediction", True),
        (EULER, (), {"modelspec.prediction_type": "v_prediction"}, "v_prediction", True),
    ],
)
def test_marks_of_the_training_reach_the_noise_levels(
    folder, tmp_path, scheduler, marks, header, predicts, to_pure_noise
):
    import diffusers

    plain = tiny.stable_diffusion().scheduler.config
    getattr(diffusers, scheduler).from_config(plain).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", scheduler]})
    )
    denoiser = load_denoiser(checkpoint(tmp_path, *marks, **header), config=folder, device="cpu")
    assert denoiser.parametrization == predicts
    strongest = float(denoiser.family.schedule().table[-1])
    assert (strongest > 1000) == to_pure_noise  # 14.6 without
    abar = denoiser.pipeline.scheduler.alphas_cumprod[-1]
    assert (float(abar) < 1e-6) == to_pure_noise  # what images are drawn with


def test_a_configuration_that_knows_of_the_velocity_is_left_alone(folder, tmp_path):
    """Stable Diffusion 2 predicts the velocity and was not trained up to pure noise."""
    tiny.stable_diffusion("v_prediction").scheduler.save_pretrained(folder / "scheduler")
    denoiser = load_denoiser(checkpoint(tmp_path, **SAYS_V), config=folder, device="cpu")
    assert denoiser.parametrization == "v_prediction"
    assert float(denoiser.family.schedule().table[-1]) < 20


def test_eight_bits_in_one_file_are_read(folder, tmp_path):
    path = checkpoint(tmp_path, dtype=torch.float8_e4m3fn)
    denoiser = load_denoiser(path, config=folder, device="cpu")
    given = load_file(path)["model.diffusion_model.out.2.weight"]
    assert torch.equal(denoiser.pipeline.unet.conv_out.weight, given.float())


def test_a_model_with_noise_levels_of_its_own_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match=r"is an EDM model \(edm_mean\)"):
        load_denoiser(checkpoint(tmp_path, "edm_mean"), config=folder, device="cpu")
