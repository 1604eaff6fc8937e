"""From which similarity on an image counts as given back: what controls reach, and beyond.

There is no fixed number: on photographs unrelated pictures stay below .3, on flat art they pass .5.
"""

from collections.abc import Sequence

import torch

from ...shared.arrays import Float, Tensor
from ...shared.score.calibration import NotEnoughControls, controls_needed
from ...shared.wording import counted
from ..common.sscd import calibrate
from ..common.wording import percent
from .result import Thresholds

RATE = 0.05
"""Share of controls that may lie above `near`."""
NEEDED = controls_needed(RATE)


def near_threshold(controls: Float[Tensor, " control"]) -> float | None:
    """Return the similarity that a further control exceeds with probability `RATE` at most.

    None when there are too few controls to say so.
    """
    try:
        return calibrate(controls, RATE)
    except NotEnoughControls:
        return None


def thresholds(
    off: Float[Tensor, " image"],
    held_out: Float[Tensor, " control"],
    peers: Float[Tensor, " row"],
) -> Thresholds:
    """Return the thresholds that three kinds of controls carry together.

    `verbatim` lies half-way from `near` to 1, the similarity of a picture and itself: a copy is
    nearer to its image than to what controls reach.

    Args:
        off: Per training image, its most similar generation without the LoRA.
        held_out: Per image that was not trained on, its most similar generation with the LoRA.
        peers: Per training image, its most similar other image of the same subject.
    """
    controls = torch.cat([off, held_out, peers])
    near = near_threshold(controls)
    told = ", ".join(_counts(len(off), len(held_out), len(peers)))
    if near is None:
        method = (
            f"{counted(len(controls), 'control', 'controls')} ({told}) cannot carry a threshold: "
            f"{NEEDED} are needed. "
            f"Give {NEEDED - len(controls)} or more images of the same subject that were not "
            "trained on (--held-out)."
        )
        return Thresholds(verbatim=None, near=None, method=method, controls=len(controls))
    verbatim = (1 + near) / 2
    method = (
        f"Near: above what {percent(1 - RATE)} of {len(controls)} controls reach ({told}). "
        "Verbatim: above the middle between that and the similarity of an image and itself, 1."
    )
    return Thresholds(verbatim=verbatim, near=near, method=method, controls=len(controls))


def _counts(off: int, held_out: int, peers: int) -> Sequence[str]:
    trained = ("training image", "training images")
    told = [f"{counted(off, *trained)} against generations without the LoRA"]
    if held_out:
        told.append(
            f"{counted(held_out, 'held-out image', 'held-out images')} against generations with it"
        )
    return [*told, f"{counted(peers, *trained)} against each other"]
