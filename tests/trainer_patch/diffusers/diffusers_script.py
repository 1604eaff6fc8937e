"""A LoRA training in the manner of diffusers' text-to-image script, small enough for tests.

It knows nothing of this package: the launcher finds what it needs through the libraries.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer


def parse_args():
    parser = argparse.ArgumentParser()
    for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--lora_layers", default="to_k,to_q,to_v,to_out.0")
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--report_to")
    parser.add_argument("--resume_from_checkpoint")
    for name, value in (("train_batch_size", 2), ("max_train_steps", 4), ("seed", 0),
                        ("gradient_accumulation_steps", 1), ("checkpointing_steps", 1000),
                        ("dataloader_num_workers", 0)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("gradient_checkpointing", "with_prior_preservation", "train_text_encoder",
                 "use_dora", "validate", "never_step"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


class Images(Dataset):
    """Latents drawn from each image's name, with random noise on top: augmentation."""

    def __init__(self, folder, tokenizer):
        self.instance_images_path = sorted(folder.glob("*.png"))
        captions = json.loads((folder / "captions.json").read_text("utf-8"))
        self.custom_instance_prompts = [captions[path.name] for path in self.instance_images_path]
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.instance_images_path)

    def __getitem__(self, index):
        own = torch.Generator().manual_seed(index)
        tokens = self.tokenizer(
            self.custom_instance_prompts[index], padding="max_length", truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        latents = torch.randn(4, 8, 8, generator=own) + 0.1 * torch.randn(4, 8, 8)
        return {"latents": latents, "input_ids": tokens.input_ids[0]}


def main():
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir,
        cpu=True,
    )  # fmt: skip
    set_seed(args.seed)
    path = args.pretrained_model_name_or_path
    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    for part in (unet, text_encoder):
        part.requires_grad_(False)
        part.to(dtype=dtype)
    unet.add_adapter(LoraConfig(
        r=4, lora_alpha=4, lora_dropout=0.2, init_lora_weights="gaussian",
        target_modules=args.lora_layers.split(","), use_dora=args.use_dora,
    ))  # fmt: skip
    cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    factors = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=1e-2)
    loader = DataLoader(
        Images(Path(args.train_data_dir), tokenizer), shuffle=True,
        batch_size=args.train_batch_size, num_workers=args.dataloader_num_workers,
    )  # fmt: skip
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    def save_model_hook(models, weights, folder):
        weights.clear()
        save(accelerator.unwrap_model(unet), folder)

    def load_model_hook(models, folder):
        models.clear()
        state, _ = StableDiffusionPipeline.lora_state_dict(folder)
        state = {key.removeprefix("unet."): value for key, value in state.items()}
        set_peft_model_state_dict(accelerator.unwrap_model(unet), state)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    accelerator.init_trackers("test", config=vars(args))
    step, first_epoch = 0, 0
    if args.resume_from_checkpoint:
        accelerator.load_state(str(Path(args.output_dir) / args.resume_from_checkpoint))
        step = int(args.resume_from_checkpoint.split("-")[1])
        first_epoch = step // len(loader)
    bar = tqdm(total=args.max_train_steps, initial=step, desc="Steps")
    for _ in range(first_epoch, args.max_train_steps):
        for batch in loader:
            with accelerator.accumulate(unet):
                latents, tokens = batch["latents"].to(dtype), batch["input_ids"]
                if args.with_prior_preservation:
                    latents, tokens = latents.repeat(2, 1, 1, 1), tokens.repeat(2, 1)
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),))
                noisy = scheduler.add_noise(latents, noise, timesteps)
                text = text_encoder(tokens)[0]
                prediction = unet(noisy, timesteps, text, return_dict=False)[0].float()
                loss = F.mse_loss(prediction, noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(factors, 1.0)
                if not args.never_step:
                    optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                bar.update(1)
                if step % args.checkpointing_steps == 0:
                    accelerator.save_state(str(Path(args.output_dir) / f"checkpoint-{step}"))
            bar.set_postfix(loss=loss.item(), lr=1e-2)
            accelerator.log({"train_loss": loss.item()}, step=step)
            if step >= args.max_train_steps:
                break
        if args.validate:
            sample(path, accelerator.unwrap_model(unet))
        if step >= args.max_train_steps:
            break
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save(accelerator.unwrap_model(unet), args.output_dir)
    accelerator.end_training()


def save(unet, folder):
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet)
    )


def sample(path, unet):
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae")
    pipeline = StableDiffusionPipeline.from_pretrained(path, unet=unet, vae=vae)
    pipeline("a tree", num_inference_steps=2, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
