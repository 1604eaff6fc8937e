"""Mitigation around an ordinary diffusers pipeline, for as long as a block lasts.

with guard(pipeline, method=DelayedGuidance(), calibration=calibration) as record:
    images = pipeline("a caption", num_images_per_prompt=4).images
for image in record.runs[0].images:
    print(image.fired, image.score_before, image.threshold, image.score_after)
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..mitigation.gate import Gate
from ..mitigation.method import Method
from ..score.calibration import Calibration
from .guard_record import GuardedImage, GuardedRun, GuardRecord
from .pipeline_guard import GuidanceIsOff, PipelineGuard

__all__ = ["GuardRecord", "GuardedImage", "GuardedRun", "GuidanceIsOff", "guard"]


@contextmanager
def guard(
    pipeline: Any,
    *,
    method: Method,
    calibration: Calibration | None = None,
    gate: str = "calibrated",
    seeds: int = 1,
    seed: int = 0,
    model: str | None = None,
    force: bool = False,
) -> Iterator[GuardRecord]:
    """Mitigate calls of `pipeline` inside the block, image by image, where the gate says so.

    Images on which the method does not act are bit-identical to those of the same call without a
    guard. The prompts of a run are probed before its first step, at the calibration's size whatever
    that of the run, at a cost of `seeds` network rows per prompt that was not seen before; weights,
    LoRA and their strength must stay as they are inside the block. Afterwards the pipeline carries
    no trace, also when something fails.

    Args:
        pipeline: A diffusers text-to-image pipeline. Its arguments stay as they are: any
            scheduler, batch, number of images, negative prompts, embeddings, callbacks.
        method: From `shared.mitigation`.
        calibration: Of this model, LoRA included; its threshold decides.
        gate: "calibrated" acts on prompts that score above the threshold, "always" on all,
            "never" on none.
        seeds: Starting noises to probe a prompt with, the first of the calibration's.
        seed: Of what the method draws, the same in every run.
        model: Sha256 of the weights, to be compared with that of the calibration; None takes the
            caller's word that they belong together.
        force: Use a calibration that was made under other conditions.

    Raises:
        ValueError: The pipeline is not supported or guarded already, or there is no calibration.
        CalibrationMismatch: The calibration was made under other conditions.
        GuidanceIsOff: On sampling without guidance when that is what the method acts on.
    """
    guarding = PipelineGuard(
        pipeline, method, Gate(mode=gate, calibration=calibration, seeds=seeds), seed, model, force
    )
    network: nn.Module = getattr(pipeline, guarding.family.network_name)
    for hook in network._forward_pre_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, PipelineGuard) and other.pipeline is pipeline:
            raise ValueError("The pipeline is guarded already: leave that block first.")
    with ExitStack() as undo:
        undo.enter_context(guarding.following())
        before = network.register_forward_pre_hook(guarding.before, with_kwargs=True)
        undo.callback(before.remove)
        after = network.register_forward_hook(guarding.after, with_kwargs=True)
        undo.callback(after.remove)
        yield guarding.record
