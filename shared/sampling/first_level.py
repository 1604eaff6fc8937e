"""The level at which a sampler begins, and whether its images compare with a calibration there."""

from collections.abc import Sequence

from ..score.calibration import Calibration

LOWEST, HIGHEST = 0.98, 1.12
"""Shares of the controls' noise level between which a sampler may begin.

At the highest levels a prompt adds about as much to the clean latents everywhere, so the less to
the noise the more there is of it. Ordinary prompts are flagged no more often at the end of the
schedule, 11 % above DDIM's first of 50 steps, but more than twice as often 16 % below that (the
demo, 56 held-out captions, asked rate .05: .05 and .13)."""


def misfit(observed: Calibration, latent_shape: Sequence[int], sigma: float) -> str:
    """Return why residuals of a run's images do not compare with the controls', "" if they do.

    Args:
        observed: What sampled images are judged by.
        latent_shape: Of one image.
        sigma: First noise level of the run, in the units of `Denoiser`.
    """
    if tuple(latent_shape) != observed.latent_shape:
        sizes = (" x ".join(map(str, each)) for each in (latent_shape, observed.latent_shape))
        return "the latents are {}, those of the controls {}".format(*sizes)
    level = observed.settings["sigmas"][0]
    if not LOWEST * level <= sigma <= HIGHEST * level:
        return (
            f"sampling began at noise level {sigma:.4g}, the controls were measured at {level:.4g}"
        )
    return ""
