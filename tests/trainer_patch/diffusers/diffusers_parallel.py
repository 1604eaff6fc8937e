"""A loop of one's own whose samples, noise and timesteps do not depend on how many processes run.

``torchrun --nproc_per_node N diffusers_parallel.py MODEL OUTPUT KEY=VALUE ...``
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.trainer_patch.diffusers.loop import protect

BATCH, STEPS = 4, 5
CAPTIONS = [f"a drawing of a {word}" for word in "tree cat house boat dog star moon fish".split()]


def main(model, output, *options):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)  # one LoRA in all processes
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    factors = [each for each in pipeline.unet.parameters() if each.requires_grad]
    network, optimizer = accelerator.prepare(pipeline.unet, torch.optim.SGD(factors, lr=1.0))
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    path = Path(output) / "pytorch_lora_weights.safetensors"
    asked = dict(option.split("=", 1) for option in options)
    with protect(pipeline, optimizer, output=path, accelerator=accelerator, **asked) as loop:
        for step in range(STEPS):
            everyone = [(step * BATCH + row) % len(CAPTIONS) for row in range(BATCH)]
            own = everyone[accelerator.process_index :: accelerator.num_processes]
            draws = [torch.Generator().manual_seed(100 * step + index) for index in own]
            latents, noise = (
                torch.stack([torch.randn(4, 8, 8, generator=draw) for draw in draws])
                for _ in range(2)
            )
            timesteps = torch.cat([torch.randint(0, 1000, (1,), generator=draw) for draw in draws])
            text = torch.cat([
                pipeline.encode_prompt(CAPTIONS[index], "cpu", 1, False)[0] for index in own
            ])  # fmt: skip
            loop.samples = [Sample(file=str(index), caption=CAPTIONS[index]) for index in own]
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = network(noisy, timesteps, text, return_dict=False)[0]
            accelerator.backward(F.mse_loss(prediction, loop.target(noise, latents)))
            accelerator.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.is_main_process:
            state = get_peft_model_state_dict(pipeline.unet)
            StableDiffusionPipeline.save_lora_weights(output, unet_lora_layers=state)
            loop.stamp(path)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
