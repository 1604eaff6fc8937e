"""What differs between the families of pipelines, and a network followed through its pipeline."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...score.denoiser import Conditioning, Parametrization, concatenate
from ..calls.hold import HeldCall, accepted, hold
from ..calls.network_call import Layout, NetworkCall, NotFollowed, learn_layout, written
from .schedules import FINE_STEPS, DiscreteSchedule, FlowSchedule, Schedule

OTHER_PROMPT = "a red cat under a tall tree, painted in oil"
"""Any prompt that is not the empty one."""
KEPT_CALLS = 64
"""Held calls that are kept: one of each size, and one of each noise level without its latents."""
GUIDED_SCALE = 3.0
"""Any scale of guidance that is on."""
NETWORKS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a pipeline is guided: what its call takes, and how its network is called then."""

    calls: int = 1
    """Network calls a step: 1 for prompts and negatives in one batch, 2 for the prompts first."""
    prompt_first: bool = False
    """In one batch the prompts stand before the negatives."""
    scale: str = "guidance_scale"
    """Argument of the pipeline's call; "" for a pipeline that cannot be guided."""
    off: float = 1.0
    """Scale without guidance."""
    offset: float = 0.0
    """Added to the scale it is in uncond + scale * (cond - uncond)."""
    negative: bool = False
    """There is guidance only where a negative prompt is given."""


