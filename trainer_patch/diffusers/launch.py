"""A training script's run: its calls show what is trained, and that is protected."""

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ...shared.patching import Function, HookMissing, patched
from ...shared.training.protection import Protection
from ...shared.training.settings import ProtectionSettings
from ..hooks import (
    accelerate_hooks,
    calling,
    end_in_time,
    finish,
    first_step_checked,
    processes_of,
    progress_hooks,
    refuse,
)
from ..options import add_options, settings_from
from ..typed import flags_of, refuse_nothing, refuse_unknown
from . import PROGRAM
from .adapter import MovedPredictions
from .data import BatchSamples, captions_of, complete, load_text_side
from .loop import faults_of, protected, stamp

WEIGHTS = "pytorch_lora_weights.safetensors"
"""How diffusers names a LoRA by default."""
NEEDED = ("pretrained_model_name_or_path", "output_dir")
"""Options of a script that the protection reads; all of the official ones have them."""
NEW_TOKENS = (
    "--train_text_encoder_ti: new tokens are trained, which the concept's subspace and the "
    "untrained text encoder do not know"
)
UNSUPPORTED = {
    "train_text_encoder": "a trained text encoder moves its states out of the concept's subspace "
    "and changes what the empty prompt is",
    "do_edm_style_training": "EDM's preconditioning changes what the network predicts",
    "text_encoder_use_attention_mask": "masked prompts have no empty prompt to compare with",
}
"""Options of scripts that must be off for the filter and the projection, and why."""


