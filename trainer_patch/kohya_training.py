"""A running training of sd-scripts, as its `train` method holds it, and what it has to offer."""

import argparse
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from ..shared.training.lora_factors import UnsupportedTraining
from ..shared.training.settings import ProtectionSettings

LOCALS = {
    "trainer": "self",
    "args": "args",
    "accelerator": "accelerator",
    "text_encoders": "text_encoders",
    "dataset": "train_dataset_group",
    "weight_dtype": "weight_dtype",
}
"""What `train` calls them when it makes the network, in every supported version."""
TRAINER_HOOKS = {
    "call_unet": ("unet", "timesteps", "text_conds", "batch"),
    "all_reduce_network": ("accelerator", "network"),
    "generate_step_logs": (),
}
NETWORK_HOOKS = ("prepare_grad_etc", "on_epoch_start", "save_weights")
WEIGHTS = 'batch["loss_weights"]'
"""Where the trainer reads the weight of each sample's loss."""


FLOW_TRAINERS = ("FluxNetworkTrainer", "Sd3NetworkTrainer")
"""Trainers of other models, of which one prediction can be repeated with other text."""


class HookMissing(RuntimeError):
    """This version of sd-scripts lacks what a method needs; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the trainer made before it asked for a network."""

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
                f"must hold {', '.join(missing) or 'the training'}; found "
                f"{frame.f_code.co_name} of {frame.f_code.co_filename}. Supported are v0.8.8, "
                "v0.9.1, v0.10.0 and the main branch of February 2026."
            )
        return cls(**{field: frame.f_locals[name] for field, name in LOCALS.items()})

    @property
    def base(self) -> type:
        """`NetworkTrainer`, from which every trainer derives."""
        return next(c for c in type(self.trainer).__mro__ if c.__name__ == "NetworkTrainer")

    @property
    def predicts(self) -> str:
        """Method whose call gives a step's prediction, and whose repetition another one."""
        own, base = (
            getattr(each, "get_noise_pred_and_target", None)
            for each in (type(self.trainer), self.base)
        )
        return "call_unet" if own is base else "get_noise_pred_and_target"

    @property
    def has_unet(self) -> bool:
        """Whether it is SD 1, SD 2 or SDXL, whose cross-attention reads text states directly."""
        return self.predicts == "call_unet"


def check_arguments(args: argparse.Namespace, settings: ProtectionSettings) -> None:
    """Refuse what the arguments alone show to be unsupported, all of it at once.

    Raises:
        UnsupportedTraining: With what to type instead.
    """
    faults = []
    if settings and getattr(args, "deepspeed", False):
        faults.append(
            "DeepSpeed keeps its own copies of weights and gradients: leave out --deepspeed"
        )
    if settings.projection:
        if not args.network_train_unet_only:
            faults.append(
                "projection is exact only while the text encoder stays as it is: add "
                "--network_train_unet_only"
            )
        if args.save_model_as not in (None, "safetensors"):
            faults.append("the saved LoRA cannot be checked: use --save_model_as safetensors")
    _refuse(faults)


def check_training(training: Training, settings: ProtectionSettings) -> None:
    """Refuse a model that a method does not cover, and a trainer that lacks a hook.

    Raises:
        UnsupportedTraining: With what to type instead.
        HookMissing: The version of sd-scripts is not supported.
    """
    faults = []
    if settings.projection and not training.has_unet:
        faults.append(
            f"{type(training.trainer).__name__} trains a model whose layers read text mixed with "
            "the picture, so no subspace of text states can be kept out exactly, and under names "
            "of sd-scripts' own, so no file of layers fits: leave out --project_concepts and "
            "--project_layers; --mem_filter is supported"
        )
    if settings.filter and not training.has_unet:
        if type(training.trainer).__name__ not in FLOW_TRAINERS:
            faults.append(f"the filter covers SD 1, SD 2, SDXL and {' and '.join(FLOW_TRAINERS)}")
        elif not training.args.network_train_unet_only:
            faults.append("the filter needs the text as it was: add --network_train_unet_only")
    _refuse(faults)
    if settings:
        _require(training.trainer, TRAINER_HOOKS)
    if settings.filter:
        _require(training.trainer, {training.predicts: ("batch",)})
        _check_order(training)


def check_network(network: torch.nn.Module) -> None:
    """Raise HookMissing unless a network has the methods that sd-scripts calls on all of them."""
    _require(network, dict.fromkeys(NETWORK_HOOKS, ()))


def _refuse(faults: Iterable[str]) -> None:
    if listed := list(faults):
        raise UnsupportedTraining(f"Not supported: {'; '.join(listed)}.")


def _require(owner: Any, hooks: dict[str, tuple[str, ...]]) -> None:
    """Raise HookMissing unless the owner has the methods with these parameters."""
    faults = []
    for name, parameters in hooks.items():
        method = getattr(owner, name, None)
        have = inspect.signature(method).parameters if method else ()
        if method is None or (lacking := [p for p in parameters if p not in have]):
            faults.append(name if method is None else f"{name}({', '.join(lacking)})")
    if faults:
        raise HookMissing(
            f"{type(owner).__name__} has no {', '.join(faults)}: this version of sd-scripts is not "
            "supported. Known to work are v0.8.8, v0.9.1, v0.10.0 and main of February 2026."
        )


def _check_order(training: Training) -> None:
    """Raise HookMissing unless the weights of the losses are read after the prediction is made."""
    name = "process_batch" if hasattr(training.base, "process_batch") else "train"
    calls = ("self.get_noise_pred_and_target(", "self.call_unet(")
    source = inspect.getsource(getattr(training.base, name))
    places = [source.find(call) for call in calls if call in source]
    if not places or source.find(WEIGHTS) < min(places):
        raise HookMissing(
            f"{name} does not read {WEIGHTS} after the prediction, so the memorization filter "
            "would have no effect in this version of sd-scripts."
        )
