"""A running training of sd-scripts, as its `train` method holds it, and its trainer's class."""

import argparse
import inspect
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from ...shared.patching import HookMissing

VERSIONS = "sd-scripts v0.8.8, v0.9.1, v0.10.0 and v0.11.1"
"""Those that were tried."""
LOCALS = {
    "trainer": "self",
    "args": "args",
    "accelerator": "accelerator",
    "text_encoders": "text_encoders",
    "dataset": "train_dataset_group",
    "weight_dtype": "weight_dtype",
}
"""What `train` calls them when it makes the network, in every supported version."""
STEP = "get_noise_pred_and_target"
"""Method whose call gives a step's prediction with its target; since v0.10."""
NETWORKS = ("unet", "dit")
"""What that method may call the network that it is given."""


def base_of(trainer: type) -> type:
    """Return `NetworkTrainer`, from which every trainer class of sd-scripts derives."""
    return next(c for c in trainer.__mro__ if c.__name__ == "NetworkTrainer")


def prediction_of(trainer: type) -> str:
    """Return the method whose call gives a step's prediction, and whose repetition another one."""
    own, base = (getattr(each, STEP, None) for each in (trainer, base_of(trainer)))
    return "call_unet" if own is base else STEP


def has_unet(trainer: type) -> bool:
    """Return whether it is SD 1, SD 2 or SDXL, whose cross-attention reads text states directly."""
    return prediction_of(trainer) == "call_unet"


def network_argument(trainer: type) -> str:
    """Return what the method that predicts calls its network."""
    known = inspect.signature(getattr(trainer, prediction_of(trainer))).parameters
    return next((name for name in NETWORKS if name in known), NETWORKS[0])


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the trainer made before it made the network."""

    trainer: Any
    """`NetworkTrainer` of sd-scripts or a subclass."""
    args: argparse.Namespace
    accelerator: Any
    text_encoders: list[torch.nn.Module]
    dataset: Any
    weight_dtype: torch.dtype

    @classmethod
    def of_caller(cls, frame: FrameType) -> "Training":
        """Return the training whose `train` method runs in `frame`.

        A network module is given the models alone, so the rest is read from its caller.

        Raises:
            HookMissing: Something else is the caller.
        """
        missing = [name for name in LOCALS.values() if name not in frame.f_locals]
        if frame.f_code.co_name != "train" or missing:
            raise HookMissing(
                "This network module is made by `train` of sd-scripts' train_network.py, which "
                f"must hold {', '.join(missing) or 'the training'}; its caller is "
                f"{frame.f_code.co_name} of {frame.f_code.co_filename}. Supported: {VERSIONS}."
            )
        return cls(**{field: frame.f_locals[name] for field, name in LOCALS.items()})

    @property
    def predicts(self) -> str:
        """See `prediction_of`."""
        return prediction_of(type(self.trainer))

    @property
    def has_unet(self) -> bool:
        """See the function."""
        return has_unet(type(self.trainer))
