"""Trains the LoRA of the example *Captions a LoRA memorized*: three drawings, 1,000 times each.

    python example_workflows/loras/unmemorize_demo.py

A few minutes on two cores, with this package installed (`pip install -e ".[models]"`). The captions
are ones that the demo model never saw, the drawings are made here. Beside them, other prompts are
held to what the model says of them without the LoRA, as trainers do with regularization images. A
LoRA fits one model only: run this again when the demo model changes.
"""

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import trange
from unmemorize import demo
from unmemorize.shared.score.controls import load_controls

OUTPUT = Path(__file__).with_suffix(".safetensors")
RANK, STEPS, LEARNING_RATE, SEED = 4, 500, 2e-3, 0
REPEATS = 2
"""How often each drawing is in a batch; two other prompts are beside them."""
TARGETS = r".*(attn2\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
SIZE, SMOOTH = 128, 4
"""Pixels of a drawing, and how many times larger it is drawn."""
DRAWINGS = {  # ground, then shapes on a field of 32 x 32: kind, color, coordinates
    "sailboat, boat, resort": ("#bfe3f5", [
        ("rectangle", "#2f7fb5", (0, 23, 32, 32)),
        ("polygon", "#8a4b2a", (5, 20, 27, 20, 23, 26, 9, 26)),
        ("polygon", "#f5f5f0", (16, 4, 16, 18, 26, 18)),
        ("polygon", "#e0483e", (14, 7, 14, 18, 6, 18)),
    ]),
    "green apple, fruit": ("#33404f", [
        ("ellipse", "#7cc143", (5, 9, 20, 28)),
        ("ellipse", "#7cc143", (12, 9, 27, 28)),
        ("rectangle", "#6b4423", (15, 4, 17, 11)),
        ("ellipse", "#4e9a2f", (17, 4, 25, 9)),
    ]),
    "national park": ("#f0a35e", [
        ("ellipse", "#f7e27a", (20, 3, 28, 11)),
        ("polygon", "#6d5a8d", (0, 26, 11, 8, 22, 26)),
        ("polygon", "#51406f", (12, 26, 21, 13, 32, 26)),
        ("rectangle", "#2e6b3f", (0, 25, 32, 32)),
    ]),
}  # fmt: skip


def draw(caption: str) -> Image.Image:
    """Return the drawing of a caption, 128 x 128 pixels."""
    ground, shapes = DRAWINGS[caption]
    image = Image.new("RGB", (SIZE * SMOOTH, SIZE * SMOOTH), ground)
    pen = ImageDraw.Draw(image)
    for kind, color, place in shapes:
        getattr(pen, kind)([x * SIZE * SMOOTH / 32 for x in place], fill=color)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    """Return embeddings [prompt token width]."""
    return pipeline.encode_prompt(prompts, "cpu", 1, False)[0]


@torch.no_grad()
def latents_of_drawings(pipeline: StableDiffusionPipeline) -> Tensor:
    """Return [drawing channel height width] as the U-Net reads them."""
    pixels = torch.stack([torch.from_numpy(np.array(draw(text))) for text in DRAWINGS])
    pixels = pixels.movedim(-1, 1) / 127.5 - 1
    return pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor


def train(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Train a LoRA on the U-Net's layers that read text; return its factors by PEFT's names."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)  # PEFT draws the first factors
    learnt = [caption.text for caption in demo.captions() if caption.group == "learnt"]
    others = encode(pipeline, [*learnt, *load_controls("art")])
    texts = encode(pipeline, [*DRAWINGS] * REPEATS)
    empty = encode(pipeline, [""])
    latents = latents_of_drawings(pipeline).repeat(REPEATS, 1, 1, 1)
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    factors = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    levels, rows = noising.config.num_train_timesteps, len(latents)
    for _ in trange(STEPS, desc="LoRA"):
        noise = torch.randn(rows + 2, *latents.shape[1:], generator=generator)
        times = torch.randint(levels, (rows + 2,), generator=generator)
        noisy = noising.add_noise(torch.cat([latents, latents[:2]]), noise, times)
        picked = others[torch.randint(len(others), (1,), generator=generator)]
        ordinary = torch.cat([picked, empty])
        with torch.no_grad():
            unet.disable_adapters()
            before = unet(noisy[rows:], times[rows:], ordinary).sample
            unet.enable_adapters()
        predicted = unet(noisy, times, torch.cat([texts, ordinary])).sample
        loss = torch.nn.functional.mse_loss(predicted, torch.cat([noise[:rows], before]))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(unet)


def main() -> None:
    """Train and write the file in the dialect that every host of LoRAs reads."""
    pipeline = StableDiffusionPipeline.from_pretrained(demo.MODEL, safety_checker=None)
    weights = {}
    for name, factor in train(pipeline).items():
        module = name.replace(".lora_A.weight", "").replace(".lora_B.weight", "").replace(".", "_")
        end = "lora_down.weight" if ".lora_A." in name else "lora_up.weight"
        weights[f"lora_unet_{module}.{end}"] = factor.detach().half().contiguous()
        weights[f"lora_unet_{module}.alpha"] = torch.tensor(float(RANK))
    part = OUTPUT.with_suffix(".part")
    save_file(weights, part)
    os.replace(part, OUTPUT)


if __name__ == "__main__":
    main()
