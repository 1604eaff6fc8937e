"""Sampling runs on the toy network as a host hands them to a method."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from toy import ToyDenoiser
from unmemorize.shared.mitigation.method import Start, Step
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.denoiser import Conditioning

PROMPTS = ("red lighthouse", "old cat", "snow near a boat")
SEEDS = (3, 1, 4)


@torch.no_grad()
def start_of(denoiser, prompts: Sequence[str] = PROMPTS, seeds=SEEDS, **settings) -> Start:
    """Return a run of one image per prompt before its first step."""
    sigma = denoiser.sigmas(10)[0]
    x = denoiser.initial_noise(seeds[: len(prompts)], sigma)
    empty = denoiser.unconditional()[[0] * len(x)]
    return Start(**{
        "denoiser": denoiser, "cond": denoiser.encode(prompts), "x": x, "sigma": sigma,
        "x0_uncond": denoiser.denoise(x, sigma, empty), "prompts": tuple(prompts),
        "generator": torch.Generator().manual_seed(0), **settings,
    })  # fmt: skip


def only(start: Start, row: int) -> Start:
    """Return the run with one of its images."""
    return replace(
        start,
        cond=start.cond[[row]],
        x=start.x[[row]],
        x0_uncond=start.x0_uncond[[row]],
        prompts=start.prompts[row : row + 1],
    )


@torch.no_grad()
def magnitudes(start: Start, cond: Conditioning | None = None, x: Tensor | None = None) -> Tensor:
    """Return |D| per image, both predictions computed anew, one image at a time."""
    cond, x = cond or start.cond, start.x if x is None else x
    norms = []
    for row in range(len(x)):
        x0_cond = start.denoiser.denoise(x[[row]], start.sigma, cond[[row]])
        x0_uncond = start.denoiser.denoise(x[[row]], start.sigma, start.denoiser.unconditional())
        norms.append((x0_uncond - x0_cond).norm() / start.sigma)
    return torch.stack(norms)


def calibration_of(scores: Tensor, steps: int = 1) -> Calibration:
    """Return a calibration with these control scores [control seed]."""
    return Calibration(
        model="toy", settings={"steps": steps}, controls="test", controls_sha256="",
        control_scores=tuple(map(tuple, scores.double().tolist())), false_positive_rate=0.5,
        threshold=1.0, interval=(0.0, 1.0),
    )  # fmt: skip


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step_of(
    index: int = 0,
    percent: float = 0.0,
    *,
    images: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **settings,
) -> Step:
    """Return a guided network call with drawn predictions, of noise at sigma 2."""
    x, cond, uncond = (
        seeded(images, 4, 8, 8, seed=3 * seed + part, dtype=dtype) for part in range(3)
    )
    return Step(**{
        "index": index, "percent": percent, "x": x, "cond": cond, "uncond": uncond,
        "cond_scale": 7.5, "magnitude": (cond - uncond).flatten(1).norm(dim=1),
        "predict": lambda: cond, "to_x0": lambda noise: x - 2 * noise,
        "from_x0": lambda x0: (x - x0) / 2, **settings,
    })  # fmt: skip


def step_at(start: Start, **settings) -> Step:
    """Return the first guided network call of a run, in noise."""
    x, sigma = start.x, start.sigma

    def noise(cond: Conditioning) -> Tensor:
        with torch.no_grad():
            return (x - start.denoiser.denoise(x, sigma, cond)) / sigma

    cond, uncond = noise(start.cond), noise(start.denoiser.unconditional()[[0] * len(x)])
    return Step(**{
        "index": 0, "percent": 0.0, "x": x, "cond": cond, "uncond": uncond, "cond_scale": 7.5,
        "magnitude": (cond - uncond).flatten(1).norm(dim=1), "predict": lambda: noise(start.cond),
        "to_x0": lambda noise: x - sigma * noise, "from_x0": lambda x0: (x - x0) / sigma,
        **settings,
    })  # fmt: skip


def wide_toy(**settings) -> ToyDenoiser:
    """Return the toy in float64, with few positions."""
    return ToyDenoiser(torch.float64, **{"positions": 6, **settings})
