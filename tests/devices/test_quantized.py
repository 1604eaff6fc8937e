"""Weights of few bits: refused by name where they cannot be, and never taken for plain tensors."""

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch.testing._internal.two_tensor import TwoTensor
from unmemorize.shared.arrays import normal_view
from unmemorize.shared.dependencies import has
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models import folder as folders
from unmemorize.shared.models import quantization
from unmemorize.shared.models.load import load_denoiser, model_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd3"
    tiny.stable_diffusion_3().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int2"}, "must be one of nf4, int8, float8"),
        ({"quantize": "nf4"}, "needs a GPU, and the device is cpu"),
        ({"offload": "disk"}, "must be one of model, sequential, group"),
        ({"offload": "model"}, "the device is cpu"),
    ],
)
def test_what_cannot_be_is_refused_by_name(folder, settings, message, monkeypatch):
    monkeypatch.setattr(quantization, "has", lambda package: True)
    with pytest.raises(ValueError, match=message):
        load_denoiser(folder, device="cpu", **settings)


@pytest.mark.parametrize(
    ("offload", "lora", "message"),
    [("group", False, "does not go with --offload group"), (None, True, "Take --quantize int8")],
)
def test_what_does_not_go_together_is_refused(offload, lora, message, monkeypatch):
    monkeypatch.setattr(quantization, "has", lambda package: True)
    with pytest.raises(ValueError, match=message):
        quantization.check_quantization("nf4", device="cuda:0", offload=offload, lora=lora)


def test_what_cannot_be_here_asks_for_no_package(folder, monkeypatch):
    """Nobody installs a package to be told that it needs a GPU."""
    monkeypatch.setattr(quantization, "has", lambda package: False)
    with pytest.raises(ValueError, match="needs a GPU, and the device is cpu"):
        load_denoiser(folder, device="cpu", quantize="nf4")


def test_a_missing_backend_says_what_to_type(folder, monkeypatch):
    monkeypatch.setattr(quantization, "has", lambda package: False)
    with pytest.raises(ImportError, match="Type: pip install torchao"):
        load_denoiser(folder, device="cpu", quantize="int8")


def test_a_single_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "has", lambda package: True)
    save_file({"model.diffusion_model.a": torch.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="reads diffusers folders"):
        load_denoiser(tmp_path / "one.safetensors", device="cpu", quantize="int8")


def test_a_quantized_model_is_another_model(folder):
    whole, few, fewer = (model_fingerprint(folder, quantize=each) for each in (None, "int8", "nf4"))
    assert len({whole, few, fewer}) == 3
    assert whole == model_fingerprint(folder)


@pytest.mark.skipif(not has("torchao"), reason="needs torchao: pip install torchao")
def test_a_quantized_network_is_read_and_close(folder):
    plain = load_denoiser(folder, device="cpu", resolution=tiny.RESOLUTION)
    rounded = load_denoiser(folder, device="cpu", resolution=tiny.RESOLUTION, quantize="int8")
    sigma = plain.sigmas(2)[0]
    noise = plain.initial_noise([0], sigma)
    with torch.no_grad():
        exact, close = (
            each.denoise(noise, sigma, each.encode(["a red cat"])) for each in (plain, rounded)
        )
    weight = rounded.family.network.transformer_blocks[0].attn.to_q.weight
    assert quantization.is_quantized(weight)
    assert not torch.equal(exact, close)
    torch.testing.assert_close(close, exact, rtol=0, atol=0.02 * float(exact.std()))
    assert rounded.fingerprint == model_fingerprint(folder, quantize="int8")


def test_a_quantized_inference_tensor_is_made_normal_in_its_own_class():
    with torch.inference_mode():
        inner = torch.ones(2, 3), torch.zeros(2, 3)
        weight = torch.nn.Parameter(TwoTensor(*inner), requires_grad=False)
        plain = torch.nn.Parameter(inner[0] * 2, requires_grad=False)
    assert weight.is_inference()
    made = normal_view(weight)
    assert not made.is_inference()
    assert isinstance(made, TwoTensor)
    assert made.a.data_ptr() == inner[0].data_ptr()  # over the same memory
    view = normal_view(plain)
    assert type(view) is torch.nn.Parameter
    assert view.data_ptr() == plain.data_ptr()
    x = torch.ones(3, requires_grad=True)
    (x * view).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))


def test_there_is_memory_for_the_largest_part_alone(folder, monkeypatch):
    """Offloaded, the GPU has to hold one part at a time; few bits take their share of it."""
    asked = []
    monkeypatch.setattr(
        folders, "check_memory", lambda size, dtype, place: asked.append((size, place))
    )
    for offload in (None, "model", "sequential"):
        folders.load_folder(folder, device="cuda:0", dtype=torch.float16, offload=offload)
    sizes = [size for size, place in asked if place == "cuda:0"]
    assert len(sizes) == 2
    assert sizes[1] < sizes[0] == asked[0][0]
    assert [place for _, place in asked].count("cpu") == 3
