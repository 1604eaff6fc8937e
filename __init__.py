"""Unmemorize: find out whether a diffusion model gives its training images back, and stop it.

Importing this file imports nothing else: ComfyUI loads it for `comfy_entrypoint`, and the names of
`__all__`, which are the public interface, are imported when they are first used.
"""

TYPE_CHECKING = False  # type checkers take it for true; `typing` would be an import
if TYPE_CHECKING:
    from .shared.mitigation.gate import GuardedImage as GuardedImage
    from .shared.models.adapter import PipelineDenoiser as PipelineDenoiser
    from .shared.models.calibrate import calibrate as calibrate
    from .shared.models.load import load_denoiser as load  # noqa: F401
    from .shared.sampling.guard import GuardedRun as GuardedRun
    from .shared.sampling.guard import GuardRecord as GuardRecord
    from .shared.sampling.guard import guard as guard
    from .shared.sampling.observer import ObservedRun as ObservedRun
    from .shared.sampling.observer import ObserverRecord as ObserverRecord
    from .shared.sampling.observer import observe as observe
    from .shared.score.calibration import Calibration as Calibration
    from .shared.score.config import DetectionConfig as DetectionConfig
    from .shared.score.detection import Detection as Detection
    from .shared.score.detection import detect as detect
    from .shared.words.explanation import Explanation as Explanation
    from .shared.words.explanation import explain as explain
    from .trainer_patch.diffusers.loop import ProtectedLoop as ProtectedLoop
    from .trainer_patch.diffusers.loop import protect as protect

WEB_DIRECTORY = "web"
"""Where ComfyUI finds the help pages of the nodes."""

_PUBLIC = {
    "load": "shared.models.load.load_denoiser",
    "detect": "shared.score.detection.detect",
    "calibrate": "shared.models.calibrate.calibrate",
    "explain": "shared.words.explanation.explain",
    "observe": "shared.sampling.observer.observe",
    "guard": "shared.sampling.guard.guard",
    "protect": "trainer_patch.diffusers.loop.protect",
    "Calibration": "shared.score.calibration.Calibration",
    "Detection": "shared.score.detection.Detection",
    "DetectionConfig": "shared.score.config.DetectionConfig",
    "Explanation": "shared.words.explanation.Explanation",
    "GuardRecord": "shared.sampling.guard.GuardRecord",
    "GuardedImage": "shared.mitigation.gate.GuardedImage",
    "GuardedRun": "shared.sampling.guard.GuardedRun",
    "ObservedRun": "shared.sampling.observer.ObservedRun",
    "ObserverRecord": "shared.sampling.observer.ObserverRecord",
    "PipelineDenoiser": "shared.models.adapter.PipelineDenoiser",
    "ProtectedLoop": "trainer_patch.diffusers.loop.ProtectedLoop",
}
__all__ = list(_PUBLIC)


async def comfy_entrypoint():
    """Return the extension that ComfyUI asks for its nodes."""
    from .nodes import PackExtension

    return PackExtension()


def __getattr__(name: str) -> object:
    """Import a public name; it is found without this function from then on."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _PUBLIC[name].rpartition(".")
    # Relative: ComfyUI registers the package under its path.
    globals()[name] = value = getattr(import_module(f".{module}", __name__), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
