"""OneTrainer's configuration: our options as keys of it, and what in it is not supported."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...shared.patching import Function, patched
from ...shared.training.projection.factors import UnsupportedTraining
from ...shared.training.settings import ProtectionSettings
from ..options import NAMES, refuse_unknown

TIMESTEPS = 1000
"""Of the models that are covered; the configuration has its range in shares of them."""


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
            return original(self, data, *args, **kwargs)

        return from_dict

    with (
        patched(config_class, "default_values", with_options),
        patched(config_class, "from_dict", checked),
    ):
        yield


def output_of(config: Any) -> Path:
    """Return beside which file the reports of a training go."""
    path = Path(config.output_model_destination)
    # In a folder, OneTrainer names the LoRA by the time of its saving.
    return path / (config.save_filename_prefix.strip("-_ ") or "lora") if path.is_dir() else path


def span_of(config: Any) -> tuple[float, float]:
    """Return the lowest and the highest timestep of a training."""
    return TIMESTEPS * config.min_noising_strength, TIMESTEPS * config.max_noising_strength


def has_unet(config: Any) -> bool:
    """Return whether it is SD 1, SD 2 or SDXL, whose cross-attention reads text states directly."""
    return config.model_type.is_stable_diffusion() or config.model_type.is_stable_diffusion_xl()


def validate(config: Any, settings: ProtectionSettings) -> None:
    """Refuse what the configuration alone shows to be unsupported, all of it at once.

    Raises:
        UnsupportedTraining: With what to set instead.
    """
    faults = list(_of_both(config))
    if settings.projection:
        faults += _of_projection(config, of_text=settings.projection.of_text)
        if settings.projection.regions and not has_unet(config):
            faults += _of_offloading(config)
    if faults:
        raise UnsupportedTraining(f"Not supported: {'; '.join(faults)}.")


def _of_both(config: Any) -> Iterator[str]:
    """Yield what neither method covers."""
    flows = config.model_type.is_stable_diffusion_3() or config.model_type.is_flux_1()
    if str(config.training_method) != "LORA":
        yield f"training_method is {config.training_method}: only LORA is covered"
    if config.cloud.enabled:
        yield "a training in the cloud is out of reach: set cloud.enabled to false"
    if config.multi_gpu:
        yield "processes of further GPUs are out of reach: set multi_gpu to false"
    if not (has_unet(config) or flows):
        yield f"{config.model_type} is not covered; SD 1, SD 2, SDXL, SD3 and Flux.1 are"


def _of_offloading(config: Any) -> Iterator[str]:
    """Yield why no prediction may follow the one that is learnt from."""
    if config.transformer.offloading_enabled():
        yield (
            "project_regions predicts once more before the gradients are computed, which was not "
            "tried with layers that are offloaded: set transformer.offload_fraction to 0 and "
            "transformer.activation_offloading to false"
        )


def _of_projection(config: Any, *, of_text: bool) -> Iterator[str]:
    """Yield why a projection would not be exact."""
    if of_text and not has_unet(config):
        yield (
            f"the layers of {config.model_type} read text mixed with the picture, so no subspace "
            "of text states can be kept out exactly: leave out project_concepts; mem_filter is "
            "supported"
        )
    trained = [part for part in config.model_type.text_encoder_parts()
               if getattr(config, part).train]  # fmt: skip
    if trained:
        off = " and ".join(f"{part}.train" for part in trained)
        yield f"projection is exact only while text encoders stay as they are: set {off} to false"
    if config.train_any_embedding() or config.train_any_output_embedding():
        yield "an embedding is trained, which the subspace does not know: train it apart"