class Launch:
    """One run of a script."""

    def __init__(self) -> None:
        self.arguments: argparse.Namespace | None = None
        """As the script parsed them, ours among them."""
        self.settings = ProtectionSettings()
        self.network: nn.Module | None = None
        """The first one of diffusers that is given a LoRA."""
        self.protection: Protection | None = None
        self._samples = BatchSamples()
        self._finished = False
        self._undo = ExitStack()

    @contextmanager
    def attached(self) -> Iterator["Launch"]:
        """Hook the libraries that a script calls, for as long as the block lasts.

        Raises:
            HookMissing: One of the hooks is not there in the installed versions.
        """
        from accelerate import Accelerator
        from accelerate.data_loader import DataLoaderShard
        from diffusers.loaders.peft import PeftAdapterMixin

        hooks = (
            patched(argparse.ArgumentParser, "parse_args", self._parse_args),
            patched(PeftAdapterMixin, "add_adapter", self._add_adapter),
            patched(Accelerator, "prepare", self._prepare),
            patched(DataLoaderShard, "__iter__", self._iterate),
        )
        with self._undo:
            for hook in (*hooks, first_step_checked(self._check_protected)):
                self._undo.enter_context(hook)
            yield self

    def finish(self) -> None:
        """Check that what was requested has happened.

        Raises:
            ProtectionFailed: Something has not.
            HookMissing: The script never came to train a LoRA.
        """
        self._check_protected()
        if self.protection and not self._finished:
            self.protection.finish()

    def _check_protected(self) -> None:
        if self.arguments is None:
            raise HookMissing(
                "The script never called parse_args, by which it gets the options: nothing was "
                "protected."
            )
        if self.settings and self.protection is None:
            raise HookMissing(
                "The script never gave a LoRA of diffusers to accelerate: nothing was protected."
            )

    def _parse_args(self, original: Function) -> Function:
        def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            if self.arguments is not None:
                return original(parser, *args, **kwargs)
            add_options(parser)
            refuse_unknown(flags_of(sys.argv), prefixes=())
            self.arguments = original(parser, *args, **kwargs)
            refuse_nothing(vars(self.arguments), PROGRAM, "--mem_filter x1.5")
            self.settings = settings_from(vars(self.arguments))
            if self.settings:
                _validate_arguments(self.arguments, self.settings)
                self.settings.check_files()
            return self.arguments

        return parse_args

    def _add_adapter(self, original: Function) -> Function:
        def add_adapter(network: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(network, *args, **kwargs)
            self.network = self.network or network

        return add_adapter

    def _prepare(self, original: Function) -> Function:
        def prepare(accelerator: Any, *objects: Any, **kwargs: Any) -> Any:
            if self.settings and any(each is self.network for each in objects):
                self._protect(accelerator, objects)
            return original(accelerator, *objects, **kwargs)

        return prepare

    def _protect(self, accelerator: Any, objects: Sequence[Any]) -> None:
        """Protect the training whose parts a script has just put together."""
        from diffusers.loaders.lora_base import LoraBaseMixin

        given, network = vars(self.arguments), self.network
        refuse([*faults_of(network, self.settings, accelerator), *self._regions_faults()])
        column = given.get("caption_column")
        loaders = [each for each in objects if isinstance(each, DataLoader)]
        protection = Protection(
            self.settings, output=Path(given["output_dir"]) / WEIGHTS, **processes_of(accelerator)
        )
        text_side = load_text_side(
            given["pretrained_model_name_or_path"],
            network,
            revision=given.get("revision"),
            variant=given.get("variant"),
            max_sequence_length=given.get("max_sequence_length"),
        )
        prior_preservation = bool(given.get("with_prior_preservation"))
        adapter = self._undo.enter_context(
            protected(
                protection,
                network,
                [each for each in objects if isinstance(each, Optimizer)],
                text_side,
                captions=[text for each in loaders for text in captions_of(each.dataset, column)],
                samples=self._samples,
                prediction_type=given.get("prediction_type"),
                prior_preservation=prior_preservation,
                trains_text=bool(given.get("train_text_encoder")),
            )
        )
        if protection.base_targets or protection.watches:
            complete(text_side, network)
        if protection.base_targets:
            predictions = MovedPredictions(
                network, adapter.target, self._samples, prior_preservation=prior_preservation
            )
            self._undo.enter_context(predictions.attached())
        for loader in loaders:
            self._samples.sign(loader, column)
        self.protection = protection
        for hook in (
            accelerate_hooks(accelerator, protection),
            progress_hooks(protection),
            patched(accelerator, "end_training", calling(before=partial(self._end, accelerator))),
            patched(accelerator, "save_state", calling(after=partial(self._stop, accelerator))),
            patched(LoraBaseMixin, "write_lora_layers", self._write),
        ):
            self._undo.enter_context(hook)

    def _regions_faults(self) -> Iterator[str]:
        """Yield why base targets are requested and cannot be had."""
        from diffusers import UNet2DConditionModel

        if self.settings.regions and not isinstance(self.network, UNet2DConditionModel):
            yield (
                "project_regions is there for U-Nets (SD 1, SD 2, SDXL), not "
                f"{type(self.network).__name__}: its scripts noise latents in a line of their own. "
                "Leave it out"
            )

    def _write(self, original: Function) -> Function:
        def write_lora_layers(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            if call["safe_serialization"]:
                path = Path(call["save_directory"]) / (call["weight_name"] or WEIGHTS)
                stamp(path, self.protection)
            return result

        return write_lora_layers

    def _iterate(self, original: Function) -> Function:
        return lambda loader: self._samples.unsigned(original(loader))

    def _stop(self, accelerator: Any) -> None:
        end_in_time(self.protection, accelerator.end_training)

    def _end(self, accelerator: Any) -> None:
        if not self._finished:
            finish(self.protection, accelerator)
            self._finished = True


def _validate_arguments(arguments: argparse.Namespace, settings: ProtectionSettings) -> None:
    """Raise UnsupportedTraining, with all reasons, for what a script's arguments request."""
    given = vars(arguments)
    faults = [f"the script has no --{name}" for name in NEEDED if not given.get(name)]
    if settings.filter or settings.projection:
        faults += [f"--{name}: {why}" for name, why in UNSUPPORTED.items() if given.get(name)]
    if given.get("train_text_encoder_ti"):
        faults.append(NEW_TOKENS)
    refuse(faults)