class Family:
    """How the pipelines of one architecture are called, and their network through them.

    The network is called with what the pipeline's own call passes to it: latents, time and text
    are replaced, everything else (ids, sizes, guidance) is the pipeline's. So scores belong to the
    images this pipeline makes. Subclasses declare what differs; a pipeline without any declaration
    is tried as this class.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    """Names of diffusers' classes."""
    checkpoints: ClassVar[tuple[str, ...]] = ()
    """How diffusers' names for single-file checkpoints of this family begin."""
    network_name: ClassVar[str] = "transformer"
    guidance: ClassVar[Guidance] = Guidance()
    guidance_distilled: ClassVar[bool] = False
    """The network guides itself; guidance by a negative prompt is an extra, if there is any."""
    guidance_embedding: float | None = None
    """Guidance that the network reads as an input in every pass; None for networks without it."""
    t5_length: int | None = None
    """Tokens of T5: the pipeline's own default for `max_sequence_length`."""
    guidance_input: ClassVar[str] = "guidance_scale"
    """Argument of the pipeline's call that sets it."""
    timestep_unit: ClassVar[float] = 1.0
    """Training timesteps in one unit of the network's input."""
    backwards: ClassVar[bool] = False
    """The network reads the share of the schedule that is behind, and predicts minus velocity."""
    negated: ClassVar[bool] = False
    """The pipeline takes minus the network's output."""
    one_by_one: ClassVar[bool] = True
    """Prompts are encoded alone: the pipeline brings those of a call to one length."""
    negatives_as_prompts: ClassVar[bool] = False
    """Negative prompts are read like prompts, so that the empty prompt stands for none."""
    patch: ClassVar[int] = 1
    """Side of the patches of latents that the network reads as one."""
    stack: ClassVar[int] = 1
    """Side of the squares of the autoencoder's latents that stand in one position of these."""
    packed: ClassVar[bool] = False
    """The pipeline turns latents into a sequence of patches, and back for the autoencoder."""
    video: ClassVar[bool] = False
    """Latents have frames."""
    one_frame: ClassVar[bool] = False
    """The autoencoder is one of videos, asked for a single frame."""
    arguments: ClassVar[Mapping[str, Any]] = {}
    """Of every call of the pipeline, besides size and guidance."""
    half_precision: ClassVar[torch.dtype] = torch.bfloat16
    """What it computes in on a GPU; bfloat16 where activations leave the range of float16."""

    def __init__(
        self, pipeline: Any, resolution: int | tuple[int, int] | None, frames: int | None = None
    ):
        self.pipeline, self.frames = pipeline, frames
        if frames is not None and not accepted(pipeline, {"num_frames": frames}):
            raise ValueError(
                f"`frames` is of videos, and {type(pipeline).__name__} makes images: leave it out."
            )
        together = self.frames_per_latent
        if frames is not None and (frames < 1 or frames % together != 1 % together):
            fewer = max(0, frames - 1) // together * together + 1
            raise ValueError(
                f"`frames` must be 1 more than a multiple of {together}, got {frames}: take "
                f"{fewer} or {fewer + together}."
            )
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.height, self.width = self._check(self._pixels() if size is None else size)
        self._held: dict[Any, HeldCall] = {}
        self._texts: list[Any] = []
        self._layout: Layout | None = None

    @property
    def network(self) -> torch.nn.Module:
        """The U-Net or transformer."""
        return getattr(self.pipeline, self.network_name)

    @property
    def channels(self) -> int:
        """Channels of one latent."""
        return self.network.config.in_channels // (self.patch**2 if self.packed else 1)

    @classmethod
    def pixels(cls, pipeline: Any) -> int:
        """Return the pixels in the side of one latent of a pipeline of this family."""
        names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
        return (
            next(getattr(pipeline, name) for name in names if hasattr(pipeline, name)) * cls.stack
        )

    @classmethod
    def by_frame(cls, pipeline: Any, call: NetworkCall, rows: Tensor) -> Tensor | None:
        """Return latents as clips [row channel frame *place], None of images.

        Args:
            pipeline: Of this family.
            call: Of its network.
            rows: In the shape in which the network reads and answers.
        """
        return rows if rows.ndim == 5 and not (cls.one_frame or cls.packed) else None

    @property
    def multiple(self) -> int:
        """Pixels that height and width must be multiples of."""
        return self.pixels(self.pipeline) * self.patch

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent; frames after the channels for video."""
        return tuple(self.unpack(self.held().call.latents[:1]).shape[1:])

    @property
    def frames_per_latent(self) -> int:
        """Frames of a clip that stand in one frame of its latent."""
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        found = (getattr(self.pipeline, name, None) for name in names)
        return next((ratio for ratio in found if ratio), 1)

    @property
    def noise_dtype(self) -> torch.dtype:
        """In which the pipeline draws the noise that it starts from."""
        return self.held().noise_dtype or self.network.dtype

    @property
    def zero_unconditional(self) -> bool:
        """Whether guidance moves away from zeros instead of the empty prompt."""
        return False

    def parametrization(self) -> Parametrization:
        """Return what the network predicts, as its scheduler says."""
        config = self.pipeline.scheduler.config
        predicted = config.get("prediction_type", "epsilon")
        name = type(self.pipeline.scheduler).__name__
        if name.startswith("FlowMatch") or predicted == "flow_prediction":
            return "flow"
        if predicted not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The scheduler says prediction_type={predicted!r}; expected 'epsilon', "
                "'v_prediction' or a flow."
            )
        return predicted

    def schedule(self) -> Schedule:
        """Return the noise levels of this model."""
        config = self.pipeline.scheduler.config
        if self.parametrization() != "flow":
            return DiscreteSchedule(config)
        return FlowSchedule(self._levels, config.get("num_train_timesteps", 1000))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return prompts as the network reads them; the graph is kept where gradients are on."""
        layout, graph = self.layout, torch.is_grad_enabled()
        groups = [[prompt] for prompt in prompts] if self.one_by_one else [list(prompts)]
        parts = []
        for group in groups:
            call = replace(self._hold(group, graph=graph).call, layout=layout)
            parts.append(call.conditioning(range(len(group))))
        return concatenate(parts)

    def unconditional(self) -> Conditioning:
        """Return the single row that guidance moves away from where no negative is given."""
        guidance = self.guidance
        if self.negatives_as_prompts or self.guidance_distilled or not guidance.scale:
            return self.encode([""])
        arguments = self.guided_arguments(GUIDED_SCALE, 1)
        try:
            held = self._hold([""], arguments=arguments, second=guidance.calls == 2)
        except NotFollowed:  # as it is set up, its call is not guided
            return self.encode([""])
        call = replace(held.call, layout=self.layout)
        return call.conditioning([len(call.latents) - 1 if guidance.prompt_first else 0])

    def readers(self) -> list[tuple[Any, int]]:
        """Return tokenizer (None: zeros stand there) and positions, in the embeddings' order.

        Empty where the positions belong to no token of the prompt alone: templates stand around it.
        """
        return []

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents [row *latent] in the shape the network reads and answers in."""
        return self.pipeline._pack_latents(latents, *latents.shape) if self.packed else latents

    def unpack(self, packed: Tensor) -> Tensor:
        """Return latents [row *latent] from the network's shape."""
        if not self.packed:
            return packed
        scale = self.pipeline.vae_scale_factor
        latents = self.pipeline._unpack_latents(packed, self.height, self.width, scale)
        return latents.squeeze(2) if latents.ndim == 5 else latents

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        """Return clean latents [row *latent] as `autoencoder.decode` takes them."""
        return latents.unsqueeze(2) if self.one_frame else latents

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        """Return latents [row *latent] of those that `autoencoder.encode` gives."""
        return latents.squeeze(2) if self.one_frame else latents

    @classmethod
    def prediction(cls, output: Any, latents: Tensor) -> Tensor:
        """Return the prediction that the pipeline takes from what its network returns.

        Args:
            output: As the network returned it.
            latents: What the network read; variances that it learnt beside them are left out.
        """
        found = output[0] if isinstance(output, tuple) else output.sample
        if isinstance(found, list):
            found = torch.stack(found)
        if latents.ndim > 3 and found.shape[1] == 2 * latents.shape[1]:
            found = found[:, : latents.shape[1]]
        return -found if cls.negated else found

    @classmethod
    def answered(cls, output: Any, latents: Tensor, rows: Sequence[int], predicted: Tensor) -> Any:
        """Return the network's output with other predictions at some rows."""
        found = output[0] if isinstance(output, tuple) else output.sample
        values = -predicted if cls.negated else predicted
        if isinstance(found, Tensor) and found.shape[1:] != values.shape[1:]:  # learnt variances
            values = torch.cat([values.to(found), found[list(rows), values.shape[1] :]], dim=1)
        placed = written(found, rows, values)
        if isinstance(output, tuple):
            return (placed, *output[1:])
        return replace(output, sample=placed)

    @classmethod
    def overwrite(cls, output: Any, rows: Sequence[int], predicted: Tensor) -> None:
        """Put other predictions into the very tensor that a network returned."""
        found = output[0] if isinstance(output, tuple) else output.sample
        values = (-predicted if cls.negated else predicted).to(found)
        found[list(rows), : values.shape[1]] = values

    def training_timestep(self, time: float) -> float:
        """Return the scheduler's time at which the network reads `time`."""
        if self.backwards:
            return self.pipeline.scheduler.config.num_train_timesteps * (1 - time)
        own = self.held()
        return time * float(own.timesteps[0]) / float(own.call.time)

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's output [row *latent] for latents in the scheduler's own scale."""
        template = self.held(float(timestep))
        network = getattr(self.pipeline, self._name_of(template.network))
        call = replace(template.call, layout=self.layout)
        packed, parts, order = self.pack(latents), [], []
        for rows in _alike(cond):
            filled = call.filled(packed[rows], cond[rows])
            output = network(*filled.args, **filled.kwargs)
            parts.append(self.prediction(output, packed))
            order += rows
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(parts) > 1:
            found = found[torch.tensor(order, device=found.device).argsort()]
        return self.unpack(found)

    @property
    def layout(self) -> Layout:
        """Where the network's arguments hold what, learnt from the pipeline's own calls."""
        if self._layout is None:
            prompts = ["", ""], [OTHER_PROMPT], ["", OTHER_PROMPT]
            calls = [self._hold(each).call for each in prompts]
            self._layout = learn_layout(self.held().call, *calls)
        return self._layout

    def held(self, timestep: float | None = None) -> HeldCall:
        """Return the pipeline's first network call for the empty prompt, once per size and time.

        Args:
            timestep: Of the scheduler; None for the first of a run.
        """
        arguments = self._arguments()
        key = (timestep, self.network.dtype, self.pipeline._execution_device, *arguments.items())
        if key not in self._held:
            if len(self._held) >= KEPT_CALLS:
                self._held.clear()
            held = self._hold([""], time=timestep, texts=self._texts)
            if held.size not in (None, (self.height, self.width)):
                raise ValueError(
                    f"The pipeline makes images of {held.size[0]} x {held.size[1]} pixels in place "
                    f"of {self.height} x {self.width}: give the former as `resolution`."
                )
            if timestep is not None:  # which differs in nothing else; latents are what is large
                call = held.call.with_all_latents(self.held().call)
                held = replace(held, call=call)
            self._held[key] = held
        return self._held[key]

    def call(self, args: tuple, kwargs: dict[str, Any]) -> NetworkCall:
        """Return a call of the network by its meaning."""
        names = self.held().call.names
        return NetworkCall(args=args, kwargs=kwargs, names=names, layout=self.layout)

    def _hold(self, prompts: Sequence[str], steps: int = FINE_STEPS, **options: Any) -> HeldCall:
        return hold(
            self.pipeline,
            [network for _, network in self._networks()],
            prompts,
            scheduler=self._scheduler(),
            steps=steps,
            **{"arguments": self._arguments(), **options},
        )

    def _arguments(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "height": self.height, "width": self.width,
            "use_resolution_binning": False,  # the size that was asked for, not the nearest known
            **self.arguments,
        }  # fmt: skip
        if self.guidance.scale and not self.guidance.negative:
            given[self.guidance.scale] = self.guidance.off
        if self.guidance_embedding is not None:
            given[self.guidance_input] = self.guidance_embedding
        if self.t5_length is not None:
            given["max_sequence_length"] = self.t5_length
        if self.frames is not None:
            given["num_frames"] = self.frames
        return accepted(self.pipeline, given)

    def guided_arguments(self, scale: float, images: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that guide it, and of its size.

        A network that guides itself keeps its own constant.
        """
        given, guidance = self._arguments(), self.guidance
        if guidance.scale and not self.guidance_distilled:
            given[guidance.scale] = scale - guidance.offset
            if guidance.negative:
                given["negative_prompt"] = [""] * images
        return accepted(self.pipeline, given)

    def _levels(self, steps: int) -> tuple[Tensor, Tensor]:
        held = self._hold([""], steps=steps, texts=self._texts)
        assert held.sigmas is not None
        return held.sigmas, held.timesteps

    def _scheduler(self) -> Any:
        """Return a scheduler that keeps latents at the scale of `Schedule`, at its levels."""
        import diffusers

        own = self.pipeline.scheduler
        if self.parametrization() != "flow":
            return diffusers.DDIMScheduler.from_config(
                own.config, clip_sample=False, thresholding=False
            )
        if type(own).__name__.startswith("FlowMatch"):
            return diffusers.FlowMatchEulerDiscreteScheduler.from_config(own.config)
        return type(own).from_config(own.config)

    def _networks(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for name in {self.network_name: None, **dict.fromkeys(NETWORKS)}:
            if isinstance(network := getattr(self.pipeline, name, None), torch.nn.Module):
                yield name, network

    def _name_of(self, network: torch.nn.Module) -> str:
        names = [name for name, own in self._networks() if own is network]
        return names[0] if names else self.network_name  # it was exchanged since

    def _pixels(self) -> tuple[int, int]:
        takes = inspect.signature(type(self.pipeline).__call__).parameters
        given = [takes[side].default for side in ("height", "width") if side in takes]
        if len(given) == 2 and all(isinstance(side, int) for side in given):
            return given[0], given[1]
        size = getattr(self.pipeline, "default_sample_size", None)
        size = self.network.config.get("sample_size", 128) if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        scale = self.pixels(self.pipeline) // self.stack
        return height * scale, width * scale

    def _check(self, size: tuple[int, int]) -> tuple[int, int]:
        if any(side < self.multiple or side % self.multiple for side in size):
            raise ValueError(
                f"`resolution` must be a positive multiple of {self.multiple} pixels, "
                f"got {size[0]} x {size[1]}."
            )
        latent = self.pipeline.vae.config.get("latent_channels", self.channels)
        if self.channels not in (latent, latent * self.stack**2):
            raise ValueError(
                f"The network reads {self.channels} channels, its autoencoder makes {latent}: this "
                "is an inpainting or editing model; give the text-to-image model it was made from."
            )
        return size


def _alike(cond: Conditioning) -> list[list[int]]:
    """Return the rows whose text can stand in one network call: all of one length."""
    if not cond.lengths and not cond.others:
        return [list(range(len(cond)))]
    groups: dict[Any, list[int]] = {}
    for row in range(len(cond)):
        other = tuple(map(_shape, cond.others[row].values())) if cond.others else ()
        length = cond.lengths[row] if cond.lengths else 0
        groups.setdefault((length, other), []).append(row)
    return list(groups.values())


def _shape(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_shape, value))
    return tuple(value.shape) if isinstance(value, Tensor) else value
