"""The first steps of sampling, on which detection measures, and the passes they cost."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..arrays import Float, Tensor
from .clips import clip_norms
from .config import DetectionConfig
from .control_basis import ControlBasis
from .denoiser import Conditioning, Denoiser
from .metrics import text_noise, text_noise_norm

log = logging.getLogger(__name__)

ROWS_OF_A_GRADIENT = 4
"""Forward rows that need as much memory as one row with its gradient, roughly."""


class PredictionError(ValueError):
    """A prediction, or a gradient of one, is NaN or infinite."""


def not_finite(what: str, denoiser: Denoiser) -> PredictionError:
    """Return the error that names what is not finite, and the remedy if there is one.

    float16 ends at 65,504; bfloat16 has the range of float32.
    """
    hint = "The weights may be damaged."
    if denoiser.dtype == torch.float16:
        hint = "float16 may be too narrow for this model: try bfloat16 or float32."
    return PredictionError(f"{what} is not finite (in {denoiser.dtype}). {hint}")


def guided_step(
    x: Tensor,
    x0_uncond: Tensor,
    x0_cond: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    cond_scale: float,
) -> Tensor:
    """Return x at `sigma_next`: classifier-free guidance, then DDIM (Euler for flows)."""
    # Ho & Salimans 2022 (arXiv:2207.12598) Eq. 6 with cond_scale = 1 + w.
    x0 = x0_cond if cond_scale == 1.0 else x0_uncond + cond_scale * (x0_cond - x0_uncond)
    return x0 + sigma_next / sigma * (x - x0)


def automatic_rows(denoiser: Denoiser) -> int:
    """Return how many rows one forward pass should have.

    CPU: few enough that activations stay near the cache, 32 for latents of 16 x 16, 2 for 64 x 64.
    CUDA: what half of the free memory holds, at most 64; running out halves it.
    """
    if denoiser.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(denoiser.device)
        # About 16 KiB per latent element in 16 bit: measured on SD 1.x, generous for later ones.
        row = math.prod(denoiser.latent_shape) * denoiser.dtype.itemsize * 8192
        return max(1, min(64, int(free / 2 / row)))
    return max(1, min(32, 8192 // math.prod(denoiser.latent_shape[1:])))


def gradient_rows(denoiser: Denoiser) -> int:
    """Return how many rows one forward pass with its gradient should have."""
    return max(1, automatic_rows(denoiser) // ROWS_OF_A_GRADIENT)


def loss_scale(denoiser: Denoiser) -> float:
    """Return what to multiply a loss with, and to divide its gradient by.

    float16 ends at 6e-8; a power of two keeps small gradients from vanishing on their way back.
    """
    return 256.0 if denoiser.dtype == torch.float16 else 1.0


class Trajectory:
    """The sampling trajectories of one config, and what all prompts share of them.

    That is noise levels, starting points and the first predictions from the empty prompt.
    """

    @torch.inference_mode()
    def __init__(
        self, denoiser: Denoiser, config: DetectionConfig, basis: ControlBasis | None = None,
        *, told: Sequence[int] | None = None,
    ):  # fmt: skip
        """Prepare what all prompts share.

        Args:
            denoiser: The network.
            config: Seeds and steps.
            basis: Of the same seeds; prompts are scored by it then, at its own steps.
            told: Where the trajectories begin, at pure noise: which step's level the network is
                told, one a seed. None for those of the basis, else the first step.
        """
        if basis is not None and told is not None:
            raise ValueError("A basis has its own steps: give it or `told`.")
        if basis is not None and (config.steps > 1 or len(config.seeds) > len(basis.mean)):
            raise ValueError(
                f"A basis of {len(basis.mean)} seeds scores one step at these seeds, got "
                f"{config.steps} steps and {len(config.seeds)} seeds."
            )
        elements = math.prod(denoiser.latent_shape)
        if basis is not None and basis.mean.shape[1] != elements:
            raise ValueError(
                f"The controls were measured on latents of {basis.mean.shape[1]} elements, these "
                f"have {elements}: a residual needs the same size. Calibrate at this one."
            )
        self.denoiser, self.config = denoiser, config
        self.basis = None if basis is None else basis.to(denoiser.device)
        told = told or (basis.steps if basis else [0] * len(config.seeds))
        self.told = tuple(told[: len(config.seeds)])
        self.rows = config.batch_size or automatic_rows(denoiser)
        # A network that guides itself samples along its own prediction.
        self.cond_scale = 1.0 if denoiser.guidance_distilled else config.cond_scale
        self.sigmas = denoiser.sigmas(config.schedule_steps)
        self.empty = denoiser.unconditional()
        noise = [
            denoiser.initial_noise([seed], self.sigmas[step])
            for seed, step in zip(config.seeds, self.told, strict=True)
        ]
        self.noise = torch.cat(noise)
        self.x0_uncond = self._in_batches([*range(len(self.noise))], self._unconditional)
        if not self.x0_uncond.isfinite().all():
            raise not_finite("The prediction for the empty prompt", denoiser)

    @torch.inference_mode()
    def traces(
        self, texts: Sequence[str], cond: Conditioning, prompts: Sequence[int],
        seeds: Sequence[int], differences: list[Tensor] | None = None,
        clips: list[Tensor] | None = None,
    ) -> Float[Tensor, " row step"]:  # fmt: skip
        """Return |D| per step, or the score that the basis gives, float64 on the CPU.

        Args:
            texts: Prompts.
            cond: The same, encoded.
            prompts: Index into `texts`, one a row.
            seeds: Index into the config's seeds, one a row.
            differences: Takes D of the first step as well, [row element] float32 on the CPU, as
                many tensors as there are batches; of the same forward passes. Without a basis.
            clips: Takes `ClipNorms` of every step as well, packed, [row step part] float64 on the
                CPU, in the same way. Without a basis, of latents with frames.

        Raises:
            PredictionError: A prediction is NaN or infinite; names the prompt.
        """
        if len(set(self.told)) > 1 and not differences is clips is None:
            raise ValueError("What is kept comes in the order of batches: of one level alone.")
        measure = partial(self._traces, kept=differences, clips=clips)
        rows = self._rows(texts, cond, prompts, seeds, measure)
        rows = rows.double()
        return rows if self.basis is None else self.basis.scores(rows[:, 0], seeds)[:, None]

    @torch.inference_mode()
    def differences(
        self, texts: Sequence[str], cond: Conditioning, prompts: Sequence[int], seeds: Sequence[int]
    ) -> Float[Tensor, " row element"]:
        """Return D of the first step, float32 on the CPU; arguments and errors as of `traces`."""
        return self._rows(texts, cond, prompts, seeds, self._differences)

    def _rows(
        self, texts: Sequence[str], cond: Conditioning, prompts: Sequence[int],
        seeds: Sequence[int], measure: Callable[[Conditioning, list[int]], Tensor],
    ) -> Tensor:  # fmt: skip
        def of_batch(batch: list[int]) -> Tensor:
            return measure(cond[[prompts[i] for i in batch]], [seeds[i] for i in batch])

        rows = self._in_batches(seeds, of_batch)
        if not (finite := rows.isfinite().all(1)).all():
            text = texts[prompts[int((~finite).nonzero()[0])]]
            raise not_finite(f"The prediction for the prompt {text[:200]!r}", self.denoiser)
        return rows

    def _in_batches(self, seeds: Sequence[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Return `compute` of all rows, of batches whose rows are told the same level.

        Out of GPU memory, batches are halved for good.

        Args:
            seeds: Of each row.
            compute: From the indices of some rows to a result for each.
        """
        parts, order = [], []
        for step in sorted(set(self.told)):
            waiting = [row for row, seed in enumerate(seeds) if self.told[seed] == step]
            while waiting:
                batch = waiting[: self.rows]
                try:
                    parts.append(compute(batch))
                    order += batch
                    waiting = waiting[len(batch) :]
                    continue
                except torch.cuda.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                # Outside of `except`, where the error keeps all tensors of the failed pass alive.
                self.rows = len(batch) // 2
                torch.cuda.empty_cache()
                log.warning("out of GPU memory: going on with batches of %d", self.rows)
        found = torch.cat(parts)
        return found[torch.tensor(order, device=found.device).argsort()]

    def _unconditional(self, seeds: list[int]) -> Tensor:
        x = self.noise[seeds]
        sigma = self.sigmas[self.told[seeds[0]]]
        return self.denoiser.denoise(x, sigma, self.empty[[0] * len(x)])

    def _traces(
        self, cond: Conditioning, seeds: list[int], kept: list[Tensor] | None,
        clips: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        x, x0_uncond, norms, parts = self.noise[seeds], self.x0_uncond[seeds], [], []
        start = self.told[seeds[0]]
        for step in range(self.config.steps):
            sigma = self.sigmas[start + step]
            if step > 0:
                x0_uncond = self.denoiser.denoise(x, sigma, self.empty[[0] * len(x)])
            x0_cond = self.denoiser.denoise(x, sigma, cond)
            if self.basis is None:
                norms.append(text_noise_norm(x0_cond, x0_uncond) / sigma)
            else:
                norms.append(self.basis.residual(text_noise(x0_uncond, x0_cond, sigma), seeds))
            if clips is not None:
                parts.append(clip_norms(text_noise(x0_uncond, x0_cond, sigma)).packed())
            if step + 1 < self.config.steps:
                sigma_next = self.sigmas[start + step + 1]
                x = guided_step(x, x0_uncond, x0_cond, sigma, sigma_next, self.cond_scale)
            if step == 0 and kept is not None:
                first = text_noise(x0_uncond, x0_cond, sigma).flatten(1).float().cpu()
        if kept is not None:  # at the end: a batch that ran out of memory on its way comes again
            kept.append(first)
        if clips is not None:
            clips.append(torch.stack(parts, 1).cpu().double())
        return torch.stack(norms, 1).cpu()

    def _differences(self, cond: Conditioning, seeds: list[int]) -> Tensor:
        sigma = self.sigmas[self.told[seeds[0]]]
        x0_cond = self.denoiser.denoise(self.noise[seeds], sigma, cond)
        return text_noise(self.x0_uncond[seeds], x0_cond, sigma).flatten(1).float().cpu()


@torch.inference_mode()
def encode(denoiser: Denoiser, prompts: Sequence[str]) -> Conditioning:
    """Return the prompts as the network reads them, without a graph."""
    return denoiser.encode(prompts)
