"""Any supported diffusers text-to-image pipeline as a `Denoiser`."""

import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arrays import Float
from ..score.denoiser import Conditioning, TextInputs, Token
from ..score.noise_levels import x0_from_output
from .autoencoder import decode, encode
from .calls.quiet import quiet
from .checks import check_frames
from .families import family_of
from .lora.attach import has_lora, lora_disabled
from .lora.names import CARRIERS
from .offload import moving_weights, put_away, weights_of
from .text_inputs import encoders_of, input_leaves
from .tokens import Reading, read, split_words

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

DISTILLED = (
    "The network guides itself and has no unconditional branch: the empty prompt is run as an "
    "extra pass, and scores are on another scale than those of guided models. Calibrate on this "
    "model."
)
SHORTEST = 256
"""Tokens that any of the encoders reads whose pipelines do not say how many."""


class PipelineDenoiser:
    """A text-to-image pipeline, with whatever LoRA is loaded, as a `Denoiser`.

    The pipeline stays the user's: nothing of it is changed. Its scheduler is only read.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        resolution: int | tuple[int, int] | None = None,
        frames: int | None = None,
        weights: Callable[[], str] | None = None,
    ):
        """Wrap a pipeline.

        Args:
            pipeline: A diffusers text-to-image pipeline, on its device and in its dtype.
            resolution: Side of the images in pixels, or height and width; None for what the model
                was made for.
            frames: Of a video, None for as many as the pipeline makes by itself; images have none.
            weights: Returns the sha256 of the files that the pipeline was loaded from; None for a
                pipeline that is known from memory alone.
        """
        self.pipeline, self._weights = pipeline, weights
        self.family = family_of(pipeline)(pipeline, resolution, frames)
        if frames is not None and not self.family.video:
            raise ValueError(
                f"`frames` is the length of a video, and {type(pipeline).__name__} makes images: "
                "leave it out."
            )
        self.schedule = self.family.schedule()
        self.parametrization = self.family.parametrization()
        self.guidance_distilled = self.family.guidance_distilled
        self.caveats: tuple[str, ...] = (DISTILLED,) if self.guidance_distilled else ()
        for caveat in self.caveats:
            log.warning(caveat)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent; frames after the channels for video."""
        shape = self.family.latent_shape
        if len(shape) == 4:
            ratio = self.family.frames_per_latent
            check_frames(shape, self.dtype, str(self.device), ratio)
        return shape

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return torch.device(self.pipeline._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.family.network.dtype

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.family.height, self.family.width

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of the weights, LoRA included: of their files if known, else of the tensors."""
        if self._weights is not None:
            return self._weights()
        total = hashlib.sha256()
        for name in CARRIERS:
            if (part := getattr(self.pipeline, name, None)) is not None:
                for key, tensor in sorted(weights_of(part).items()):
                    total.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
                    values = tensor.detach().cpu().contiguous().flatten()
                    total.update(values.view(torch.uint8).numpy())
        return total.hexdigest()

    @property
    def has_lora(self) -> bool:
        """Whether the pipeline carries a LoRA."""
        return has_lora(self.pipeline)

    def lora_disabled(self) -> AbstractContextManager[None]:
        """Switch the loaded LoRA off for a block."""
        return lora_disabled(self.pipeline)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the prompts as the network reads them, one row a prompt."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"`prompts` must be a list of at least one prompt, got {prompts!r}.")
        put_away(self.pipeline)
        with quiet(), moving_weights(self.pipeline):  # what is cut is logged below, once
            cond = self.family.encode(prompts)
            readings = [self._read(prompt, cond.embeddings.shape[1]) for prompt in prompts]
        put_away(self.pipeline)
        words = tuple(split_words(prompt) for prompt in prompts)
        cut = tuple(" ".join(w[r.first_cut :]) for w, r in zip(words, readings, strict=True))
        for prompt, end in zip(prompts, cut, strict=True):
            if end:
                log.warning(
                    "A prompt is too long for the text encoder. It starts with %r; its last "
                    "%d words are not read, from %r on.",
                    prompt[:40], len(end.split()), end[:40],
                )  # fmt: skip
        tokens = tuple(reading.tokens for reading in readings)
        return replace(cond, tokens=tokens, words=words, cut=cut)

    def _read(self, prompt: str, positions: int) -> Reading:
        """Return what stands at each position, over all encoders whose tokens are joined."""
        tokens: tuple[Token, ...] = ()
        first_cut = 0
        if not self.family.readers():
            return Reading(tokens=(), first_cut=self._first_cut(prompt))
        for tokenizer, length in self.family.readers():
            if tokenizer is None:  # an encoder that was left out: zeros stand there
                tokens += (Token(text="", word=None),) * (positions - len(tokens))
                continue
            reading = self._read_by(tokenizer, prompt, length)
            tokens += reading.tokens
            first_cut = max(first_cut, reading.first_cut)  # what no encoder reads is cut
        return Reading(tokens=tokens, first_cut=first_cut)

    def _first_cut(self, prompt: str) -> int:
        """Return the first word without which, and all after it, the prompt is read the same."""
        ends = [match.end() for match in re.finditer(r"\S+", prompt)]
        takes = inspect.signature(type(self.pipeline).__call__).parameters
        room = getattr(takes.get("max_sequence_length"), "default", None) or SHORTEST
        tokenizers = [tokenizer for _, tokenizer in encoders_of(self.pipeline)]
        counts = [len(t.tokenize(prompt)) for t in tokenizers if hasattr(t, "tokenize")]
        if max(counts, default=0) < room / 2:  # templates take no more than the other half
            return len(ends)
        whole = self.family.encode([prompt])
        first, last = 0, len(ends)
        while first < last:
            middle = (first + last) // 2
            if _alike(self.family.encode([prompt[: ends[middle - 1] if middle else 0]]), whole):
                last = middle
            else:
                first = middle + 1
        return first

    def _read_by(self, tokenizer: Any, prompt: str, length: int) -> Reading:
        """Return what one tokenizer puts at each of `length` positions."""
        convert = getattr(self.pipeline, "maybe_convert_prompt", _as_typed)
        return read(tokenizer, prompt, length, partial(convert, tokenizer=tokenizer))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def encode_inputs(self, prompt: str) -> TextInputs:
        """Return a prompt with the graph from the text encoders' input embeddings."""
        if not self.family.readers():
            raise ValueError(
                f"{type(self.pipeline).__name__} puts a template around the prompt, so what its "
                "text encoder reads cannot be told apart by words: leave words out instead."
            )
        encoders = encoders_of(self.pipeline)
        put_away(self.pipeline)
        with quiet(), moving_weights(self.pipeline), ExitStack() as hooks:
            seen = [hooks.enter_context(input_leaves(encoder)) for encoder, _ in encoders]
            cond = self.family.encode([prompt])
            tokenizers = [tokenizer for _, tokenizer in encoders]
            found = [(leaf, tokenizer) for leaves, tokenizer in zip(seen, tokenizers, strict=True)
                     for leaf in leaves]  # fmt: skip
            readings = [self._read_by(tokenizer, prompt, leaf.shape[1])
                        for leaf, tokenizer in found]  # fmt: skip
        return TextInputs(
            cond=cond,
            leaves=tuple(leaf for leaf, _ in found),
            tokens=tuple(reading.tokens for reading in readings),
        )

    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Return the single row guidance moves away from: the empty prompt, or zeros."""
        empty = self.encode([""])
        own = self.family.unconditional()
        if self.family.zero_unconditional:
            own = replace(
                own,
                embeddings=torch.zeros_like(own.embeddings),
                pooled=None if own.pooled is None else torch.zeros_like(own.pooled),
            )
        return replace(own, tokens=empty.tokens, words=empty.words, cut=empty.cut)

    def sigmas(self, steps: int) -> Float[Tensor, " level"]:
        """Return the noise levels of DDIM or Euler, [steps + 1], noisiest first, on the CPU."""
        return self.schedule.sigmas(steps)

    def initial_noise(self, seeds: Sequence[int], sigma: Tensor) -> Float[Tensor, " seed *latent"]:
        """Return x at `sigma` as the pipeline starts from ``torch.Generator("cpu")`` of each seed.

        The noise is drawn in the dtype in which the pipeline does, and returned in float32.
        """
        shape, dtype = (1, *self.latent_shape), self.family.noise_dtype
        rows = [
            torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
            for seed in seeds
        ]
        noise = torch.cat(rows).float().to(self.device)
        return noise * self.schedule.latent_scale(float(sigma))

    def denoise(
        self, x: Float[Tensor, " row *latent"], sigma: Tensor, cond: Conditioning
    ) -> Float[Tensor, " row *latent"]:
        """Return the x0-prediction in the dtype of `x`, differentiable in x and the embeddings.

        Args:
            x: [row *latent] at `sigma`; float32 keeps the digits that fp16 networks do not need.
            sigma: Scalar noise level, an element of `sigmas`.
            cond: One row per row of `x`.
        """
        if len(cond) != len(x):
            raise ValueError(f"`cond` must have one row per row of `x`, {len(x)}, got {len(cond)}.")
        level = float(sigma)
        scale = self.schedule.latent_scale(level)
        timestep = self.schedule.timestep(level).to(self.device)
        with moving_weights(self.pipeline):
            output = self.family.predict((x / scale).to(self.dtype), timestep, cond).to(x.dtype)
        return x0_from_output(self.parametrization, x, level, output)

    def decode(self, latents: Float[Tensor, " row *latent"]) -> Tensor:
        """Return images [row 3 height width] in 0..1 of clean latents; of video, frames."""
        with moving_weights(self.pipeline):
            latents = self.family.to_autoencoder(latents)
            images = decode(self.pipeline.vae, latents, self.device)
        put_away(self.pipeline)
        still = images.ndim == 5 and len(self.latent_shape) == 3
        return images.squeeze(2) if still else images

    def encode_images(self, images: "Sequence[Image]") -> Float[Tensor, " image *latent"]:
        """Return clean latents of images, each resized to the network's own size."""
        import numpy as np

        height, width = self.resolution
        pixels = [np.asarray(image.convert("RGB").resize((width, height))) for image in images]
        rows = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        if len(self.latent_shape) == 4 or self.family.one_frame:
            rows = rows.unsqueeze(2)
        with moving_weights(self.pipeline):
            latents = encode(self.pipeline.vae, rows, self.device)
            latents = self.family.from_autoencoder(latents)
        put_away(self.pipeline)
        return latents

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 30,
        cond_scale: float = 7.5,
    ) -> "list[Image]":
        """Return one image per prompt and seed, made by the pipeline's own call and scheduler.

        Args:
            prompts: As many as `seeds`, or one, used for every seed.
            seeds: Each starts its own ``torch.Generator("cpu")``.
            steps: Denoising steps.
            cond_scale: Guidance; a network that guides itself keeps its own constant.
        """
        if self.family.video:
            raise ValueError("Images are drawn here, and this pipeline makes videos: call it.")
        return self._call(prompts, seeds, steps, cond_scale).images

    @torch.no_grad()
    def generate_clips(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, cond_scale: float
    ) -> "list[list[Image]]":
        """Return the frames of one clip per prompt and seed; arguments as of `generate`."""
        return self._call(prompts, seeds, steps, cond_scale, output_type="pil").frames

    def _call(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, cond_scale: float,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Return what the pipeline's own call gives."""
        if len(prompts) == 1:
            prompts = [*prompts] * len(seeds)
        if len(prompts) != len(seeds) or not seeds:
            raise ValueError(f"Give one seed per prompt, {len(prompts)}, got {len(seeds)}.")
        arguments = {
            "prompt": list(prompts),
            "num_inference_steps": steps,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **self.family.guided_arguments(cond_scale, len(prompts)),
            **options,
        }
        put_away(self.pipeline)
        with quiet(), moving_weights(self.pipeline), _bare(self.pipeline):
            return self.pipeline(**arguments)


def _alike(one: Conditioning, other: Conditioning) -> bool:
    return one.embeddings.shape == other.embeddings.shape and torch.equal(
        one.embeddings, other.embeddings
    )


def _as_typed(text: str, tokenizer: Any) -> str:
    return text


@contextmanager
def _bare(pipeline: Any) -> Iterator[None]:
    """Take out a pipeline's progress bar and its safety checker for a block.

    The one would tear ours apart, the other replaces images by black ones.
    """
    bar, checker = "_progress_bar_config", getattr(pipeline, "safety_checker", None)
    before = vars(pipeline).get(bar)
    try:
        vars(pipeline)[bar] = {**(before or {}), "disable": True}
        if checker is not None:
            pipeline.safety_checker = None
        yield
    finally:
        vars(pipeline)[bar] = before
        if before is None:
            del vars(pipeline)[bar]
        if checker is not None:
            pipeline.safety_checker = checker
