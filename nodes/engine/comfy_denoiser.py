"""A MODEL of ComfyUI with CONDITIONINGs as a `Denoiser`, and the noise levels it is measured at."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch

from ...shared.arrays import Float, Tensor
from ...shared.score.denoiser import Conditioning, Parametrization, Token
from ...shared.score.noise_levels import nearest_timestep, noise_scale
from .differentiable import differentiable, normal, writes_in_place

OnPrediction = Callable[[Tensor, Tensor], None]
"""Called with x and the x0-prediction, each [row *latent], after a forward pass."""
NEGATIVE = "\0negative"
"""Name of the unconditional prompt; no text can hold it."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A CONDITIONING, with its text where that is known."""

    entries: list
    """As ComfyUI passes it: pairs of embeddings [1 token width] and a dict."""
    tokens: tuple[Token, ...] = ()
    """What stands at each position of the first entry's embeddings."""
    words: tuple[str, ...] = ()
    """Words of the text, in order; `Token.word` indexes them."""


class ModelDenoiser:
    """What ComfyUI's sampler has prepared, as a `Denoiser`.

    One prompt is one CONDITIONING with everything in it. Several entries (Conditioning Combine,
    areas, masks, timestep ranges) are averaged as the sampler averages them, long prompts keep all
    their chunks, pooled text and sizes go along; the embeddings that can be differentiated are
    those of the first entry. Scores are the difference to the negative CONDITIONING, whatever
    that says: connect the empty prompt (for SDXL, zeroed out) to compare with other hosts.
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        prompts: Mapping[str, Prompt],
        model_options: dict,
        noise: Tensor,
        on_prediction: OnPrediction,
    ):
        """Wrap a guider inside its call of the sampler.

        Args:
            guider: With one list of conds per prompt, by the prompt's name, and the negative's.
            prompts: By the name that `encode` takes.
            model_options: Of this sampling run.
            noise: [row *latent] on the device of the network.
            on_prediction: Called with x and the x0-prediction after each forward pass.
        """
        self._made_from = guider, prompts, model_options, noise, on_prediction
        self.network, self.sampling = guider.inner_model, guider.inner_model.model_sampling
        self.parametrization = parametrization_of(self.sampling)
        self.latent_shape = tuple(noise.shape[1:])
        self.device: torch.device = noise.device
        self.dtype: torch.dtype = self.network.manual_cast_dtype or self.network.get_dtype()
        config = self.network.model_config.unet_config
        self.guidance_distilled = (
            bool(config.get("guidance_embed")) or config.get("image_model") == "flux"
        )
        self._prompts, self._options, self._on_prediction = prompts, model_options, on_prediction
        self._conds = {
            name: [_normal_cond(cond) for cond in guider.conds[key]]
            for name, key in guider_keys(prompts).items()
        }

    @contextmanager
    def with_gradients(self) -> Iterator["ModelDenoiser"]:
        """Yield the same for a block in which inference mode is off and gradients flow.

        This one must rest meanwhile: nothing in the block may go back to inference mode.
        """
        guider, _, options, *_ = self._made_from
        with differentiable(self.network, in_place=writes_in_place(guider, options)):
            yield ModelDenoiser(*self._made_from)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the prompts of these names; shorter embeddings are padded with zeros."""
        tensors = [self._embeddings(name) for name in prompts]
        embeddings = torch.zeros(
            len(tensors), max(t.shape[1] for t in tensors), tensors[0].shape[2]
        ).to(tensors[0])
        for row, tensor in zip(embeddings, tensors, strict=True):
            row[: tensor.shape[1]] = tensor[0]
        return Conditioning(
            embeddings=embeddings,
            tokens=tuple(self._prompts[name].tokens for name in prompts),
            words=tuple(self._prompts[name].words for name in prompts),
            sources=tuple(prompts),
        )

    def unconditional(self) -> Conditioning:
        """Return the negative CONDITIONING as a single row."""
        return Conditioning(embeddings=self._embeddings(NEGATIVE), sources=(NEGATIVE,))

    def sigmas(self, steps: int) -> Float[Tensor, " level"]:
        """Return the noise levels of a sampling run, [steps + 1], noisiest first, on the CPU."""
        return noise_levels(self.sampling, steps)

    def initial_noise(self, seeds: Sequence[int], sigma: Tensor) -> Float[Tensor, " seed *latent"]:
        """Return x at `sigma` from ``torch.Generator("cpu")`` of each seed, in float32.

        Drawn in the network's dtype, as diffusers does; in float32 it is KSampler's own noise.
        """
        rows = [
            torch.randn(
                self.latent_shape,
                generator=torch.Generator("cpu").manual_seed(seed),
                dtype=self.dtype,
            )
            for seed in seeds
        ]
        return torch.stack(rows).float().to(self.device) * self.noise_scale(sigma)

    def noise_scale(self, sigma: Tensor) -> float:
        """Return the standard deviation of pure noise where sampling starts at `sigma`."""
        return noise_scale(self.parametrization, float(sigma))

    def denoise(
        self, x: Float[Tensor, " row *latent"], sigma: Tensor, cond: Conditioning
    ) -> Float[Tensor, " row *latent"]:
        """Return the x0-prediction, [row *latent], differentiable in x and in the embeddings.

        Args:
            x: [row *latent] at `sigma`.
            sigma: Scalar noise level, an element of `sigmas`.
            cond: One row per row of `x`, from `encode` or `unconditional`.

        Raises:
            comfy.model_management.InterruptProcessingException: The user pressed Cancel.
            ValueError: A conditioning's time range leaves this level out.
        """
        parts, start = [], 0
        for source, rows in groupby(cond.sources):
            # ComfyUI's own layers check this at every operation; layers of other packs may not.
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = slice(start, start + len(list(rows)))
            level = torch.full((part.stop - start,), float(sigma), device=x.device)
            conds = self._with_embeddings(source, cond.embeddings[part])
            if not any(
                each.get("timestep_end", 0.0)
                <= float(sigma)
                <= each.get("timestep_start", math.inf)
                for each in conds
            ):  # ComfyUI would return zeros, and they would count as what the text adds
                raise ValueError(
                    "A conditioning is switched off at a noise level that is measured: connect it "
                    "without Conditioning Set Timestep Range."
                )
            (x0,) = comfy.samplers.calc_cond_batch(
                self.network, [conds], x[part], level, self._options
            )
            parts.append(x0)
            self._on_prediction(x[part], x0)
            start = part.stop
        return torch.cat(parts)

    def _embeddings(self, source: str) -> Float[Tensor, "1 token width"]:
        return self._conds[source][0]["model_conds"]["c_crossattn"].cond[:1]

    def _with_embeddings(self, source: str, embeddings: Tensor) -> list[dict]:
        """Return the conds of `source`, the first with these embeddings [row token width]."""
        first, *others = self._conds[source]
        model_conds = first["model_conds"]
        own = model_conds["c_crossattn"]
        replaced = own._copy_with(embeddings[:, : own.cond.shape[1]].to(own.cond))
        return [first | {"model_conds": model_conds | {"c_crossattn": replaced}}, *others]


