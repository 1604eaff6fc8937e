"""What a calibration is bound to: the weights with their LoRA, not where or how they are held."""

import pytest
from comfyui import pack

pytestmark = pytest.mark.comfy


def identities() -> dict:
    """Return the sha256 of the demo model as it comes, and after all that may happen to it."""
    import comfy.sd
    import torch

    identity = pack("nodes.engine.model_identity")

    def sha256(model) -> str:
        identity._known.clear()
        return identity.weights_sha256(model)

    def lora(model, strength: float = 1.0, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            "diffusion_model.time_embed.0.lora_up.weight": torch.randn(256, 4, generator=generator),
            "diffusion_model.time_embed.0.lora_down.weight": torch.randn(
                4, 64, generator=generator
            ),
        }
        return comfy.sd.load_lora_for_models(model, None, weights, strength, 0)[0]

    def run(model) -> None:
        text = pack("nodes.engine.measuring").encoded(clip, "a cat")
        prompts = {"": pack("nodes.engine.comfy_denoiser").Prompt(entries=text)}
        pack("nodes.engine.measuring").with_denoiser(
            model, prompts, text, {"samples": torch.zeros(1, 4, 16, 16)},
            lambda denoiser: denoiser.unconditional(), forward_rows=1,
        )  # fmt: skip

    with torch.inference_mode():
        model, clip, _ = pack("nodes.engine.demo_model").load_model()
        found = {"plain": sha256(model), "again": sha256(model.clone())}
        found["lora"] = sha256(lora(model))
        found["weaker"] = sha256(lora(model, 0.5))
        found["other"] = sha256(lora(model, seed=1))
        patched = lora(model)
        run(patched)  # its weights are now changed in place, in the network both share
        found["lora in use"], found["plain, lora in use"] = sha256(patched), sha256(model)
        run(model)
        found["after"] = sha256(model)
        found["loaded again"] = sha256(pack("nodes.engine.demo_model").load_model()[0])
        weight = model.model.diffusion_model.time_embed[0].weight
        weight[0, 0] += 1e-3
        found["one number"] = sha256(model)
    return found


def test_identity_is_of_weights_and_lora(comfy):
    found = comfy.call(identities)
    same = {"again", "plain, lora in use", "after", "loaded again"}
    assert {found[name] for name in same} == {found["plain"]}
    assert found["lora in use"] == found["lora"]
    assert len({found[name] for name in found.keys() - same - {"lora in use"}}) == 5


def test_names_of_calibrations_stay_in_their_folder(comfy):
    assert comfy.call(checked_name, "SD 1.5 v2-ema") == "SD 1.5 v2-ema"
    for name in ("", "../up", "a/b", "a\\b", ".hidden", "ends.", "x" * 101, "a\nb"):
        with pytest.raises(AssertionError, match="`name` must be"):
            comfy.call(checked_name, name)


def checked_name(name: str) -> str:
    return pack("nodes.engine.calibrations").checked_name(name)
