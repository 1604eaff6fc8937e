"""Other scores at like cost, and ideas for a better one, each with the forwards it needs."""

from collections.abc import Callable, Sequence

import torch
from figures import Figure, plain
from torch import Tensor
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import TOLD, ControlBasis, directions_for
from unmemorize.shared.score.denoiser import Conditioning, Denoiser
from unmemorize.shared.score.detection import Progress, detect
from unmemorize.shared.score.metrics import text_noise
from unmemorize.shared.score.trajectory import automatic_rows, guided_step

from .case import Case, over_seeds, residuals
from .ranking import Draw, ranked

TRAJECTORY = DetectionConfig(seeds=(0,), steps=20, schedule_steps=20)
FIRST_STEPS = 5
LEVELS = {"two_levels": TOLD, "three_levels": (0.0, *TOLD), "four_levels": (0.0, 0.28, 0.6, 0.9)}
"""Told levels that are looked at together, as shares of the schedule."""
NUDGE = 0.01
"""Of the starting noise's own length: how far sharpness moves it."""

Rivals = dict[str, tuple[int, list[Draw]]]
"""By name, the forwards of one prompt besides what all prompts share, and the scores."""


def measure_rivals(case: Case) -> dict[str, Figure]:
    """Print and return AUC and TPR of every rival; of scores at few seeds, means over choices."""
    found, groups = {}, case.groups
    print(f"\n{case.model.name:<24}{'forwards':>9}{'AUC':>23}{'TPR at 1 % FPR':>23}")
    rivals = from_other_inputs(case) | from_differences(case)
    for name, (forwards, draws) in sorted(rivals.items(), key=lambda rival: rival[1][0]):
        key = f"rivals.detection.{case.model.name}.{name}"
        figures = ranked(draws, groups.planted, groups.negatives)
        cells = "".join(f"{f.value:>8.3f} [{f.low:.3f}, {f.high:.3f}]" for f in figures.values())
        print(f"{name:<24}{forwards:>9}{cells}", flush=True)
        found |= {f"{key}.{part}": figure for part, figure in figures.items()}
        found[f"{key}.forwards"] = plain(forwards, len(groups.texts))
    return found


def from_differences(case: Case) -> Rivals:
    """Return what can be made of D in pure noise: the residual at few seeds, and variants of it."""
    count = directions_for(len(case.groups.controls))

    def differences(step: int) -> tuple[Tensor, Tensor]:
        rows = case.differences(step)
        return rows, rows[:, case.groups.controls]

    outside, inside = apart(*differences(case.step(TOLD[0])), count)
    weighted = [Draw(scores) for scores in outside.norm(dim=2) / inside.norm(dim=2).sqrt()]
    shipped = case.shipped()
    shipped = residuals(shipped, shipped[:, case.groups.controls], count)
    rivals: Rivals = {f"shipped_seeds_{n}": (n, over_seeds(shipped, n)) for n in (1, 2)}
    rivals |= {f"weighted_seeds_{n}": (n, over_seeds(weighted, n)) for n in (1, 2, len(weighted))}
    products = (outside[::2] * outside[1::2]).sum(2)
    rivals["two_seeds_multiplied"] = (2, [Draw(scores) for scores in products])
    levels = {
        share: residuals(*differences(case.step(share)), count)
        for share in sorted({share for shares in LEVELS.values() for share in shares})
    }
    for share in TOLD:
        name = f"told_{100 * share:.0f}_seeds"
        rivals |= {f"{name}_{n}": (n, over_seeds(levels[share], n)) for n in (1, 2)}
    for name, shares in LEVELS.items():  # of one and the same seed
        together = torch.stack([torch.stack([d.scores for d in levels[s]]).log() for s in shares])
        rivals[f"{name}_mean"] = (len(shares), [Draw(scores) for scores in together.mean(0)])
        rivals[f"{name}_maximum"] = (len(shares), [Draw(scores) for scores in together.amax(0)])
    return rivals


