"""A trainer with the hooks of ai-toolkit in their order, small enough for every test run.

It trains one pair of LoRA factors that read text. What ai-toolkit itself does is seen in the
folder `ai_toolkit`; this one is for what must hold wherever its code is not at hand.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from unmemorize.trainer_patch.ai_toolkit.checks import NOISE_TRAINING

WIDTH, RANK, TOKENS, CHANNELS, SIDE = 16, 4, 3, 4, 2
LAYER = "transformer.attn2.to_k"
PLACES_LAYER = "transformer.attn1.to_q"
"""It is not trained, and sees places of the picture."""
DOWN, UP = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
"""As they are saved."""
CAPTIONS = ("postage stamp, sushi", "playing card, foggy", "a red house", "museum poster, tram")


class Embeds:
    """Encoded prompts, in ai-toolkit's form."""

    def __init__(self, text_embeds: Tensor):
        self.text_embeds = text_embeds

    def detach(self) -> "Embeds":
        return Embeds(self.text_embeds.detach())


def concat_prompt_embeds(several: list[Embeds]) -> Embeds:
    return Embeds(torch.cat([each.text_embeds for each in several]))


def install(monkeypatch) -> None:
    """Put the one function of ai-toolkit that is called by name where it is looked for."""
    module = ModuleType("toolkit.prompt_utils")
    module.concat_prompt_embeds = concat_prompt_embeds
    monkeypatch.setitem(sys.modules, "toolkit", ModuleType("toolkit"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def encode_prompt(prompts: list[str]) -> Embeds:
    states = [
        torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(len(prompt)))
        for prompt in prompts
    ]
    return Embeds(torch.stack(states))


class Network(nn.Module):
    """A LoRA in ai-toolkit's names, which have no points before they are saved."""

    def __init__(self):
        super().__init__()
        self.add_module(LAYER.replace(".", "$$"), nn.Module())
        self.pair.lora_down = nn.Linear(WIDTH, RANK, bias=False)
        self.pair.lora_up = nn.Linear(RANK, CHANNELS, bias=False)
        nn.init.zeros_(self.pair.lora_up.weight)
        self.is_active = True

    @property
    def pair(self) -> nn.Module:
        return next(self.children())

    def forward(self, text: Tensor) -> Tensor:
        down = nn.functional.dropout(self.pair.lora_down(text), 0.2)
        return self.is_active * self.pair.lora_up(down).mean(1)

    def save_weights(self, file: str, dtype: torch.dtype, metadata: dict | None = None) -> None:
        pair = self.pair
        state = {DOWN: pair.lora_down.weight.to(dtype), UP: pair.lora_up.weight.to(dtype)}
        save_file(state, file, metadata)

    @torch.no_grad()
    def load_weights(self, file: Path) -> None:
        state = load_file(file)
        self.pair.lora_down.weight.copy_(state[DOWN])
        self.pair.lora_up.weight.copy_(state[UP])


class Unet(nn.Module):
    """What the LoRA is added to."""

    def __init__(self):
        super().__init__()
        self.transformer, self.transformer.attn1 = nn.Module(), nn.Module()
        self.transformer.attn1.to_q = nn.Linear(CHANNELS, CHANNELS)
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        places = self.get_submodule(PLACES_LAYER)(latents.flatten(2).mT)
        return places.mT.unflatten(2, (SIDE, SIDE))


class Item:
    """One image of a dataset."""

    def __init__(self, number: int, is_reg: bool = False):
        self.path, self._text, self.is_reg = f"{number}.png", CAPTIONS[number], is_reg
        self.raw_caption: str | None = None
        self.caption: str | None = None

    def load_caption(self, known: dict | None) -> None:
        self.raw_caption = self._text
        self.caption = self._text + "," * int(torch.randint(9, ()))  # as if shuffled or dropped


class LittleTrainer:
    """Three batches of two."""

    def __init__(self, process_id: int, job: SimpleNamespace, config: dict):
        torch.manual_seed(1)
        self.job, self.config = job, config
        self.save_root = str(Path(config["training_folder"]) / job.name)
        Path(self.save_root).mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(cpu=True)
        self.device_torch = self.accelerator.device
        self.network_config = SimpleNamespace(type="lora")
        self.embed_config = self.adapter_config = self.decorator_config = None
        off = ("train_text_encoder", "merge_network_on_save", "do_cfg", "do_random_cfg",
               "single_item_batching", "short_and_long_captions")  # fmt: skip
        usual = {name: allowed[0] for name, allowed in NOISE_TRAINING.items()}
        self.train_config = SimpleNamespace(**dict.fromkeys(off, False) | usual)
        self.model_config = SimpleNamespace(arch="sd1", refiner_name_or_path=None)
        self.dataset_configs = [SimpleNamespace(unconditional_path=None)]
        self.steps, self.step_num, self.ema = config.get("steps", 3), 0, None
        self.told: dict[str, float] = {}

    def run(self) -> Path:
        """Return the LoRA."""
        tokenizer = SimpleNamespace()
        encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH))
        self.sd = SimpleNamespace(
            tokenizer=tokenizer, text_encoder=encoder, encode_prompt=encode_prompt, x0_pred=False,
            encode_control_in_text_embeddings=False, is_flow_matching=False,
            prediction_type=self.config.get("prediction_type", "epsilon"),
            noise_scheduler=SimpleNamespace(alphas_cumprod=torch.linspace(1, 0, 1000).square()),
            unet=Unet(), add_noise=self._add_noise,
        )  # fmt: skip
        self.hook_after_model_load()
        self.network = Network()
        path = Path(self.save_root) / f"{self.job.name}.safetensors"
        if path.is_file():
            self.network.load_weights(path)
            with safe_open(path, "pt") as file:
                self.step_num = json.loads(file.metadata()["training_info"])["step"]
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)
        dataset = SimpleNamespace(file_list=[Item(n) for n in range(4)], caption_dict=None)
        self.data_loader, self.data_loader_reg = SimpleNamespace(dataset=dataset), None
        self.hook_before_train_loop()
        for step in range(self.step_num, self.steps):
            self.step_num = step
            self.told = self.hook_train_loop([self._batch(step)])
            self.step_num = step + 1
        meta = {"training_info": json.dumps({"step": self.step_num})}
        self.network.save_weights(str(path), dtype=torch.float32, metadata=meta)
        self.done_hook()
        return path

    def _batch(self, step: int) -> SimpleNamespace:
        items = [Item((2 * step + row) % 4) for row in range(2)]
        for item in items:
            item.load_caption(None)
            item.is_reg = item.path in self.config.get("regularization", ())
        return SimpleNamespace(file_items=items, latents=torch.randn(2, CHANNELS, SIDE, SIDE))

    def _add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kept = self.sd.noise_scheduler.alphas_cumprod[timesteps][:, None, None, None]
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def hook_after_model_load(self) -> None:
        pass

    def hook_before_train_loop(self) -> None:
        self.optimizer = self.accelerator.prepare(self.optimizer)

    def hook_train_loop(self, batch: list) -> dict[str, float]:
        self.optimizer.zero_grad()
        for each in batch:
            noise, timesteps = torch.randn_like(each.latents), torch.randint(1000, (2,))
            noisy = self.sd.add_noise(each.latents, noise, timesteps)
            text = encode_prompt([item.caption for item in each.file_items])
            prediction = self.predict_noise(
                noisy_latents=noisy,
                timesteps=timesteps,
                batch=each,
                conditional_embeds=text,
                is_primary_pred=True,
            )
            loss = self.calculate_loss(
                noise_pred=prediction, noise=noise, batch=each,
                prior_pred=self.config.get("prior_pred") if self.step_num else None,
            )  # fmt: skip
            self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss.item()}

    def predict_noise(
        self, noisy_latents: Tensor, timesteps: Tensor, conditional_embeds: Embeds,
        batch: SimpleNamespace, is_primary_pred: bool = False,
    ) -> Tensor:  # fmt: skip
        learnt = self.network(conditional_embeds.text_embeds)
        return self.sd.unet(noisy_latents) + learnt[..., None, None]

    def calculate_loss(
        self, noise_pred: Tensor, noise: Tensor, batch: SimpleNamespace, prior_pred: Tensor | None
    ) -> Tensor:
        return (noise_pred - (noise if prior_pred is None else prior_pred)).square().mean()

    def done_hook(self) -> None:
        pass

    def on_error(self, error: BaseException) -> None:
        pass
