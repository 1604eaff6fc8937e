"""OneTrainer's configuration with our options in it, and what must be so that it is protected."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...shared.patching import Function, HookMissing, patched
from ...shared.training.settings import ProtectionSettings
from ..hooks import refuse
from ..options import NAMES
from ..typed import refuse_hidden, refuse_unknown

WEIGHTS = "loss_weight"
"""Entry of a batch that the trainer multiplies the losses by, after the prediction."""
TIMESTEPS = "_get_timestep_discrete"
"""Method by which the trainer draws the timesteps of a step."""
NOISING = "_add_noise_discrete"
"""Method by which the trainer adds noise to clean latents, in the network's scale."""
WITHOUT_LORA = "prior_model"
"""Method that gives a context without the LoRA, for images of the type prior prediction."""
CALLED = {
    "model_setup": (
        "predict", TIMESTEPS, "prepare_text_caching", "setup_train_device", "after_optimizer_step",
        "report_to_tensorboard", "calculate_loss", NOISING, WITHOUT_LORA,
    ),
    "data_loader": (
        "_preparation_modules", "_enumerate_input_modules", "_load_input_modules", "_create_mgds",
    ),
    "model": ("adapters",),
    "model_saver": ("save",),
}  # fmt: skip
"""Methods of a trainer's parts that are called or replaced."""
LOSSES = ("_diffusion_losses", "_flow_matching_losses")
"""Methods that compute the losses of a step, and read the weights in the batch."""


@contextmanager
def option_keys(config_class: type) -> Iterator[None]:
    """Have configurations hold the options, read and written as the trainer's own keys are.

    Args:
        config_class: `TrainConfig`.

    Raises:
        HookMissing: It makes or reads its values in another way.
    """

    def with_options(original: Function) -> Function:
        def default_values() -> Any:
            config = original()
            for name in NAMES:
                config.types[name], config.nullables[name] = str, True
                config.default_values[name] = None
                setattr(config, name, None)
            return config

        return default_values

    def checked(original: Function) -> Function:
        def from_dict(self: Any, data: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            refuse_unknown(data)
            refuse_hidden(data, "to the top of the configuration")
            return original(self, data, *args, **kwargs)

        return from_dict

    with (
        patched(config_class, "default_values", with_options),
        patched(config_class, "from_dict", checked),
    ):
        yield


def has_unet(config: Any) -> bool:
    """Return whether it is SD 1, SD 2 or SDXL, whose cross-attention reads text states directly."""
    return config.model_type.is_stable_diffusion() or config.model_type.is_stable_diffusion_xl()


def has_known_layers(config: Any) -> bool:
    """Return whether it is SD3 or Flux.1, whose layers a file of project_layers can name."""
    return config.model_type.is_stable_diffusion_3() or config.model_type.is_flux_1()


def trained_encoders(config: Any) -> list[str]:
    """Return the text encoders that a configuration trains."""
    parts = config.model_type.text_encoder_parts()
    return [part for part in parts if getattr(config, part).train]


def check_configuration(config: Any, settings: ProtectionSettings) -> None:
    """Refuse what the configuration alone shows to be unsupported, all of it at once.

    Raises:
        UnsupportedTraining: With what to set instead.
    """
    faults = list(_faults(config))
    if settings.projection:
        faults += _projection_faults(config, of_text=settings.projection.of_text)
    if settings.regions and (trained := trained_encoders(config)):
        off = " and ".join(f"{part}.train" for part in trained)
        faults.append(
            "project_regions teaches what the base model does with the text as it was: set "
            f"{off} to false"
        )
    if settings.subtraction and config.masked_training and config.masked_prior_preservation_weight:
        faults.append(
            "outside of masks the target is the prediction without the LoRA, of which nothing can "
            "be subtracted: set masked_prior_preservation_weight to 0"
        )
    if settings.regions and not has_unet(config) and config.transformer.offloading_enabled():
        faults.append(
            "project_regions predicts once more before the gradients are computed, which was not "
            "tried with layers that are offloaded: set transformer.offload_fraction to 0 and "
            "transformer.activation_offloading to false"
        )
    refuse(faults)


def check_hooks(trainer: Any) -> None:
    """Refuse a version of OneTrainer that lacks a place to hook into, all of it at once.

    Raises:
        HookMissing: With what is not there.
    """
    missing = [
        f"{part}.{name}"
        for part, names in CALLED.items()
        for name in names
        if not callable(getattr(getattr(trainer, part, None), name, None))
    ]
    setup = trainer.model_setup
    losses = [inspect.getsource(getattr(setup, name)) for name in LOSSES if hasattr(setup, name)]
    if not losses or any(f"batch['{WEIGHTS}']" not in source for source in losses):
        missing.append(f"batch['{WEIGHTS}'] in {' and '.join(LOSSES)}")
    if missing:
        raise HookMissing(
            f"OneTrainer has no {', '.join(missing)}: this version is not supported. Nothing was "
            "trained."
        )


def _faults(config: Any) -> Iterator[str]:
    """Yield what neither method covers."""
    if str(config.training_method) != "LORA":
        yield f"training_method is {config.training_method}: only LORA is covered"
    if config.cloud.enabled:
        yield "a training in the cloud is out of reach: set cloud.enabled to false"
    if config.multi_gpu:
        yield "processes of further GPUs are out of reach: set multi_gpu to false"
    if config.model_type.is_wuerstchen():
        yield (
            f"{config.model_type} learns image embeddings at noise levels from 0 to 1, for which "
            "the scores of the filter were not made"
        )
    if config.model_type.is_video_model():
        yield f"{config.model_type} learns clips, for which nothing here was tried"


def _projection_faults(config: Any, *, of_text: bool) -> Iterator[str]:
    """Yield why a projection would not be exact."""
    if not (has_unet(config) or has_known_layers(config)):
        yield (
            f"the layers of {config.model_type} read text mixed with the image or through layers "
            "of its own, so no subspace of text states can be kept out exactly, and project_layers "
            "does not know their names: leave both out; mem_filter is supported"
        )
    elif of_text and not has_unet(config):
        yield (
            f"the layers of {config.model_type} read text mixed with the image, so no subspace "
            "of text states can be kept out exactly: leave out project_concepts; subtract_concepts "
            "and project_layers work with them, mem_filter is supported"
        )
    if config.train_any_embedding() or config.train_any_output_embedding():
        yield "an embedding is trained, which the subspace does not know: train it apart"
