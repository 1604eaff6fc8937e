"""A model that does not fit: layers wait elsewhere, their LoRA is added as they come; same answers.

There is no GPU here, so the budget that ComfyUI works out for one is given to it; all that follows
from the budget is ComfyUI's own.
"""

import json

import numpy as np
import pytest
from comfyui import pack
from demo_side import caption

pytestmark = pytest.mark.comfy
BUDGET = 2**20
"""Bytes of weights that fit; the U-Net has more than ten times as many."""


def with_lora():
    """Return the demo's MODEL and CLIP, with a random LoRA on every linear layer of the U-Net."""
    import comfy.lora
    import comfy.sd
    import torch

    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    weights, drawn = model.model.state_dict(), torch.Generator().manual_seed(0)
    names = comfy.lora.model_lora_keys_unet(model.model, {}).items()
    names, lora = {key: name for name, key in names if name.startswith("lora_unet_")}, {}
    for key, name in names.items():
        if key in weights and weights[key].ndim == 2:
            up, down = weights[key].shape
            lora[f"{name}.lora_up.weight"] = torch.randn(up, 2, generator=drawn) / up
            lora[f"{name}.lora_down.weight"] = torch.randn(2, down, generator=drawn)
    return *comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 0.0), len(lora) // 2


def measured(text: str, budget: int | None) -> dict:
    """Return what Detect and Heatmap find, how the model was loaded, and its weights after."""
    import comfy.model_management as memory
    import torch

    load, loaded = memory.LoadedModel.model_load, []

    def with_budget(entry, available=0, **others):
        result = load(entry, available if budget is None else budget, **others)
        if entry.model.is_clone(model):  # not the text encoder
            loaded.append((model.model.model_lowvram, model.model.lowvram_patch_counter))
        return result

    with torch.inference_mode():
        model, clip, layers = with_lora()
        before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
        encode = pack("nodes.engine.measuring").encoded
        common = {"model": model, "negative": encode(clip, ""), "seeds": 2, "steps": 1,
                  "latent": {"samples": torch.zeros(1, 4, 16, 16)}}  # fmt: skip
        memory.LoadedModel.model_load = with_budget
        try:
            detect = pack("nodes.detect").DetectMemorization.execute(
                **{key: [value] for key, value in common.items()}, positive=[encode(clip, text)]
            )
            heatmap = pack("nodes.heatmap").TokenHeatmap.execute(
                **common, clip=clip, text=text, most=1, method="encoder_gradient"
            )
        finally:
            memory.LoadedModel.model_load = load
        memory.unload_all_models()
        after = model.model.state_dict()
    return {
        "score": detect.result[1][0],
        "words": heatmap.result[3],
        "loaded": loaded,
        "layers": layers,
        "same": all(torch.equal(before[name], after[name]) for name in before),
        "weights": len(before),
    }


def test_scores_and_gradients_are_those_of_the_whole_model(comfy):
    whole = comfy.call(measured, caption(), None)
    parts = comfy.call(measured, caption(), BUDGET)
    assert not any(partly for partly, _ in whole["loaded"])
    assert all(partly for partly, _ in parts["loaded"])
    patched = [number for _, number in parts["loaded"]]
    assert min(patched) > 0.5 * parts["layers"]  # LoRA on layers that wait
    assert parts["score"] == pytest.approx(whole["score"], rel=1e-5)
    found, expected = (
        [word["significance"] for word in json.loads(done["words"])["words"]]
        for done in (parts, whole)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert whole["same"]
    assert parts["same"]
    assert parts["weights"] > 100