def apart(differences: Tensor, controls: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return D minus the controls' mean, outside and inside of their directions.

    Args:
        differences: [seed caption element].
        controls: [seed control element].
        count: Directions.
    """
    basis = ControlBasis.fit(controls, count, [0] * len(controls))
    rows = differences - basis.mean[:, None]
    inside = rows @ basis.directions.mT @ basis.directions
    return rows - inside, inside


def from_other_inputs(case: Case) -> Rivals:
    """Return scores that need other inputs than pure noise, from seed 0."""
    texts, steps = case.groups.texts, case.config.schedule_steps

    def trajectory(denoiser: Denoiser, progress: Progress) -> Tensor:
        return detect(denoiser, texts, TRAJECTORY, progress=progress).traces[:, 0]

    def sharpness(denoiser: Denoiser, progress: Progress) -> Tensor:
        return in_batches(denoiser, texts, progress, sharpness_of(denoiser, steps))

    def dsm(denoiser: Denoiser, progress: Progress) -> Tensor:
        return in_batches(denoiser, texts, progress, step_change_of(denoiser, steps))

    traces = case.kept(f"trajectory-{TRAJECTORY.steps}", texts, trajectory)
    return {
        "sharpness": (3, [Draw(case.kept(f"sharpness-{NUDGE}", texts, sharpness))]),
        "dsm": (2, [Draw(case.kept("dsm", texts, dsm))]),
        # The first unconditional prediction is the only one that all prompts share.
        "first_steps": (2 * FIRST_STEPS - 1, [Draw(traces[:, :FIRST_STEPS].mean(1))]),
        "trajectory": (2 * TRAJECTORY.steps - 1, [Draw(traces.mean(1))]),
    }


@torch.inference_mode()
def in_batches(
    denoiser: Denoiser, texts: Sequence[str], progress: Progress,
    measure: Callable[[Conditioning], Tensor],
) -> Tensor:  # fmt: skip
    """Return [caption] of what `measure` makes of batches of captions."""
    rows, parts = automatic_rows(denoiser), []
    for start in range(0, len(texts), rows):
        cond = denoiser.encode(texts[start : start + rows])
        parts.append(measure(cond).double())
        progress(len(cond))
    return torch.cat(parts)


@torch.inference_mode()
def sharpness_of(denoiser: Denoiser, steps: int) -> Callable[[Conditioning], Tensor]:
    """Return |(H_c - H_0) D| at the first step, H the Jacobian of the predicted noise.

    Jeon et al., ICML 2025, but for a constant factor; modified: finite differences.
    """
    sigma, empty = denoiser.sigmas(steps)[0], denoiser.unconditional()
    x = denoiser.initial_noise([0], sigma)
    x0_uncond, nudge = denoiser.denoise(x, sigma, empty), NUDGE * x.norm()

    def measure(cond: Conditioning) -> Tensor:
        rows = [0] * len(cond)
        text = text_noise(x0_uncond[rows], denoiser.denoise(x[rows], sigma, cond), sigma)
        norms = text.flatten(1).norm(dim=1)
        moved = x + nudge * text / norms.view(-1, *[1] * (text.ndim - 1))
        predictions = [denoiser.denoise(moved, sigma, c) for c in (empty[rows], cond)]
        return norms * (text_noise(*predictions, sigma) - text).flatten(1).norm(dim=1) / nudge

    return measure


@torch.inference_mode()
def step_change_of(denoiser: Denoiser, steps: int) -> Callable[[Conditioning], Tensor]:
    """Return |e_2 - e_1|^2, e the noise or velocity of the prompt alone along its own first step.

    "DSM" of an anonymous submission to ICML 2026.
    """
    first, second = denoiser.sigmas(steps)[:2]
    noise = denoiser.initial_noise([0], first)

    def measure(cond: Conditioning) -> Tensor:
        x = noise[[0] * len(cond)]
        x0 = denoiser.denoise(x, first, cond)
        moved = guided_step(x, x0, x0, first, second, cond_scale=1.0)
        change = (moved - denoiser.denoise(moved, second, cond)) / second - (x - x0) / first
        return change.flatten(1).square().sum(1)

    return measure
