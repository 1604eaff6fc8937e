"""Progress bar and previews of long nodes: what is shown is what the network predicts."""

import numpy as np
import pytest
import torch
from comfyui import pack
from demo_side import caption, denoiser

pytestmark = pytest.mark.comfy


def shown(node: str, method: str, prompt: str) -> dict:
    """Run a node with one seed; return what the bar was told and the images."""
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    told = []

    def hook(value, total, preview, **others):
        told.append((value, total, None if preview is None else np.asarray(preview[1])))

    with torch.inference_mode():
        model, clip, _ = pack("nodes.engine.demo_model").load_model()
        encode = pack("nodes.engine.measuring").encoded
        inputs = {"negative": encode(clip, ""), "latent": {"samples": torch.zeros(1, 4, 16, 16)}}
        inputs |= {"model": model, "seeds": 1, "steps": 1}
        if node == "heatmap":
            cls, inputs = pack("nodes.heatmap").TokenHeatmap, inputs | {
                "clip": clip, "text": prompt, "most": 0, "method": "encoder_gradient"}  # fmt: skip
        else:
            inputs["positive"] = encode(clip, prompt)
            inputs = {name: [value] for name, value in inputs.items()}
            cls = pack("nodes.detect").DetectMemorization
        before = args.preview_method
        args.preview_method = LatentPreviewMethod(method)
        comfy.utils.set_progress_bar_global_hook(hook)
        try:
            cls.execute(**inputs)
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
            args.preview_method = before
    return {
        "told": [(value, total) for value, total, _ in told],
        "images": [image for *_, image in told if image is not None],
        "colors": model.model.latent_format.latent_rgb_factors,
    }


def test_the_image_is_the_prediction_of_diffusers(comfy):
    done = comfy.call(shown, "detect", "latent2rgb", caption())
    assert done["told"] == [(1, 2), (2, 2)]
    theirs, sigma = denoiser(), denoiser().sigmas(50)[0]
    x = theirs.initial_noise([0], sigma)
    with torch.no_grad():
        predictions = [theirs.denoise(x, sigma, theirs.encode([p]))[0] for p in ("", caption())]
    for image, x0 in zip(done["images"], predictions, strict=True):
        colors = torch.einsum("chw,cr->hwr", x0, torch.tensor(done["colors"]))
        expected = (colors / 2 + 0.5).clamp(0, 1) * 255
        assert np.abs(image - expected.numpy()).max() < 1.5  # rounded down, and float tolerance
    assert np.abs(done["images"][0].astype(int) - done["images"][1]).max() > 20


def test_without_previews_the_bar_moves_and_nothing_is_drawn(comfy):
    done = comfy.call(shown, "detect", "none", caption())
    assert done["told"][-1] == (2, 2)
    assert done["images"] == []


def write_previewer() -> None:
    """Put a small autoencoder of random weights where ComfyUI looks for TAESD."""
    from pathlib import Path

    import folder_paths
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import save_file

    folder = Path(folder_paths.models_dir) / "vae_approx"
    folder.mkdir(exist_ok=True)
    weights = TAESD(latent_channels=4).taesd_decoder.state_dict()
    weights = {name: 0.05 * torch.randn(weight.shape) for name, weight in weights.items()}
    save_file(weights, folder / "taesd_decoder.safetensors")


def test_a_previewer_with_weights_runs_beside_gradients(comfy):
    comfy.call(write_previewer)
    done = comfy.call(shown, "heatmap", "taesd", caption())
    assert [image.shape for image in done["images"]] == [(128, 128, 3)] * 2
