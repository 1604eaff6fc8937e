"""Models are read whole or refused with what is wrong."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from unmemorize.shared.dependencies import has, require
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models import checks
from unmemorize.shared.models import load as models
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.load import load_denoiser, model_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def classic(folder) -> None:
    """Give the text encoder the key names every reader knows."""
    state = load_file(folder / TEXT)
    save_file({f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()},
              folder / TEXT, metadata={"format": "pt"})  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd1"
    tiny.stable_diffusion().save_pretrained(folder)
    classic(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change(path, edit) -> None:
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def rename(old: str, new: str):
    return lambda state: state.update({new: state.pop(old)})


@torch.no_grad()
def answer(denoiser) -> torch.Tensor:
    # Weights of a file lie at odd places in memory, where some processors add in another order.
    for part in denoiser.pipeline.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    sigma = denoiser.sigmas(3)[0]
    return denoiser.denoise(
        denoiser.initial_noise((0,), sigma), sigma, denoiser.encode(["a red cat"])
    )


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_a_saved_pipeline_loads_as_it_was(family, tmp_path):
    pipeline = tiny.PIPELINES[family]()
    pipeline.save_pretrained(tmp_path)
    denoiser = load_denoiser(tmp_path, device="cpu", resolution=tiny.RESOLUTION)
    expected = PipelineDenoiser(pipeline, resolution=tiny.RESOLUTION)
    assert torch.equal(answer(denoiser), answer(expected))
    assert not any(p.requires_grad for p in denoiser.family.network.parameters())


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_key_names_of_transformers_4_and_5_load_alike(folder, prefix):
    strip = "text_model."
    change(
        folder / TEXT,
        lambda s: [s.update({prefix + k.removeprefix(strip): s.pop(k)}) for k in list(s)],
    )
    expected = answer(PipelineDenoiser(tiny.stable_diffusion()))
    assert torch.equal(answer(load_denoiser(folder, device="cpu")), expected)


def test_a_folder_without_t5_loads_and_answers_as_it_was_saved(tmp_path):
    pipeline = tiny.stable_diffusion_3(with_t5=False)
    pipeline.save_pretrained(tmp_path)
    loaded = load_denoiser(tmp_path)
    torch.testing.assert_close(answer(loaded), answer(PipelineDenoiser(pipeline)))
    (tmp_path / "text_encoder_3").mkdir()  # left out by the index, yet there: not for us to choose
    with pytest.raises(ModelError, match="text_encoder_3"):
        load_denoiser(tmp_path)


def test_a_prefix_alone_is_no_other_network(folder):
    """What happens where the installed transformers knows only one of the two spellings."""
    other = tiny.stable_diffusion(seed=1).text_encoder
    holder = torch.nn.ModuleDict({"text_model": getattr(other, "text_model", other)})
    change(
        folder / TEXT, lambda s: [s.update({k[len("text_model.") :]: s.pop(k)}) for k in list(s)]
    )
    change(folder / TEXT, lambda s: s.update(spare=torch.ones(1)))
    assert checks.fill(holder, [folder / TEXT]) == {"spare"}
    checks.check_values(holder, [folder / TEXT], folder)


def test_weights_that_a_reader_lost_are_noticed(folder):
    """The check that trusts no report: another library version may fill gaps silently."""
    encoder = tiny.stable_diffusion(seed=1).text_encoder
    with pytest.raises(ModelError, match="weights differ from the file"):
        checks.check_values(encoder, [folder / TEXT], folder)
    checks.check_values(tiny.stable_diffusion().text_encoder, [folder / TEXT], folder)


@pytest.mark.parametrize(
    ("file", "edit", "says"),
    [
        (UNET, rename("conv_in.weight", "conv_inn.weight"),
         "unset: conv_in.weight.*nothing reads: conv_inn.weight"),
        (UNET, lambda s: s.pop("conv_out.bias"), "1 parameter it leaves unset: conv_out.bias"),
        (UNET, lambda s: s.update(spare=torch.ones(2)), "1 key that nothing reads: spare"),
        (UNET, lambda s: s.update({"conv_out.bias": torch.ones(7)}), "conv_out.bias"),
        (TEXT, lambda s: s.pop("text_model.final_layer_norm.bias"), "final_layer_norm.bias"),
        (TEXT, lambda s: [s.update({f"x.{k}": s.pop(k)}) for k in list(s)],
         "unset: .* and [0-9]+ more"),
        (UNET, lambda s: s["conv_in.weight"].fill_(float("nan")),
         "NaN or infinity .*: conv_in.weight"),
        (TEXT, lambda s: s["text_model.final_layer_norm.bias"].fill_(float("inf")),
         "NaN or infinity"),
        (VAE, lambda s: s.pop("quant_conv.bias"), "quant_conv"),
    ],
)  # fmt: skip
def test_files_that_do_not_fill_the_network_are_refused(folder, file, edit, says):
    change(folder / file, edit)
    with pytest.raises(ModelError, match=says):
        load_denoiser(folder, device="cpu")


def test_buffers_of_older_files_are_no_fault(folder):
    old = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    change(folder / TEXT, lambda s: s.update(old))
    load_denoiser(folder, device="cpu")


def test_values_that_overflow_half_precision_are_refused(folder):
    change(folder / UNET, lambda s: s["conv_in.weight"].fill_(1e6))
    load_denoiser(folder, device="cpu")
    with pytest.raises(ModelError, match="try --dtype float32"):
        load_denoiser(folder, device="cpu", dtype=torch.float16)


def test_files_that_cannot_be_read_are_told_apart(folder, tmp_path):
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_denoiser(folder, device="cpu")
    (folder / UNET).write_bytes(b"no weights at all")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_denoiser(folder, device="cpu")
    torch.save({"conv_in.weight": torch.ones(1)}, folder / UNET)
    with pytest.raises(ModelError, match=r"pickle renamed to \.safetensors"):
        load_denoiser(folder, device="cpu")
    (folder / UNET).rename((folder / UNET).with_suffix(".bin"))
    with pytest.raises(ModelError, match="can run any program"):
        load_denoiser(folder, device="cpu")
    (folder / UNET).with_suffix(".bin").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_denoiser(folder, device="cpu")


def test_a_pickle_is_never_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name in ("model.ckpt", "model.pt", "model.safetensors"):
        torch.save(Trap(), tmp_path / name)
        with pytest.raises(ModelError, match="pickle"):
            load_denoiser(tmp_path / name)
        with pytest.raises(ModelError, match="pickle"):
            model_fingerprint(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["absent", "no/such/place/model", "/absent/model", "./absent/model", "runs/absent",
             "absent.safetensors", "../x/y", "a b/c"],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="no such file or folder"):
        load_denoiser(name)


def test_a_hub_id_is_asked_of_the_hub_and_failure_is_told(monkeypatch, folder):
    from diffusers import DiffusionPipeline

    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs))
        if name == "owner/name":
            return str(folder)
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    load_denoiser("owner/name", revision="v1", device="cpu")
    assert asked == [("owner/name", {"revision": "v1", "use_safetensors": True})]
    with pytest.raises(ModelError, match=r"no folder owner/other here.*OSError: no route to host$"):
        load_denoiser("owner/other")


@pytest.mark.parametrize("option", ["revision", "config"])
def test_what_a_folder_does_not_take_is_refused(option, folder):
    given = {"revision": "v1", "config": folder}[option]
    flag = {"revision": "--revision", "config": "--model-config"}[option]
    with pytest.raises(ValueError, match=rf"{flag} .*Leave {flag} out"):
        load_denoiser(folder, device="cpu", **{option: given})


def test_a_device_without_values_is_refused_as_one():
    with pytest.raises(ValueError, match="The device meta cannot be used"):
        models.usable_device("meta")


@pytest.mark.parametrize("name", ["utils", "UNet2DConditionModel", "NoSuchPipeline"])
def test_a_folder_of_what_is_no_pipeline_is_refused(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}), "utf-8")
    with pytest.raises(ModelError, match=f"describes a {name}: this diffusers has no such"):
        load_denoiser(tmp_path)


def test_folders_that_are_no_models(folder, tmp_path):
    with pytest.raises(ModelError, match=r"expected model_index\.json.* Did you mean .*\?"):
        load_denoiser(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    for change_to, says in (
        (
            {"_class_name": "KandinskyPipeline"},
            "describes a KandinskyPipeline: its call needs `image_embeds`",
        ),
        ({"unet": ["evil", "Net"]}, "only classes of diffusers and transformers"),
        ({"unet": ["diffusers", "NoNet"]}, "does not have"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | change_to))
        with pytest.raises(ModelError, match=says):
            load_denoiser(folder, device="cpu")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_denoiser(folder)


def test_a_model_that_does_not_fit_says_how_much_it_needs(folder, monkeypatch):
    needed = checks.bytes_needed([folder / UNET], torch.float32)
    parameters = sum(p.numel() for p in tiny.stable_diffusion().unet.parameters())
    assert needed == 4 * parameters
    assert checks.bytes_needed([folder / UNET], torch.float16) == needed // 2
    monkeypatch.setattr(checks, "available_memory", lambda device: 1000)
    with pytest.raises(ModelError, match=r"needs about 0\.\d GiB in float32, and 0\.0 GiB are"):
        load_denoiser(folder, device="cpu")
    monkeypatch.undo()
    assert checks.available_memory("cpu") > 1000


def test_variants_and_shards_are_found(folder):
    expected = answer(load_denoiser(folder, device="cpu"))
    tiny.stable_diffusion().unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    (folder / UNET).unlink(missing_ok=True)
    assert len(checks.weight_files(folder / "unet")) > 1
    assert torch.equal(answer(load_denoiser(folder, device="cpu")), expected)
    shutil.rmtree(folder / "unet")
    tiny.stable_diffusion().unet.save_pretrained(folder / "unet", variant="fp16")
    assert torch.equal(answer(load_denoiser(folder, device="cpu")), expected)


def test_the_fingerprint_is_that_of_the_weights(folder, tmp_path):
    first = model_fingerprint(folder)
    assert len(first) == 64
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    (copied / "README.md").write_text("a card")
    assert model_fingerprint(copied) == model_fingerprint(str(folder)) == first
    lora = tmp_path / "lora.safetensors"
    save_file({"a.lora_down.weight": torch.ones(2)}, lora)
    with_lora = model_fingerprint(folder, lora)
    change(copied / UNET, lambda s: s["conv_in.bias"].add_(1e-3))
    assert len({first, with_lora, model_fingerprint(copied)}) == 3


def test_loading_says_nothing_and_draws_nothing(folder, capfd):
    load_denoiser(folder, device="cpu", dtype=torch.float16)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading" not in err
    assert "dtype" not in err


# Checkpoints in one file


@pytest.fixture
def checkpoint(saved, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny.original_checkpoint(tiny.stable_diffusion()), path)
    return path


def test_a_single_file_is_the_same_model(checkpoint, saved):
    denoiser = load_denoiser(checkpoint, config=saved, device="cpu")
    expected = answer(PipelineDenoiser(tiny.stable_diffusion()))
    torch.testing.assert_close(answer(denoiser), expected)
    assert denoiser.generate(["a cat"], (0,), steps=1)


def test_a_single_file_without_configuration_says_what_to_type(checkpoint, monkeypatch):
    with pytest.raises(ModelError, match=r"--model-config FOLDER, or type: hf download"):
        load_denoiser(checkpoint, device="cpu")


DIFFUSION = "model.diffusion_model."


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (rename(f"{DIFFUSION}out.2.bias", f"{DIFFUSION}out.3.bias"), "conv_out.bias|out.3.bias"),
        (lambda s: s.update({f"{DIFFUSION}spare.weight": torch.ones(3)}), "spare.weight"),
        (lambda s: s.update({"spare": torch.ones(3)}), "1 key that nothing reads: spare"),
        (lambda s: s.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
         "final_layer_norm"),
        (lambda s: s.pop("first_stage_model.decoder.conv_in.weight"), "conv_in"),
        (lambda s: s[f"{DIFFUSION}out.2.bias"].fill_(float("nan")), "NaN"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith(DIFFUSION)],
         "not a whole checkpoint"),
        (lambda s: s.update({"lora_unet_x.lora_down.weight": torch.ones(1)}),
         "give it with --lora"),
    ],
)  # fmt: skip
def test_single_files_with_gaps_are_refused(checkpoint, saved, edit, says):
    change(checkpoint, edit)
    with pytest.raises(ModelError, match=says):
        load_denoiser(checkpoint, config=saved, device="cpu")


def test_training_leftovers_in_a_single_file_are_no_fault(checkpoint, saved):
    change(checkpoint, lambda s: s.update({
        "alphas_cumprod": torch.ones(3), "model_ema.decay": torch.ones(1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    }))  # fmt: skip
    load_denoiser(checkpoint, config=saved, device="cpu")


# Optional packages


def test_missing_packages_say_what_to_type(monkeypatch):
    assert require("json", purpose="Reading", extra="models") is json
    says = r'Flying needs the package `no_wings`.* pip install --editable "[^"]+\[air\]"'
    with pytest.raises(ImportError, match=says):
        require("no_wings.feather", purpose="Flying", extra="air")
    assert has("json")
    assert not has("no_wings")
    assert not has("no_wings.feather")


def test_the_adapter_imports_nothing_heavy(loaded_after):
    names = ("models.load", "models.lora.attach", "sampling.observer")
    modules = loaded_after("\n".join(f"import unmemorize.shared.{name}" for name in names))
    assert not {"diffusers", "transformers", "peft", "PIL"} & modules


@pytest.mark.parametrize(
    ("files", "given", "says"),
    [
        (["b/unet/config.json", "b/model_index.json"], ".", "Did you mean {}/b?"),
        (["b/unet/config.json", "b/model_index.json"], "b/unet", "Did you mean {}/b?"),
        (["sd.safetensors"], ".", "Did you mean {}/sd.safetensors?"),
        (["adapter_config.json", "adapter_model.safetensors"], ".",
         "--lora {}/adapter_model.safetensors"),
        ([".git/x", "1.png", "1.txt"], ".", "found 1.png, 1.txt. Give a diffusers folder"),
        ([], ".", "expected model_index.json and a folder for each part in it, found nothing"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_says_what_was_found_and_what_is_meant(
    tmp_path, files, given, says
):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError) as error:
        load_denoiser(tmp_path / given, device="cpu")
    assert says.format(tmp_path) in str(error.value)