def guider_keys(prompts: Iterable[str]) -> dict[str, str]:
    """Return under which key a guider holds the conds of each prompt and of `NEGATIVE`.

    ComfyUI itself knows "positive" and "negative"; further keys are treated alike.
    """
    keys = {
        name: f"positive {number}" if number else "positive" for number, name in enumerate(prompts)
    }
    return keys | {NEGATIVE: "negative"}


def _normal_cond(cond: dict) -> dict:
    """Return a cond whose tensors autograd may save; the guider's own stays as it is."""
    copied = {key: normal(value) for key, value in cond.items()}
    copied["model_conds"] = {
        key: value._copy_with(normal(value.cond)) for key, value in cond["model_conds"].items()
    }
    return copied


def parametrization_of(sampling: Any) -> Parametrization:
    """Return what the network predicts.

    Args:
        sampling: The model_sampling of a MODEL.

    Raises:
        ValueError: Something whose difference is neither of noise nor of velocities.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return "flow"
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        return "v_prediction"
    if isinstance(sampling, comfy.model_sampling.EPS):
        return "epsilon"
    bases = ", ".join(base.__name__ for base in type(sampling).__mro__[1:3])
    raise ValueError(f"Models that sample by {bases} cannot be measured.")


def noise_levels(sampling: Any, steps: int) -> Float[Tensor, " level"]:
    """Return the levels of DDIM ("leading", offset 1) or Euler for flows, [steps + 1], on the CPU.

    These are the levels diffusers visits on the same model. A shift set by a ModelSampling node is
    followed, so flows may visit others after their first level, which is always 1.

    Args:
        sampling: The model_sampling of a MODEL.
        steps: Of a whole sampling run.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        flux = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
        last = 1 / steps if flux else float(sampling.sigma_min)
        times = torch.linspace(1, last, steps).tolist()
        levels = [float(sampling.percent_to_sigma(1 - time)) for time in times]
        return torch.tensor([*levels, 0.0])
    table = sampling.sigmas.cpu()
    if not 1 <= steps <= len(table):
        raise ValueError(f"`steps` must be between 1 and {len(table)}, got {steps}.")
    timesteps = torch.arange(steps - 1, -1, -1) * (len(table) // steps) + 1
    return torch.cat([table[timesteps.clamp(max=len(table) - 1)], table[:1]]).float().clone()


def percent_of(sampling: Any, sigma: float) -> float:
    """Return the share of the noise schedule that is behind, 0 at pure noise, 1 at the image.

    Args:
        sampling: The model_sampling of a MODEL.
        sigma: Noise level, above 0.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return 1 - sigma
    levels = sampling.sigmas
    return 1 - nearest_timestep(levels, sigma) / (len(levels) - 1)
