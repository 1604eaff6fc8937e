"""What a training of sd-scripts must be, and what its version must offer, to be protected."""

import argparse
import inspect
from collections.abc import Iterator

import torch

from ...shared.patching import HookMissing
from ...shared.training.settings import ProtectionSettings
from ..hooks import refuse, require
from .request import PLAIN, Request
from .training import STEP, VERSIONS, base_of, has_unet, network_argument, prediction_of

TRAINER_HOOKS = {
    "call_unet": ("unet", "timesteps", "text_conds", "batch"),
    "all_reduce_network": ("accelerator", "network"),
    "generate_step_logs": (),
}
STEP_PARAMETERS = ("noise_scheduler", "latents", "batch", "text_encoder_conds", "is_train")
NETWORK_HOOKS = ("prepare_grad_etc", "on_epoch_start", "save_weights")
WEIGHTS = 'batch["loss_weights"]'
"""Where the trainer reads the weight of each sample's loss."""
REGION_TRAINERS = ("FluxNetworkTrainer", "Sd3NetworkTrainer")
"""Beside those with a U-Net: their layers have known names."""
INEXACT = ("dylora", "oft", "oft_flux", "ia3", "boft", "diag-oft", "glora", "full")
"""Networks without a factor that could be kept off a subspace: modules of sd-scripts, algorithms of
LyCORIS."""
ON = ("true", "1")
"""How LyCORIS reads a switch."""


def check_training(trainer: type, args: argparse.Namespace, request: Request) -> None:
    """Refuse what is known before a model is loaded, all of it at once.

    Args:
        trainer: Class of the trainer.
        args: Of the training.
        request: That of the user.

    Raises:
        UnsupportedTraining: With what to type instead.
        HookMissing: The version of sd-scripts is not supported.
        ModelError: A saved subspace is damaged.
    """
    settings = request.settings
    if not settings:
        return
    faults = list(_argument_faults(args, request))
    if not has_unet(trainer):
        faults += _flow_faults(trainer.__name__, args, settings)
    if settings.regions and not hasattr(base_of(trainer), STEP):
        faults.append("project_regions needs sd-scripts from v0.10 on")
    refuse(faults)
    settings.check_files()
    hooks = dict(TRAINER_HOOKS)
    if settings.regions:
        hooks[STEP] = (*STEP_PARAMETERS, network_argument(trainer))
    if settings.filter or settings.subtraction:
        hooks.setdefault(prediction_of(trainer), ("batch", network_argument(trainer)))
    require(trainer, trainer.__name__, hooks, VERSIONS)
    if settings.filter:
        _check_order(base_of(trainer))


def check_network(network: torch.nn.Module) -> None:
    """Raise HookMissing unless a network has the methods that sd-scripts calls on all of them."""
    require(network, type(network).__name__, dict.fromkeys(NETWORK_HOOKS, ()), VERSIONS)


def _argument_faults(args: argparse.Namespace, request: Request) -> Iterator[str]:
    if getattr(args, "deepspeed", False):
        yield "DeepSpeed keeps its own copies of weights and gradients: leave out --deepspeed"
    if request.settings.subtraction and getattr(args, "weighted_captions", False):
        if not args.network_train_unet_only:
            yield (
                "concept subtraction encodes captions without their weights where the text encoder "
                "is trained: leave out --weighted_captions or add --network_train_unet_only"
            )
    if not request.settings.projection:
        return
    if getattr(args, "network_train_text_encoder_only", False):
        yield "only the text encoder is trained, which no subspace of its own states protects"
    if request.settings.regions and not args.network_train_unet_only:
        yield (
            "project_regions teaches what the base model does with the text as it was: add "
            "--network_train_unet_only"
        )
    if args.save_model_as not in (None, "safetensors"):
        yield "the saved LoRA cannot be checked: use --save_model_as safetensors"
    kind = request.network_args.get("algo") or request.base_module.rpartition(".")[2]
    if kind.lower() in INEXACT:
        yield (
            f"{kind} has no factor that could be kept off a subspace exactly: use "
            f"{PLAIN['NetworkTrainer']}, or LyCORIS' algo=locon, loha or lokr; --subtract_concepts "
            "works with it as it is"
        )
    if request.network_args.get("dora_wd", "").lower() in ON:
        yield "DoRA rescales the base weight, and what that reads with it: leave out dora_wd"


def _flow_faults(
    name: str, args: argparse.Namespace, settings: ProtectionSettings
) -> Iterator[str]:
    """Yield what is not supported of models that are neither SD 1, SD 2 nor SDXL."""
    if name not in PLAIN:
        yield f"{name}: known are {', '.join(PLAIN)}"
        return
    others = "--subtract_concepts, --project_layers and --mem_filter are supported"
    if name not in REGION_TRAINERS:
        others = "--subtract_concepts and --mem_filter are supported"
    if settings.projection and settings.projection.of_text:
        yield (
            f"{name} trains a model whose layers read text mixed with the image, so no subspace "
            f"of text states can be kept out exactly: leave out --project_concepts; {others}"
        )
    elif settings.projection and name not in REGION_TRAINERS:
        yield (
            f"{name}: --project_layers is there for SD 1, SD 2, SDXL and "
            f"{' and '.join(REGION_TRAINERS)}; {others}"
        )


def _check_order(trainer: type) -> None:
    """Raise HookMissing unless the weights of the losses are read after the prediction is made."""
    name = "process_batch" if hasattr(trainer, "process_batch") else "train"
    calls = ("self.get_noise_pred_and_target(", "self.call_unet(")
    source = inspect.getsource(getattr(trainer, name))
    places = [source.find(call) for call in calls if call in source]
    if not places or source.find(WEIGHTS) < min(places):
        raise HookMissing(
            f"{name} does not read {WEIGHTS} after the prediction, so the memorization filter "
            "would have no effect in this version of sd-scripts."
        )
