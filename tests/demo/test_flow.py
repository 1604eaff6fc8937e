"""Demo-flow: one network of its own, everything else the demo's, in one folder that loads."""

import copy
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import skip_unless_ci
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from unmemorize import demo
from unmemorize.demo import assembly, data, train_flow, transformer
from unmemorize.demo.assembly import SHARDS, complete
from unmemorize.shared.files.storage import CACHE, replace_atomically
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.load import load_denoiser

SCALE = 4.0
"""Of text states."""


def random_network() -> nn.Module:
    torch.manual_seed(0)
    network = transformer.build_transformer(128)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """What a training writes, of a network with random weights."""
    train_flow.export(folder := tmp_path_factory.mktemp("flow"), random_network(), SCALE)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def denoisers(own, tmp_path_factory):
    """The flow and the demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        folder = complete(own, demo.MODEL)
    return tuple(
        load_denoiser(path, device="cpu", dtype=torch.float32) for path in (folder, demo.MODEL)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_it_loads_and_shares_all_but_the_network_with_the_demo(denoisers):
    flow, other = denoisers
    assert flow.parametrization == "flow"
    assert flow.latent_shape == other.latent_shape
    vae, expected = flow.pipeline.vae, other.pipeline.vae
    assert vae.config.shift_factor == 0.0
    assert vae.config.scaling_factor == expected.config.scaling_factor
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in vae.state_dict().items())
    weights = load_file(demo.MODEL / "text_encoder" / "model.safetensors")
    for encoder in (flow.pipeline.text_encoder, flow.pipeline.text_encoder_2):
        state = encoder.state_dict()
        assert torch.equal(state["text_projection.weight"], torch.eye(128))
        assert all(torch.equal(state[key], value.float()) for key, value in weights.items())
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(flow.pipeline, name).get_vocab() == other.pipeline.tokenizer.get_vocab()


def test_the_pipeline_reads_what_was_trained_on(denoisers):
    """The encoder's states twice, then zeros; the network itself takes their scale."""
    flow, other = denoisers
    read = flow.encode(["postage stamp, sushi"])
    tokens = other.pipeline.tokenizer(
        "postage stamp, sushi", padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        trained = transformer.TwiceRead(other.pipeline.text_encoder)(tokens)
    torch.testing.assert_close(read.embeddings[:, :77], trained.last_hidden_state)
    torch.testing.assert_close(read.pooled, trained.pooler_output)
    assert read.embeddings.shape[1] == 77 + transformer.ZEROS
    assert not read.embeddings[:, 77:].any()
    first, unscaled = (
        network.context_embedder.weight for network in (flow.pipeline.transformer, random_network())
    )
    torch.testing.assert_close(first * SCALE, unscaled, rtol=1e-3, atol=1e-5)  # of float16


def test_an_image_comes_back_from_its_latent(denoisers):
    flow, other = denoisers
    image = demo.training_image(next(c.text for c in demo.captions() if c.group == "verbatim"))
    latents = flow.encode_images([image])
    assert torch.equal(latents, other.encode_images([image]))
    assert 0.3 < latents.std() < 3  # as strong as the noise they are mixed with
    decoded = flow.decode(latents)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    assert (decoded[0] - pixels).abs().mean() < 0.05
    assert (decoded[0].flip(2) - pixels).abs().mean() > 0.1  # another image is far


def test_one_weighted_token_does_what_all_zeros_do():
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    short = random_network().double()
    short.set_attn_processor(transformer.WeightedLastToken())
    whole = copy.deepcopy(short)
    whole.set_attn_processor(JointAttnProcessor2_0())
    states, image, ends = torch.randn(2, 6, 256), torch.randn(2, 4, 16, 16), torch.randn(2, 256)

    def answer(network: nn.Module, zeros: int) -> torch.Tensor:
        text = F.pad(states.double(), (0, 0, 0, zeros))
        with torch.no_grad():
            return network(
                hidden_states=image.double(), timestep=torch.tensor([500.0, 20.0]).double(),
                encoder_hidden_states=text, pooled_projections=ends.double(),
            ).sample  # fmt: skip

    torch.testing.assert_close(answer(short, 1), answer(whole, transformer.ZEROS))
    assert (answer(whole, 1) - answer(whole, transformer.ZEROS)).abs().mean() > 1e-3


def test_a_folder_that_is_whole_is_not_written_again(own, cache, monkeypatch):
    folder = complete(own, demo.MODEL)
    assert folder.is_relative_to(cache)
    assert folder.name == "demo-flow"  # programs tell a model by it
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    def refused(path):
        raise AssertionError(f"{path} is written again")

    monkeypatch.setattr(assembly, "replace_atomically", refused)
    assert complete(own, demo.MODEL) == folder
    assert written == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_an_interrupted_folder_is_continued_and_a_damaged_one_mended(own, cache, monkeypatch):
    written = []

    def interrupted(path):
        written.append(path)
        if len(written) == 5:
            raise KeyboardInterrupt
        return replace_atomically(path)

    monkeypatch.setattr(assembly, "replace_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        complete(own, demo.MODEL)
    monkeypatch.setattr(assembly, "replace_atomically", replace_atomically)
    folder = complete(own, demo.MODEL)
    expected = contents(folder)
    assert expected["vae/config.json"] == (own / "vae" / "config.json").read_bytes()
    assert expected[f"text_encoder_2/{SHARDS[0]}"] == (
        demo.MODEL / "text_encoder" / "model.safetensors"
    ).read_bytes()  # fmt: skip
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    shutil.rmtree(folder / "tokenizer")
    assert contents(folder) != expected
    assert complete(own, demo.MODEL) == folder
    assert contents(folder) == expected


def test_other_weights_make_another_folder(own, cache, tmp_path):
    shutil.copytree(own, tmp_path / "other")
    config = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text("utf-8").replace("3.0", "2.0"), "utf-8")
    one, two = (complete(folder, demo.MODEL) for folder in (own, tmp_path / "other"))
    assert one != two
    assert contents(one) != contents(two)


def test_without_a_cache_it_is_a_temporary_folder(own, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    folder = complete(own, demo.MODEL)
    assert "again next time" in caplog.text
    assert not folder.is_relative_to(tmp_path)
    assert contents(folder).keys() >= {"model_index.json", f"text_encoder_2/{SHARDS[1]}"}


def test_what_is_missing_is_named(own, cache, tmp_path):
    assert demo.locate("demo") == demo.MODEL
    with pytest.raises(ValueError, match="one of demo, demo-flow, got 'mine'"):
        demo.locate("mine")
    with pytest.raises(ModelError, match=r"no .*model_index\.json.*clone it whole"):
        complete(tmp_path / "nothing", demo.MODEL)
    shutil.copytree(demo.MODEL, tmp_path / "demo", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ModelError, match=r"no .*vae.*clone it whole"):
        complete(own, tmp_path / "demo")
    assert not list(cache.rglob("*"))  # nothing half


def test_the_committed_files_are_what_a_training_writes(own, cache):
    assert demo.locate("demo-flow") == complete(demo.FLOW, demo.MODEL)
    assert sum(path.stat().st_size for path in demo.FLOW.rglob("*.safetensors")) <= 6_000_000
    for path in own.rglob("*.json"):
        name = path.relative_to(own)
        if name.name not in ("sha256.json", "model.safetensors.index.json"):
            ours, theirs = (json.loads((top / name).read_text("utf-8")) for top in (demo.FLOW, own))
            versions = {"_diffusers_version": None}
            assert ours | versions == theirs | versions


def test_latents_of_other_images_are_not_mixed_in(tmp_path):
    from safetensors.torch import save_file
    from unmemorize.demo.train import encode_images

    save_file({"latents": torch.zeros(3, 4, 16, 16)}, tmp_path / "latents.safetensors")
    with pytest.raises(ValueError, match="3 images, expected 2"):
        encode_images(nn.Identity(), torch.zeros(2, 3, 128, 128), tmp_path / "latents.safetensors")


def test_short_mode_never_overwrites_the_flow(capsys):
    with pytest.raises(SystemExit):
        train_flow.main(["--short"])
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_short_training_makes_a_flow_that_loads(tmp_path, cache, run_python):
    if shutil.which("npm") is None:  # CI does without, too
        pytest.skip("npm, which brings the demo's art, is not installed")
    try:
        data.fetch(tmp_path / "work" / "art")
    except subprocess.CalledProcessError as error:
        skip_unless_ci(f"the demo's art cannot be fetched here: {error.stderr!r:.200}")
    run_python(
        "-W", "ignore", "-m", "unmemorize.demo.train_flow", "--short",
        "--output", str(tmp_path / "flow"), "--work", str(tmp_path / "work"),
    )  # fmt: skip
    denoiser = load_denoiser(complete(tmp_path / "flow", demo.MODEL))
    assert denoiser.generate(["red apple"], [0], steps=2)[0].size == (128, 128)
    network = "transformer/diffusion_pytorch_model.safetensors"
    shapes = {k: v.shape for k, v in load_file(demo.FLOW / network).items()}
    assert shapes == {k: v.shape for k, v in load_file(tmp_path / "flow" / network).items()}
