"""Watched runs and a calibration with chosen scores."""

import torch
from unmemorize.shared.sampling.watched_runs import WatchedRun
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import Detection

SHAPE = (4, 8, 8)


def run(scores: list[float], levels: int = 5, **settings) -> WatchedRun:
    """Return a run whose images have these scores at every level."""
    made = WatchedRun(**settings)
    for sigma in torch.linspace(14.6, 0.1, levels):
        add(made, float(sigma), scores)
    return made


def add(run: WatchedRun, sigma: float, scores: list[float]) -> None:
    """Measure a pair of predictions at `sigma` whose |D| are `scores`."""
    noise = torch.randn(len(scores), *SHAPE, generator=torch.Generator().manual_seed(0))
    unit = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    uncond = unit * sigma * torch.tensor(scores).view(-1, 1, 1, 1)
    run.add(torch.zeros_like(uncond), uncond, torch.full((len(scores),), sigma))


def calibration(steps: int = 1, seeds: int = 3, controls: int = 120) -> Calibration:
    """Return a calibration whose controls score from 1 to 3 at the first seed, higher at others."""
    spread = torch.linspace(1, 3, controls, dtype=torch.float64)
    traces = torch.stack([spread + 4 * seed for seed in range(seeds)], 1)
    config = DetectionConfig(seeds=tuple(range(seeds)), steps=steps)
    detection = Detection(
        prompts=tuple(f"control {i}" for i in range(controls)), config=config, latent_elements=256,
        traces=traces[..., None].expand(-1, -1, steps).clone(),
    )  # fmt: skip
    settings = {"steps": steps, "latent_shape": list(SHAPE), "sigmas": [14.6]}
    return Calibration.from_controls(detection, model="m", settings=settings, name="made up")


def calibration_of_images() -> Calibration:
    """Return the same with residuals at the first level that lie about 3."""
    generator = torch.Generator().manual_seed(1)
    return calibration().with_observed(0.2 * torch.randn(2, 120, 256, generator=generator))
