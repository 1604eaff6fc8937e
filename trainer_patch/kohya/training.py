"""A running training of sd-scripts, as its `train` method holds it, and what it has to offer."""

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from ...shared.patching import HookMissing
from ...shared.training.settings import ProtectionSettings
from ..hooks import refuse, require

BASE_MODULE = "base_module"
"""Network argument: the module that this one stands in front of."""
VERSIONS = "sd-scripts v0.8.8, v0.9.1, v0.10.0 and main of February 2026"
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
TRAINER_HOOKS = {
    "call_unet": ("unet", "timesteps", "text_conds", "batch"),
    "all_reduce_network": ("accelerator", "network"),
    "generate_step_logs": (),
}
STEP = "get_noise_pred_and_target"
"""Method whose call gives a step's prediction with its target; since v0.10."""
STEP_PARAMETERS = ("noise_scheduler", "latents", "batch", "text_encoder_conds", "unet", "is_train")
NETWORK_HOOKS = ("prepare_grad_etc", "on_epoch_start", "save_weights")
WEIGHTS = 'batch["loss_weights"]'
"""Where the trainer reads the weight of each sample's loss."""
FLOW_TRAINERS = ("FluxNetworkTrainer", "Sd3NetworkTrainer")
"""Of other models: a prediction can be repeated, and the layers have known names."""


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
    def base(self) -> type:
        """`NetworkTrainer`, from which every trainer derives."""
        return next(c for c in type(self.trainer).__mro__ if c.__name__ == "NetworkTrainer")

    @property
    def predicts(self) -> str:
        """Method whose call gives a step's prediction, and whose repetition another one."""
        own, base = (getattr(each, STEP, None) for each in (type(self.trainer), self.base))
        return "call_unet" if own is base else STEP

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
    refuse(faults)


def check_training(training: Training, settings: ProtectionSettings) -> None:
    """Refuse a model that a method does not cover, and a trainer that lacks a hook.

    Raises:
        UnsupportedTraining: With what to type instead.
        HookMissing: The version of sd-scripts is not supported.
    """
    faults = [] if training.has_unet else list(_flow_faults(training, settings))
    if settings.regions and not hasattr(training.base, STEP):
        faults.append("project_regions needs sd-scripts from v0.10 on")
    refuse(faults)
    hooks = dict(TRAINER_HOOKS) if settings else {}
    if settings.regions:
        hooks[STEP] = STEP_PARAMETERS
    if settings.filter:
        hooks.setdefault(training.predicts, ("batch",))
    require(training.trainer, type(training.trainer).__name__, hooks, VERSIONS)
    if settings.filter:
        _check_order(training)


def _flow_faults(training: Training, settings: ProtectionSettings) -> Iterator[str]:
    """Yield what is not supported of models that are neither SD 1, SD 2 nor SDXL."""
    name = type(training.trainer).__name__
    if settings and name not in FLOW_TRAINERS:
        yield f"{name}: SD 1, SD 2, SDXL and {' and '.join(FLOW_TRAINERS)} are covered"
        return
    if settings.projection and settings.projection.of_text:
        yield (
            f"{name} trains a model whose layers read text mixed with the image, so no subspace "
            "of text states can be kept out exactly: leave out --project_concepts; "
            "--project_layers and --mem_filter are supported"
        )
    if settings.filter and not training.args.network_train_unet_only:
        yield "the filter needs the text as it was: add --network_train_unet_only"


def check_network(network: torch.nn.Module) -> None:
    """Raise HookMissing unless a network has the methods that sd-scripts calls on all of them."""
    require(network, type(network).__name__, dict.fromkeys(NETWORK_HOOKS, ()), VERSIONS)


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
