"""A concept's adapter: file, switch, and what is refused."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.lora.attach import load_lora
from unmemorize.shared.training.concept.adapter import (
    HEADER,
    SAMPLES,
    ConceptAdapter,
    ConceptSwitch,
    adapted_layers,
    weight_samples,
)

NUMBERS = {
    "concept": 0.02, "others": -0.001, "threshold": 0.004, "recall": 1.0, "false_positives": 0.0,
    "concept_gains": [0.02], "other_gains": [-0.001] * 8,
}  # fmt: skip


def some_adapter(network: nn.Module, rank: int = 2, seed: int = 0) -> ConceptAdapter:
    generator = torch.Generator().manual_seed(seed)
    layers = adapted_layers(network)
    pairs = {
        name: (torch.randn(rank, layer.in_features, generator=generator),
               0.1 * torch.randn(layer.out_features, rank, generator=generator))
        for name, layer in layers.items()
    }  # fmt: skip
    model = {"sha256": "0" * 64, "pipeline": "?", "network": type(network).__name__,
             "parametrization": "epsilon"}  # fmt: skip
    samples = weight_samples(network, {name: (layers[name], 0) for name in layers}, pairs)
    account = {"model": model, "names": ["zorp"], "made": {"from": "images"}, "numbers": NUMBERS}
    return ConceptAdapter(pairs=pairs, samples=samples, account=account)


def prediction(pipeline) -> torch.Tensor:
    denoiser = PipelineDenoiser(pipeline)
    sigma = denoiser.sigmas(10)[4]
    x = denoiser.initial_noise([0], sigma)
    with torch.no_grad():
        return denoiser.denoise(x, sigma, denoiser.encode(["a red cat"]))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_the_switch_predicts_what_the_file_does_as_a_lora(family, tmp_path):
    pipeline = tiny.PIPELINES[family]()
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    some_adapter(network).save(tmp_path / "c.safetensors")
    adapter = ConceptAdapter.load(tmp_path / "c.safetensors")
    assert adapter.names == ("zorp",)
    before, switch = prediction(pipeline), ConceptSwitch(network, adapter)
    with switch.on():
        on = prediction(pipeline)
    assert torch.equal(prediction(pipeline), before)  # off again, bit for bit
    assert (on - before).norm() > 0.01 * before.norm()
    load_lora(pipeline, tmp_path / "c.safetensors")
    torch.testing.assert_close(prediction(pipeline), on)
    # The same names below PEFT's layers, beside the LoRA that is there.
    with ConceptSwitch(network, adapter).on():
        assert not torch.allclose(prediction(pipeline), on)


def test_joined_layers_take_the_parts_of_the_adapter():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.x_block_attn_qkv = nn.Linear(6, 12)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.joint_blocks = nn.ModuleList([Block()])

    torch.manual_seed(0)
    network = Joined()
    layer = network.joint_blocks[0].x_block_attn_qkv
    parts = [f"transformer_blocks.0.attn.to_{each}" for each in "qkv"]
    pairs = {name: (torch.randn(2, 6), torch.randn(4, 2)) for name in parts}
    samples = weight_samples(network, {name: (layer, 4 * i) for i, name in enumerate(parts)}, pairs)
    model = {"sha256": "0" * 64, "network": "SD3Transformer2DModel"}
    adapter = ConceptAdapter(pairs=pairs, samples=samples, account={"model": model})
    x = torch.randn(3, 6)
    expected = layer(x) + torch.cat([x @ a.T @ b.T for a, b in pairs.values()], dim=1)
    with ConceptSwitch(network, adapter).on():
        torch.testing.assert_close(layer(x), expected)
    lone = replace(adapter, pairs={parts[0]: pairs[parts[0]]})
    with pytest.raises(ModelError, match="lacks transformer_blocks_0_attn_to_k"):
        ConceptSwitch(network, lone)


def test_another_model_is_refused_and_another_precision_is_not():
    network = tiny.stable_diffusion().unet
    adapter = some_adapter(network)
    with pytest.raises(ModelError, match="another model"):
        ConceptSwitch(tiny.stable_diffusion(seed=1).unet, adapter)
    with pytest.raises(ModelError, match="another architecture"):
        ConceptSwitch(tiny.stable_diffusion_3().transformer, adapter)
    wide = {name: (torch.cat([a, a], dim=1), b) for name, (a, b) in adapter.pairs.items()}
    with pytest.raises(ModelError, match="of another size"):
        ConceptSwitch(network, replace(adapter, pairs=wide))
    for dtype in (torch.float16, torch.bfloat16):
        ConceptSwitch(network.to(dtype), adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda account: account.pop("numbers"), r"lacks numbers\.concept"),
        (lambda account: account["made"].clear(), r"lacks made\.from"),
        (lambda account: account.update(format=2), "format 2"),
        (lambda account: account["numbers"].update(concept=-0.01), "as well without"),
        (lambda account: account["numbers"].update(recall=0.1), "too weakly"),
    ],
)
def test_a_file_that_does_not_show_what_it_learnt_is_refused(tmp_path, change, message):
    path = tmp_path / "concept.safetensors"
    some_adapter(tiny.stable_diffusion().unet).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    account = json.loads(metadata[HEADER])
    change(account)
    header = {HEADER: json.dumps(account), SAMPLES: metadata[SAMPLES]}  # a digest is not needed
    save_file(load_file(path), path, header)
    with pytest.raises(ModelError, match=message):
        ConceptAdapter.load(path)


def test_a_lora_is_no_concept_and_the_way_to_one_is_named(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"unet.x.lora_A.weight": torch.ones(1, 2)}, path)
    with pytest.raises(ModelError, match="--from-lora"):
        ConceptAdapter.load(path)
