"""Any supported diffusers text-to-image pipeline as a `Denoiser`."""

import hashlib
import logging
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
from .families import family_of
from .lora.attach import has_lora, lora_disabled
from .lora.names import CARRIERS
from .quiet import quiet
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


class PipelineDenoiser:
    """SD 1/2, SDXL, SD3 and Flux pipelines, with whatever LoRA is loaded, as a `Denoiser`.

    The pipeline stays the user's: nothing of it is changed. Its scheduler is only read.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        resolution: int | tuple[int, int] | None = None,
        weights: Callable[[], str] | None = None,
    ):
        """Wrap a pipeline.

        Args:
            pipeline: A diffusers text-to-image pipeline, on its device and in its dtype.
            resolution: Side of the images in pixels, or height and width; None for what the model
                was made for.
            weights: Returns the sha256 of the files that the pipeline was loaded from; None for a
                pipeline that is known from memory alone.
        """
        self.pipeline, self._weights = pipeline, weights
        self.family = family_of(pipeline)(pipeline, resolution)
        self.schedule = self.family.schedule()
        self.parametrization = self.family.parametrization()
        self.latent_shape = self.family.latent_shape
        self.guidance_distilled = self.family.guidance_distilled
        self.caveats: tuple[str, ...] = (DISTILLED,) if self.guidance_distilled else ()
        for caveat in self.caveats:
            log.warning(caveat)

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
                for key, tensor in sorted(part.state_dict().items()):
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
        with quiet():  # what is cut is logged below, once and as data
            embeddings, pooled = self.family.encode(prompts)
            readings = [self._read(prompt, embeddings.shape[1]) for prompt in prompts]
        words = tuple(split_words(prompt) for prompt in prompts)
        cut = tuple(" ".join(w[r.first_cut :]) for w, r in zip(words, readings, strict=True))
        for prompt, end in zip(prompts, cut, strict=True):
            if end:
                log.warning(
                    "A prompt is too long for the text encoder. It starts with %r; its last "
                    "%d words are not read, from %r on.",
                    prompt[:40], len(end.split()), end[:40],
                )  # fmt: skip
        return Conditioning(
            embeddings=embeddings,
            pooled=pooled,
            tokens=tuple(reading.tokens for reading in readings),
            words=words,
            cut=cut,
        )

    def _read(self, prompt: str, positions: int) -> Reading:
        """Return what stands at each position, over all encoders whose tokens are joined."""
        tokens: tuple[Token, ...] = ()
        first_cut = 0
        for tokenizer, length in self.family.readers():
            if tokenizer is None:  # an encoder that was left out: zeros stand there
                tokens += (Token(text="", word=None),) * (positions - len(tokens))
                continue
            reading = self._read_by(tokenizer, prompt, length)
            tokens += reading.tokens
            first_cut = max(first_cut, reading.first_cut)  # what no encoder reads is cut
        return Reading(tokens=tokens, first_cut=first_cut)

    def _read_by(self, tokenizer: Any, prompt: str, length: int) -> Reading:
        """Return what one tokenizer puts at each of `length` positions."""
        convert = getattr(self.pipeline, "maybe_convert_prompt", _as_typed)
        return read(tokenizer, prompt, length, partial(convert, tokenizer=tokenizer))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def encode_inputs(self, prompt: str) -> TextInputs:
        """Return a prompt with the graph from the text encoders' input embeddings."""
        encoders = encoders_of(self.pipeline)
        with quiet(), ExitStack() as hooks:
            seen = [hooks.enter_context(input_leaves(encoder)) for encoder, _ in encoders]
            embeddings, pooled = self.family.encode([prompt])
            tokenizers = [tokenizer for _, tokenizer in encoders]
            found = [(leaf, tokenizer) for leaves, tokenizer in zip(seen, tokenizers, strict=True)
                     for leaf in leaves]  # fmt: skip
            readings = [self._read_by(tokenizer, prompt, leaf.shape[1])
                        for leaf, tokenizer in found]  # fmt: skip
        return TextInputs(
            cond=Conditioning(embeddings=embeddings, pooled=pooled),
            leaves=tuple(leaf for leaf, _ in found),
            tokens=tuple(reading.tokens for reading in readings),
        )

    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Return the single row guidance moves away from: the empty prompt, or zeros."""
        empty = self.encode([""])
        if not self.family.zero_unconditional:
            return empty
        return replace(
            empty,
            embeddings=torch.zeros_like(empty.embeddings),
            pooled=None if empty.pooled is None else torch.zeros_like(empty.pooled),
        )

    def sigmas(self, steps: int) -> Float[Tensor, " level"]:
        """Return the noise levels of DDIM or Euler, [steps + 1], noisiest first, on the CPU."""
        return self.schedule.sigmas(steps)

    def initial_noise(self, seeds: Sequence[int], sigma: Tensor) -> Float[Tensor, " seed *latent"]:
        """Return x at `sigma` as the pipeline starts from ``torch.Generator("cpu")`` of each seed.

        The noise is drawn in the network's dtype, as the pipeline does, and returned in float32.
        """
        shape = (1, *self.latent_shape)
        rows = [
            torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=self.dtype)
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
        output = self.family.predict((x / scale).to(self.dtype), timestep, cond).to(x.dtype)
        return x0_from_output(self.parametrization, x, level, output)

    def decode(self, latents: Float[Tensor, "row channel height width"]) -> Tensor:
        """Return images [row 3 height width] in 0..1 of clean latents."""
        return decode(self.pipeline.vae, latents)

    def encode_images(self, images: "Sequence[Image]") -> Float[Tensor, " image *latent"]:
        """Return clean latents of images, each resized to the network's own size."""
        import numpy as np

        height, width = self.resolution
        pixels = [np.asarray(image.convert("RGB").resize((width, height))) for image in images]
        return encode(
            self.pipeline.vae, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        )

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
        if len(prompts) == 1:
            prompts = [*prompts] * len(seeds)
        if len(prompts) != len(seeds) or not seeds:
            raise ValueError(f"Give one seed per prompt, {len(prompts)}, got {len(seeds)}.")
        if self.family.guidance_embedding is not None:
            cond_scale = self.family.guidance_embedding
        height, width = self.resolution
        with quiet(), _bare(self.pipeline):
            return self.pipeline(
                list(prompts),
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=cond_scale,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            ).images


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
