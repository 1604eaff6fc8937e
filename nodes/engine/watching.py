"""Observing while ComfyUI samples: wrappers on a clone of the model, nothing else.

The wrapper sits where the network's answers come back, before the hooks of other packs change
them. It is a closure: versions before 0.16 copy callable objects when a model is cloned.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond

from ...shared.mitigation.gate import GuardedImage
from ...shared.sampling.watched_runs import WatchedRun, WatchRecord
from .automatic import found
from .model_identity import digest_of_negative, weights_sha256

KEY = "unmemorize"
EMPTY = "unmemorize empty prompt"
NO_GUIDANCE = (
    "cfg is 1 or the guider has no negative prompt, so the network predicted the prompt alone. "
    "Sample with cfg above 1, or switch on measure_anyway in Memorization Watch: one more pass of "
    "the network per step"
)
NO_NEGATIVE = (
    "the guider has no negative prompt. Connect an encoded empty text to Memorization Watch to "
    "have it measured anyway"
)
SWITCHED_OFF = "the time range of a prompt leaves out every step that was sampled"
BESIDE_TEXT = (
    "area", "mask", "control", "gligen", "hooks", "reference_latents", "concat_latent_image",
    "concat_mask", "unclip_conditioning",
)  # fmt: skip
"""What changes a prediction for a text and no control has, by ComfyUI's names."""
DEFAULTS = {
    "strength": 1.0, "guidance": 3.5, "width": 768, "height": 768, "crop_w": 0, "crop_h": 0,
    "target_width": 768, "target_height": 768,
}  # fmt: skip
"""What a model reads where a prompt does not say, as those of controls do not."""
NO_PAIR = "the guider never predicts the positive and the negative prompt together"


def begins_at_noise(model: ModelPatcher, sigmas: torch.Tensor) -> bool:
    """Return whether a run starts within the first quarter of the schedule."""
    sampling = model.get_model_object("model_sampling")
    return float(sigmas[0]) >= float(sampling.percent_to_sigma(0.25))


def latent_id(samples: torch.Tensor) -> str:
    """Return what a latent is recognised by, also on another device and in half precision.

    ComfyUI casts latents after sampling where it keeps intermediate results in float16.
    """
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]
    plain = samples.detach().cpu().half().contiguous()
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()


def watch(
    model: ModelPatcher,
    *,
    measure_anyway: bool = False,
    empty: list | None = None,
    guarded: Callable[[], tuple[GuardedImage, ...]] = tuple,
) -> tuple[ModelPatcher, WatchRecord]:
    """Return a clone of a model and the record that its sampling runs will fill.

    Args:
        model: Stays as it is.
        measure_anyway: Where guidance does not predict the negative prompt, predict it: one more
            pass of the network per step, and the same images.
        empty: CONDITIONING that stands in where the guider has no negative prompt at all.
        guarded: Returns what a guard decided about the images of the run that has just ended.
    """
    watched = model.clone()
    record = WatchRecord(
        model=lambda: weights_sha256(watched),
        calibration=lambda run: found(watched, run.against, run.latent_shape),
    )
    guider: Any = None
    run: WatchedRun | None = None
    compared: list = []  # conds of the negative

    def on_run(executor: Any, noise: Any, image: Any, sampler: Any, sigmas: Any, *args, **kwargs):
        nonlocal guider, run, compared
        before = guider, run, compared
        guider, run, compared = executor.class_obj, WatchedRun(reason=NO_PAIR), []
        # Where another sampler has begun, this one adds zeros.
        adds_noise = getattr(noise, "is_nested", False) or bool(noise.any())
        run.from_noise = adds_noise and begins_at_noise(guider.model_patcher, sigmas)
        run.begins = float(sigmas[0])
        if measure_anyway and empty and not guider.conds.get("negative"):
            guider.conds[EMPTY] = convert_cond(empty)  # prepared with the others, by ComfyUI
        try:
            latent = executor(noise, image, sampler, sigmas, *args, **kwargs)
            run.latent_id, run.guarded = latent_id(latent), guarded()
            run.negative = digest_of_negative(compared)
            run.against = tuple(one["cross_attn"] for one in compared if "cross_attn" in one)
            run.end()
            record.start(run)
            return latent
        finally:
            guider, run, compared = before

    def on_predictions(
        executor: Callable, network: Any, conds: Sequence, x: Any, sigma: Any, options: dict
    ) -> Sequence:
        nonlocal compared
        predictions = executor(network, conds, x, sigma, options)
        if run is None:
            return predictions
        positive, negative = places(guider, conds)
        asked = [conds[place] for place in (positive, negative) if place is not None]
        if not all(active(entries, sigma) for entries in asked):
            run.reason = SWITCHED_OFF  # ComfyUI returns zeros, which no prompt has predicted
        elif positive is not None and negative is not None:
            compared = compared or conds[negative]
            run.unlike = run.unlike or beside_text(conds[positive]) or beside_text(conds[negative])
            run.add(predictions[positive], predictions[negative], sigma)
        elif positive is not None and len(conds) > 1 and conds[1 - positive] is None:
            other = guider.conds.get("negative") or guider.conds.get(EMPTY)
            run.reason = NO_NEGATIVE if measure_anyway else NO_GUIDANCE
            if measure_anyway and other:
                compared = compared or other
                run.unlike = run.unlike or beside_text(conds[positive])
                (uncond,) = executor(network, [other], x, sigma, options)
                run.add(predictions[positive], uncond, sigma)
                run.extra_passes += 1
        return predictions

    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, on_run)
    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, on_predictions)
    return watched, record


def active(entries: Sequence[Mapping[str, Any]], sigma: torch.Tensor) -> bool:
    """Return whether the time range of any entry of a prepared CONDITIONING holds a level."""
    ranges = [
        (each.get("timestep_end", 0.0), each.get("timestep_start", math.inf)) for each in entries
    ]
    if (0.0, math.inf) in ranges:  # without a look at the level, for which a device would be waited
        return True
    return any(end <= float(sigma.flatten()[0]) <= start for end, start in ranges)


def beside_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return what a prepared CONDITIONING is besides one text, "" of a text alone."""
    if len(entries) > 1:
        return f"a prompt has {len(entries)} parts, which are averaged"
    (entry,) = entries
    more = [name for name in BESIDE_TEXT if entry.get(name) is not None]
    more += [name for name, value in DEFAULTS.items() if entry.get(name, value) != value]
    return f"a prompt has {', '.join(more)}" if more else ""


def places(guider: Any, conds: Sequence) -> tuple[int | None, int | None]:
    """Return where the guider's own positive and negative stand among prompts that are predicted.

    By identity: attention guidance and its like predict them again with lists of their own.
    """
    own = guider.conds.get("positive"), guider.conds.get("negative")
    positive, negative = (
        next((i for i, entries in enumerate(conds) if entries is one and one is not None), None)
        for one in own
    )
    return positive, negative
