"""The model under audit, loaded only when something has to be computed with it."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import demo
from ...shared.files.storage import Journal
from ...shared.models.load import (
    check_offload,
    default_dtype,
    load_denoiser,
    makes_videos,
    model_fingerprint,
    resolve,
    usable_device,
)
from ...shared.models.quantization import check_quantization
from ...shared.score.calibration import Calibration, settings_of
from ...shared.score.config import DetectionConfig
from ...shared.score.control_basis import told_steps
from ...shared.score.trajectory import automatic_rows
from .result import ModelInfo

if TYPE_CHECKING:
    from ...shared.models.adapter import PipelineDenoiser

DTYPES = ("float32", "float16", "bfloat16")


class Subject:
    """A model with its LoRA, device and dtype; a finished job never loads it."""

    def __init__(
        self,
        model: str = demo.NAME,
        *,
        lora: Path | None = None,
        strength: float = 1.0,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        resolution: int | None = None,
        frames: int | None = None,
        config: Path | None = None,
        offload: str | None = None,
        quantize: str | None = None,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if not (math.isfinite(strength) and strength):
            raise ValueError(
                f"`strength` must be a number other than 0, got {strength}: at 0 there is no LoRA."
            )
        if strength != 1 and lora is None:
            raise ValueError(f"`strength` is that of a LoRA, got {strength} and no LoRA.")
        self.strength, self.frames = strength, frames
        self.lora, self.revision, self.resolution, self.config = lora, revision, resolution, config
        self.device = usable_device(device)
        check_offload(offload, self.device)
        check_quantization(quantize, device=self.device, offload=offload, lora=lora is not None)
        self.offload, self.quantize, self._dtype = offload, quantize, dtype
        self.is_demo = model in demo.BUNDLED
        self._model = model
        # The name is printed and kept; the folders above it are nobody's business.
        self.name = Path(model).name if not self.is_demo and Path(model).exists() else model

    @classmethod
    def of(cls, settings: Any) -> "Subject":
        """Return the model that the settings of an audit or the options of a command name."""
        return cls(
            settings.model, lora=settings.lora, strength=settings.strength,
            device=settings.device, dtype=settings.dtype, frames=getattr(settings, "frames", None),
            revision=settings.revision, resolution=settings.resolution,
            config=settings.model_config, offload=settings.offload, quantize=settings.quantize,
        )  # fmt: skip

    @cached_property
    def location(self) -> str:
        """Folder, file or hub id, where the model is read from."""
        return str(demo.locate(self._model)) if self.is_demo else self._model

    @cached_property
    def dtype(self) -> str:
        """What it computes in, as asked for or as its family does on this device."""
        if self._dtype is not None:
            return self._dtype
        if not self.device.startswith("cuda"):  # what the model is does not matter
            return "float32"
        found = default_dtype(resolve(self.location, self.revision), self.device, self.config)
        return str(found).removeprefix("torch.")

    @cached_property
    def video(self) -> bool:
        """Whether it makes clips and no images."""
        return not self.is_demo and makes_videos(resolve(self.location, self.revision), self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over the weights, LoRA included."""
        return model_fingerprint(self.location, self.lora, self.revision, self.strength,
                                 self.quantize)  # fmt: skip

    @cached_property
    def denoiser(self) -> "PipelineDenoiser":
        """Return the model, loaded on first use."""
        return load_denoiser(
            self.location, lora=self.lora, strength=self.strength, device=self.device,
            dtype=getattr(torch, self.dtype), revision=self.revision, resolution=self.resolution,
            frames=self.frames, config=self.config, offload=self.offload, quantize=self.quantize,
        )  # fmt: skip

    @property
    def _lora_name(self) -> str | None:
        if self.lora is None or self.strength == 1:
            return self.lora and self.lora.name
        return f"{self.lora.name} at strength {self.strength:g}"

    def facts(self, journal: Journal, config: DetectionConfig) -> "Facts":
        """Return what a report says about the model, from the journal when it stands there."""
        if "model" not in journal:
            denoiser = self.denoiser
            info = ModelInfo(
                name=self.name,
                fingerprint=self.fingerprint,
                lora=self._lora_name,
                parametrization=denoiser.parametrization,
                dtype=self.dtype if self.quantize is None else f"{self.dtype}, {self.quantize}",
                device=self.device,
                latent_shape=tuple(denoiser.latent_shape),
                guidance_distilled=denoiser.guidance_distilled,
            )
            told = told_steps(len(config.seeds), config.schedule_steps)
            journal.put("model", {
                "info": asdict(info),
                "settings": settings_of(denoiser, config),
                "residual": settings_of(denoiser, config, told),
                # Another batch size moves the last digits: a continued job keeps the first one's.
                "rows": config.batch_size or automatic_rows(denoiser),
                "caveats": list(denoiser.caveats),
            })  # fmt: skip
        stored = journal.get("model")
        info = stored["info"] | {"latent_shape": tuple(stored["info"]["latent_shape"])}
        caveats = tuple(stored["caveats"])
        return Facts(**stored | {"info": ModelInfo(**info), "caveats": caveats})


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was written down about a model when it was first loaded for this job."""

    info: ModelInfo
    settings: dict[str, Any]
    """That a calibration must share."""
    residual: dict[str, Any]
    """That a calibration of the residual score must share."""
    rows: int
    """Of one forward pass."""
    caveats: tuple[str, ...]

    def of(self, calibration: Calibration) -> dict[str, Any]:
        """Return the settings that this calibration must share."""
        return self.settings if calibration.basis is None else self.residual
