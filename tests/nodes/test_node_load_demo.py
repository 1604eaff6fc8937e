"""The demo model in ComfyUI is the demo model in diffusers: the same weights, the same numbers."""

import numpy as np
import pytest
import torch
from comfyui import newest, node, pack
from demo_side import caption, denoiser

pytestmark = pytest.mark.comfy
PROMPTS = [caption(), caption("held_out"), "Café, (paren) 123 " + "word " * 90, ""]
DEMO = node("UnmemorizeLoadDemoModel")


def predictions(prompts: list, x: np.ndarray, sigmas: list) -> np.ndarray:
    """Return ComfyUI's x0-predictions [prompt sigma *latent] of the same x."""
    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            cond = clip.encode_from_tokens(clip.tokenize(prompt))[:, :77]
            for sigma in sigmas:
                args = torch.from_numpy(x), torch.tensor([sigma])
                rows.append(model.model.apply_model(*args, c_crossattn=cond))
    return torch.cat(rows).view(len(prompts), len(sigmas), *x.shape[1:])


def test_noise_predictions_agree(comfy):
    theirs, prompts = denoiser(), PROMPTS[:2]
    sigmas = theirs.sigmas(50)[[0, 10, 40]].tolist()
    x = theirs.initial_noise([0], torch.tensor(sigmas[0]))
    found = comfy.call(predictions, prompts, x.numpy(), sigmas)
    cond = theirs.encode(prompts)
    for row, prompt in enumerate(prompts):
        for column, sigma in enumerate(sigmas):
            with torch.no_grad():
                x0 = theirs.denoise(x, torch.tensor(sigma), cond[[row]])
            # Attention and normalisation sum in another order; 1e-5 of the noise's deviation of 1.
            noise, other = (
                (x - x0)[0] / sigma,
                (x[0] - torch.from_numpy(found[row, column])) / sigma,
            )
            torch.testing.assert_close(other, noise, rtol=0, atol=1e-5, msg=prompt)
    assert np.abs(found[0] - found[1]).max() > 0.1  # the prompt is read at all


def test_embeddings_agree(comfy):
    graph = {"1": DEMO}
    for index, prompt in enumerate(PROMPTS):
        graph[f"text{index}"] = node("CLIPTextEncode", text=prompt, clip=["1", 1])
    run = comfy.run(graph, keep={str(i): [f"text{i}", 0] for i in range(len(PROMPTS))})
    for index, prompt in enumerate(PROMPTS):
        embeddings = torch.from_numpy(run[str(index)][0][0])
        if index == 2:  # too long: diffusers cuts it, ComfyUI reads on in further chunks of 77
            assert embeddings.shape[1] > 77
            continue
        expected = denoiser().encode([prompt]).embeddings
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5, msg=prompt)


def roundtrip(latent: np.ndarray) -> dict:
    _, _, vae = pack("nodes.engine.demo_model").load_model()
    with torch.inference_mode():
        image = vae.decode(torch.from_numpy(latent))
        return {"image": image, "latent": vae.encode(image)}


def test_autoencoders_agree(comfy):
    vae = denoiser().pipeline.vae
    latent = 5 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = comfy.call(roundtrip, latent.numpy())
    with torch.no_grad():
        image = (vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
        again = vae.encode(image * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(
        torch.from_numpy(found["image"]).movedim(-1, 1), image, rtol=0, atol=1e-5
    )
    # Latents before their scaling have a deviation of about 5.
    torch.testing.assert_close(torch.from_numpy(found["latent"]), again, rtol=0, atol=5e-4)
    assert image.std() > 0.05


def test_an_image_of_ksampler_is_that_of_the_pipeline(comfy):
    steps, seed = 20, 3
    prompt = caption("held_out")  # a memorized one brings the same image from every seed
    graph = {
        "1": DEMO,
        "2": node("CLIPTextEncode", text=prompt, clip=["1", 1]),
        "3": node("CLIPTextEncode", text="", clip=["1", 1]),
        "4": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "5": node(
            "KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0],
            latent_image=["4", 0], seed=seed, steps=steps, cfg=5.0, sampler_name="euler",
            scheduler="ddim_uniform", denoise=1.0,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
    }  # fmt: skip
    image = comfy.run(graph, keep={"image": ["6", 0]})["image"][0]
    theirs = denoiser().generate([prompt], [seed], steps=steps, cond_scale=5.0)[0]
    other = denoiser().generate([prompt], [seed + 1], steps=steps, cond_scale=5.0)[0]
    # The two start at noise * sigma and noise * sqrt(1 + sigma^2), and end at sigma 0 and 0.03.
    assert distance(image, theirs) < 0.03
    assert distance(image, other) > 2 * distance(image, theirs)


def distance(image: np.ndarray, other: object) -> float:
    """Return the mean difference of pixels, 0 to 1."""
    return float(np.abs(image - np.asarray(other, dtype=np.float32) / 255).mean())


def spoiled(folder: str) -> str:
    import shutil
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    model = pack("nodes.engine.demo_model")
    shutil.copytree(model.FOLDER, folder)
    file = Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("conv_in.weight")
    save_file(weights, file)
    try:
        model.load_model(Path(folder))
    except pack("shared.files.weights").ModelError as error:
        return str(error)


@newest
def test_a_missing_weight_is_refused(comfy, tmp_path):
    assert "input_blocks.0.0.weight" in comfy.call(spoiled, str(tmp_path / "model"))


@newest
def test_a_missing_folder_says_what_to_do(comfy, tmp_path):
    assert "clone it whole" in comfy.call(absent, str(tmp_path))


def absent(folder: str) -> str:
    from pathlib import Path

    try:
        pack("nodes.engine.demo_model").load_model(Path(folder))
    except pack("shared.files.weights").ModelError as error:
        return str(error)
