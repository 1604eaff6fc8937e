"""What a training of ai-toolkit must be, and what its version must offer, to be protected."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..shared.training.lora_factors import UnsupportedTraining
from ..shared.training.settings import ProtectionSettings
from .hooks import UNSUPPORTED_MODES
from .options import NAMES, NO_REGIONS, OptionError, settings_from
from .wrapping import HookMissing

HOOKS = {
    "predict_noise": ("timesteps", "conditional_embeds", "batch", "is_primary_pred"),
    "hook_after_model_load": (),
    "hook_before_train_loop": (),
    "hook_train_loop": ("batch",),
    "done_hook": (),
    "on_error": (),
}
"""Methods of its trainer that are extended, with the parameters that are read."""
TEXT_FED = ("sd1", "sd2", "sdxl", "ssd", "vega")
"""Architectures whose cross-attention reads the text encoder's output directly."""
OTHER_PARTS = {
    "embed_config": "`embedding`: new words are trained, which change what the empty prompt and "
    "the concept are compared with",
    "adapter_config": "`adapter`: the network reads more than text",
    "decorator_config": "`decorator`: the network reads more than text",
}
"""Sections of the configuration that must not be there, and why."""
TRAINING = {
    "train_text_encoder": "a trained text encoder moves its states out of the concept's subspace "
    "and changes what the empty prompt is",
    "merge_network_on_save": "what is saved is no LoRA, so it cannot be checked",
}
"""Settings of `train` that must be off, and why."""
FILTERED_TRAINING = {
    "do_cfg": "its prediction is guided already",
    "do_random_cfg": "its prediction is guided already",
    "single_item_batching": "the batch does not tell which of its images is predicted",
    "short_and_long_captions": "each image stands in the batch twice",
}
"""The same with the filter."""


def settings_in(section: Any) -> ProtectionSettings:
    """Return what the section `unmemorize` of a process asks for; nothing where there is none.

    Raises:
        OptionError: An option cannot be understood, or there is none of that name.
    """
    if not isinstance(section or {}, Mapping):
        raise OptionError(f"`unmemorize:` must hold options, one a line, got {section!r}.")
    section = section or {}
    if unknown := sorted(section.keys() - set(NAMES)):
        raise OptionError(f"`{unknown[0]}` is not an option; there are {', '.join(NAMES)}.")
    return settings_from(section)


def check_hooks(trainer: Any) -> None:
    """Raise HookMissing unless ai-toolkit's trainer has the methods that are extended."""
    faults = []
    for name, parameters in HOOKS.items():
        method = getattr(trainer, name, None)
        known = inspect.signature(method).parameters if method else ()
        if method is None or any(each not in known for each in parameters):
            faults.append(f"{name}({', '.join(parameters)})")
    if faults:
        raise HookMissing(
            f"ai-toolkit's trainer has no {', '.join(faults)}: this version is not supported. "
            "Known to work is 0.12.26."
        )


def check_configuration(process: Any, settings: ProtectionSettings) -> None:
    """Refuse what the configuration alone shows to be unsupported, all of it at once.

    Args:
        process: The training, that has read its configuration and nothing else.
        settings: What is asked for.

    Raises:
        UnsupportedTraining: With what to change.
    """
    faults = list(_faults(process))
    if settings.filter:
        faults += _filter_faults(process)
    if settings.projection:
        faults += [NO_REGIONS] * settings.projection.regions
        faults += _projection_faults(process, of_text=settings.projection.of_text)
    _refuse(faults)


def check_model(sd: Any, settings: ProtectionSettings) -> None:
    """Refuse a model whose prediction the filter cannot compare with that on the empty prompt.

    Raises:
        UnsupportedTraining: With the reason.
    """
    faults = []
    if settings.filter and sd.x0_pred:
        faults.append("the filter compares noise or velocities, and this model predicts images")
    if settings.filter and sd.encode_control_in_text_embeddings:
        faults.append("the filter needs an empty prompt, and this model's text holds pictures")
    _refuse(faults)


def _faults(process: Any) -> Iterator[str]:
    mode = str(process.accelerator.distributed_type).rpartition(".")[2]
    if mode in UNSUPPORTED_MODES:
        yield f"{mode} cuts parameters up: use one process"
    elif process.accelerator.num_processes > 1:
        yield "several processes: use one"
    if process.network_config is None:
        yield "full fine-tuning: add a `network`, only LoRAs are protected"
    for name, why in OTHER_PARTS.items():
        if getattr(process, name) is not None:
            yield why
    yield from _set(process.train_config, TRAINING)


def _filter_faults(process: Any) -> Iterator[str]:
    yield from _set(process.train_config, FILTERED_TRAINING)
    if process.train_config.loss_type == "mean_flow":
        yield "`train.loss_type: mean_flow` predicts between two timesteps"
    if process.model_config.refiner_name_or_path is not None:
        yield "`model.refiner_name_or_path`: two networks predict, each half of the batch"
    if any(dataset.unconditional_path for dataset in process.dataset_configs):
        yield "`unconditional_path`: such pairs of images have a loss of their own"


def _projection_faults(process: Any, *, of_text: bool) -> Iterator[str]:
    network, arch = process.network_config, process.model_config.arch
    if network is not None and network.type.lower() != "lora":
        yield (
            f"`network.type: {network.type}` is not a plain pair of factors, so none of them can "
            "be kept off a subspace exactly: use `type: lora`; with `conv` it covers convolutions"
        )
    if of_text and arch not in TEXT_FED:
        yield (
            f"`model.arch: {arch}` reads text mixed with the picture or through layers of its own, "
            "so no subspace of text states can be kept out exactly: leave out `project_concepts`; "
            "`project_layers` and `mem_filter` are supported"
        )


def _set(config: Any, reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield the settings of `train` that are on, with the reason why they must not be."""
    for name, why in reasons.items():
        if getattr(config, name):
            yield f"`train.{name}`: {why}"


def _refuse(faults: Iterable[str]) -> None:
    if listed := list(faults):
        raise UnsupportedTraining(f"Not supported: {'; '.join(listed)}.")
