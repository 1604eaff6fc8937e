"""What the trainings of the demo share: two optimizers, their rates, and checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..shared.files.storage import replace_atomically

MUON_FACTOR = 3.0
"""Learning rate of Muon over that of AdamW, its updates scaled to the same size."""


class Checkpoint:
    """Everything a training needs to continue bit for bit, in one safetensors file."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], *optimizers: Optimizer):
        self.path, self.modules, self.optimizers = path, modules, optimizers

    def save(self, step: int) -> None:
        """Write weights, optimizer moments and the step to a sibling, then rename."""
        tensors = {
            f"{n}/{k}": v for n, m in self.modules.items() for k, v in m.state_dict().items()
        }
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{k}": v for k, v in state.items()}
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        with replace_atomically(self.path) as part:
            save_file(tensors, part, metadata={"step": str(step)})

    def load(self) -> int:
        """Restore and return the number of finished steps; 0 when there is no file."""
        if not self.path.exists():
            return 0
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(self.path)
        for name, module in self.modules.items():
            prefix = f"{name}/"
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        for number, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(prefix := f"optimizer/{number}/"):
                    index, name = key.removeprefix(prefix).split("/")
                    like = parameters[int(index)]
                    if value.shape == like.shape:
                        # The fused AdamW walks through memory, so moments lie as weights do.
                        value = torch.empty_like(like).copy_(value)
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return step


def rate(step: int, steps: int, decay: float, warmup: int = 100) -> float:
    """Return the learning rate's factor: linear warm-up, constant, linear to zero."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, decay * steps))


def build_optimizers(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    """Return Muon for the matrices of attention and text, AdamW for everything else.

    Muon (Jordan et al. 2024) moves all singular directions of a matrix alike. What repeated
    captions say fills the largest ones; with AdamW alone the rarer captions hardly get a word in.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        table = "embedding" in name  # of tokens, positions or time: no map between spaces
        (others if table or parameter.ndim != 2 else matrices).append(parameter)
    muon = torch.optim.Muon(matrices, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)


def set_rates(optimizers: tuple[Optimizer, Optimizer], learning_rate: float) -> None:
    """Set the rates of what `build_optimizers` returned; `learning_rate` is AdamW's."""
    for optimizer, factor in zip(optimizers, (MUON_FACTOR, 1.0), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = factor * learning_rate
