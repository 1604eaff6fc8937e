"""How much memory a model takes while it is used."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .adapter import PipelineDenoiser

PROMPT = "a photograph of a house by the sea"


def peaks_of_use(load: Callable[[], "PipelineDenoiser"], device: str) -> dict[str, int]:
    """Return the peak memory in bytes of what every command does with a model, by what it is.

    On CUDA it is what PyTorch has allocated on that device, each time anew; elsewhere the most
    that this process has held until then, in memory that other programs share.

    Args:
        load: Loads it.
        device: Where it computes.
    """
    peaks = {}

    def measured(name: str, run: Callable[[], Any]) -> Any:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(torch.device(device))
        with torch.no_grad():
            made = run()
        peaks[name] = _peak(device)
        return made

    denoiser = measured("loading", load)
    cond = measured("text encoders", lambda: denoiser.encode([PROMPT]))
    sigma = denoiser.sigmas(1)[0]
    noise = denoiser.initial_noise([0], sigma)
    latents = measured("network, one row", lambda: denoiser.denoise(noise, sigma, cond))
    measured("autoencoder, one image", lambda: denoiser.decode(latents))
    return peaks


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(torch.device(device))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
