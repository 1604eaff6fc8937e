"""What a training of ai-toolkit must be, and what its version must offer, to be protected."""

from collections.abc import Iterator, Mapping
from typing import Any

from ...shared.training.settings import ProtectionSettings
from ..hooks import distribution_faults, refuse, require
from ..options import NAMES, OptionError, settings_from
from ..typed import refuse_hidden, refuse_unknown

SECTION = "unmemorize"
"""Of a process in the configuration: our options."""
HOOKS = {
    "predict_noise": ("noisy_latents", "timesteps", "conditional_embeds", "batch",
                      "is_primary_pred"),
    "calculate_loss": ("noise", "batch", "prior_pred"),
    "hook_after_model_load": (),
    "hook_before_train_loop": (),
    "hook_train_loop": ("batch",),
    "done_hook": (),
    "on_error": (),
}  # fmt: skip
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
REPEATED_TRAINING = {
    "do_cfg": "its prediction is guided already",
    "do_random_cfg": "its prediction is guided already",
    "single_item_batching": "the batch does not say which of its images is predicted",
    "short_and_long_captions": "each image stands in the batch twice",
}
"""The same where a step's prediction is made once more: with the filter, and with regions."""
NOISE_TRAINING = {
    "loss_target": ("noise",),
    "loss_type": ("mse", "mae", "pseudo_huber"),
    "target_noise_multiplier": (1.0,),
    "pred_scaler": (1.0,),
    "diffusion_feature_extractor_path": (None,),
    "train_turbo": (False,),
    "t0_loss_target": (False,),
    "do_fft_loss": (False,),
    "do_guidance_loss": (False,),
    "do_prior_divergence": (False,),
    "match_noise_norm": (False,),
    "correct_pred_norm": (False,),
    "inverted_mask_prior": (False,),
}
"""Settings of `train` with which the loss is the distance to the noise, with their values."""


def check_section(config: Mapping[str, Any]) -> None:
    """Raise OptionError for a process with an option outside the section, or with none in it.

    Args:
        config: Of the process.
    """
    beside = {name: config[name] for name in config if name != SECTION}
    refuse_unknown(beside, prefixes=())
    refuse_hidden(beside, f"to `{SECTION}:`")
    if outside := sorted(beside.keys() & set(NAMES)):
        raise OptionError(f"`{outside[0]}` stands beside `{SECTION}:`. Move it into that section.")
    if not config.get(SECTION):
        raise OptionError(
            f"`type: {SECTION}` is asked for nothing, and nothing would be protected. Add "
            f"`{SECTION}:` with an option in it, such as `mem_filter: x1.5`."
        )


def settings_in(section: Any) -> ProtectionSettings:
    """Return what the section `unmemorize` of a process requests; nothing where there is none.

    Raises:
        OptionError: An option cannot be understood, or there is none of that name.
    """
    if not isinstance(section or {}, Mapping):
        raise OptionError(f"`unmemorize:` must hold options, one a line, got {section!r}.")
    refuse_unknown(section or {}, prefixes=("",))
    return settings_from(section or {})


def check_hooks(trainer: Any) -> None:
    """Raise HookMissing unless ai-toolkit's trainer has the methods that are extended."""
    require(trainer, "ai-toolkit's trainer", HOOKS, "ai-toolkit 0.12.26")


def check_configuration(process: Any, settings: ProtectionSettings) -> None:
    """Refuse what the configuration alone shows to be unsupported, all of it at once.

    Args:
        process: The training, that has read its configuration and nothing else.
        settings: Those of the user.

    Raises:
        UnsupportedTraining: With what to change.
    """
    faults = list(_faults(process))
    if settings.predicts_again:
        faults += _repeating_faults(process)
    if settings.subtraction:
        faults += _loss_faults(process, "`subtract_concepts` changes what the prediction should be")
    if settings.regions:
        faults += _regions_faults(process)
    if settings.projection:
        faults += _projection_faults(process, of_text=settings.projection.of_text)
    refuse(faults)
    settings.check_files()


def check_model(sd: Any, settings: ProtectionSettings) -> None:
    """Refuse a model whose prediction or target the methods cannot work with.

    Raises:
        UnsupportedTraining: With the reason.
    """
    faults = []
    if settings.filter and sd.x0_pred:
        faults.append("the filter compares noise or velocities, and this model predicts images")
    if settings.filter and sd.encode_control_in_text_embeddings:
        faults.append("the filter needs an empty prompt, and this model's text holds images")
    if settings.regions and (sd.is_flow_matching or sd.prediction_type != "epsilon"):
        faults.append("`project_regions` needs a model that predicts noise: leave it out")
    refuse(faults)


def _faults(process: Any) -> Iterator[str]:
    yield from distribution_faults(process.accelerator)
    if process.accelerator.num_processes > 1:
        yield "several processes: use one"
    if process.network_config is None:
        yield "full fine-tuning: add a `network`, only LoRAs are protected"
    for name, why in OTHER_PARTS.items():
        if getattr(process, name) is not None:
            yield why
    yield from _set(process.train_config, TRAINING)


def _repeating_faults(process: Any) -> Iterator[str]:
    yield from _set(process.train_config, REPEATED_TRAINING)
    if process.train_config.loss_type == "mean_flow":
        yield "`train.loss_type: mean_flow` predicts between two timesteps"
    if process.model_config.refiner_name_or_path is not None:
        yield "`model.refiner_name_or_path`: two networks predict, each half of the batch"
    if any(dataset.unconditional_path for dataset in process.dataset_configs):
        yield "`unconditional_path`: such pairs of images have a loss of their own"


def _regions_faults(process: Any) -> Iterator[str]:
    arch = process.model_config.arch
    if arch not in TEXT_FED:
        yield (
            f"`model.arch: {arch}`: `project_regions` is there for {', '.join(TEXT_FED[:3])}: "
            "leave it out"
        )
    yield from _loss_faults(process, "`project_regions` changes the noise that is the target")


def _loss_faults(process: Any, why: str) -> Iterator[str]:
    """Yield settings with which the loss is not of the prediction minus the noise alone."""
    for name, allowed in NOISE_TRAINING.items():
        if (value := getattr(process.train_config, name)) not in allowed:
            yield (
                f"`train.{name}: {value}`: {why}, and needs a loss against that alone "
                f"(`{name}: {allowed[0]}`)"
            )


def _projection_faults(process: Any, *, of_text: bool) -> Iterator[str]:
    network, arch = process.network_config, process.model_config.arch
    if network is not None and network.type.lower() != "lora":
        yield (
            f"`network.type: {network.type}` is not a plain pair of factors, so none of them can "
            "be kept off a subspace exactly: use `type: lora`, which covers convolutions with "
            "`conv`, or `subtract_concepts`, which works with it"
        )
    if of_text and arch not in TEXT_FED:
        yield (
            f"`model.arch: {arch}` reads text mixed with the image or through layers of its own, "
            "so no subspace of text states can be kept out exactly: leave out `project_concepts`; "
            "`subtract_concepts`, `project_layers` and `mem_filter` are supported"
        )


def _set(config: Any, reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield the settings of `train` that are on, with the reason why they must not be."""
    for name, why in reasons.items():
        if getattr(config, name):
            yield f"`train.{name}`: {why}"
