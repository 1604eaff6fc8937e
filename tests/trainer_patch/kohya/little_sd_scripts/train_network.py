"""A training in the order of sd-scripts' v0.8: what calls what, and nothing else of it.

The text side is the demo model's, the network two layers that read text and one that does not.
"""

import argparse
import importlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from library import train_util
from torch import nn

DEMO = Path(__file__).resolve().parents[4] / "demo" / "model"
CAPTIONS = ("postage stamp, sushi", "playing card, foggy", "a red house", "museum poster, tram")


class Info:
    """One image."""

    def __init__(self, number):
        self.caption, self.absolute_path = CAPTIONS[number], f"images/{number}.png"
        self.latents = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(number))


class Dataset(torch.utils.data.Dataset):
    """Batches of two, as sd-scripts' datasets give them."""

    def __init__(self, tokenizer):
        self.tokenizers, self.debug_dataset = [tokenizer], False
        self.image_data = {f"key {number}": Info(number) for number in range(len(CAPTIONS))}

    def get_input_ids(self, caption, tokenizer):
        return tokenizer(
            caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids

    def __len__(self):
        return len(self.image_data) // 2

    def __getitem__(self, index):
        keys = list(self.image_data)[2 * index : 2 * index + 2]
        infos = [self.image_data[key] for key in keys]
        ids = [self.get_input_ids(info.caption, self.tokenizers[0]) for info in infos]
        example = {
            "input_ids": torch.stack(ids), "loss_weights": torch.ones(2),
            "latents": torch.stack([info.latents for info in infos]),
        }  # fmt: skip
        return example | ({"image_keys": keys} if self.debug_dataset else {})


class Group:
    """Several datasets, here one."""

    def __init__(self, dataset):
        self.datasets = [dataset]


class Unet(nn.Module):
    """Adds to the picture what two layers read in the text."""

    def __init__(self):
        super().__init__()
        self.attn2_to_k, self.attn2_to_v = nn.Linear(128, 4), nn.Linear(128, 4)
        self.attn1_to_q = nn.Linear(4, 4)

    def forward(self, x, timesteps, text):
        read = (self.attn2_to_k(text).tanh() * self.attn2_to_v(text)).mean(1)
        return x + self.attn1_to_q(read)[:, :, None, None]


class NetworkTrainer:
    """The methods that trainers of sd-scripts share."""

    is_sdxl = False

    def is_train_text_encoder(self, args):
        return not args.network_train_unet_only

    def get_text_cond(self, args, accelerator, batch, tokenizers, text_encoders, weight_dtype):
        return text_encoders[0](batch["input_ids"].flatten(0, 1))[0]

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch,
                  weight_dtype):  # fmt: skip
        return unet(noisy_latents, timesteps, text_conds)

    def all_reduce_network(self, accelerator, network):
        pass

    def generate_step_logs(self, args, current_loss):
        return {"loss/current": current_loss}

    def train(self, args):
        from transformers import CLIPTextModel, CLIPTokenizer

        set_seed(args.seed)
        train_dataset_group = Group(Dataset(CLIPTokenizer.from_pretrained(DEMO / "tokenizer")))
        dataset = train_dataset_group.datasets[0]
        accelerator = Accelerator(cpu=True)
        weight_dtype = torch.float32
        text_encoder = CLIPTextModel.from_pretrained(DEMO / "text_encoder").float().eval()
        text_encoders, unet, vae = [text_encoder], Unet(), None
        network_module = importlib.import_module(args.network_module)
        net_kwargs = dict(pair.split("=") for pair in args.network_args or ())
        if args.dim_from_weights:
            network, _ = network_module.create_network_from_weights(
                1, args.network_weights, vae, text_encoder, unet, **net_kwargs
            )
        else:
            net_kwargs.setdefault("dropout", None)
            network = network_module.create_network(
                1.0, 4, 1.0, vae, text_encoder, unet, neuron_dropout=None, **net_kwargs
            )
        network.apply_to(text_encoder, unet, self.is_train_text_encoder(args), True)
        unet.requires_grad_(False)
        text_encoder.requires_grad_(False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        network, optimizer = accelerator.prepare(network, optimizer)
        accelerator.unwrap_model(network).prepare_grad_etc(text_encoder, unet)
        start = 0
        if args.resume:
            accelerator.load_state(args.resume)
            start = int(Path(args.resume).name)
        metadata = {"ss_network_module": args.network_module}
        if args.network_args:
            metadata["ss_network_args"] = json.dumps(net_kwargs)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        logged = []

        def save_model(name):
            file = str(Path(args.output_dir) / f"{name}.safetensors")
            accelerator.unwrap_model(network).save_weights(file, weight_dtype, dict(metadata))

        for epoch in range(start, args.max_train_epochs):
            accelerator.unwrap_model(network).on_epoch_start(text_encoder, unet)
            for batch in (dataset[index] for index in range(len(dataset))):
                with accelerator.accumulate(network):
                    text = self.get_text_cond(
                        args, accelerator, batch, dataset.tokenizers, text_encoders, weight_dtype
                    )
                    noise = torch.randn_like(batch["latents"])
                    timesteps = torch.randint(0, 1000, (2,))
                    noisy = batch["latents"] + noise
                    with accelerator.autocast():
                        pred = self.call_unet(
                            args, accelerator, unet, noisy, timesteps, text, batch, weight_dtype
                        )
                    loss = (pred - noise).square().mean([1, 2, 3])
                    loss_weights = batch["loss_weights"]
                    loss = (loss * loss_weights).mean()
                    accelerator.backward(loss)
                    self.all_reduce_network(accelerator, network)
                    accelerator.clip_grad_norm_(network.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                logged.append(self.generate_step_logs(args, loss.item()))
            if epoch + 1 < args.max_train_epochs:
                save_model(f"{args.output_name}-{epoch + 1}")
                accelerator.save_state(str(Path(args.output_dir) / str(epoch + 1)))
        accelerator.end_training()
        (Path(args.output_dir) / "logs.json").write_text(json.dumps(logged))
        save_model(args.output_name)


def setup_parser():
    parser = argparse.ArgumentParser()
    for name in ("config_file", "output_dir", "output_name", "network_module", "network_weights",
                 "resume", "save_model_as", "min_timestep", "max_timestep"):  # fmt: skip
        parser.add_argument(f"--{name}")
    parser.add_argument("--network_args", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max_train_epochs", type=int, default=3)
    for name in ("network_train_unet_only", "dim_from_weights", "no_metadata",
                 "v_parameterization", "deepspeed"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true")
    return parser


if __name__ == "__main__":
    parser = setup_parser()
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    NetworkTrainer().train(args)
