"""Mitigation while ComfyUI samples: wrappers on a clone of the model, nothing else.

What other packs' hooks change comes before it: the wrapper reads the network's own answers, and
what the method says replaces the guided prediction. Closures all of them, as in `watching`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from torch import Tensor

from ...shared.mitigation.gate import Gate, GuardedImage
from ...shared.mitigation.method import Method
from ...shared.sampling.watched_runs import WatchRecord
from .guarded_sampling import GuardedSampling
from .model_identity import weights_sha256
from .watching import watch

KEY = "unmemorize guard"
EMPTY = "unmemorize guard empty prompt"


def guard(
    model: ModelPatcher,
    method: Method,
    gate: Gate,
    *,
    empty: list | None = None,
    force: bool = False,
) -> tuple[ModelPatcher, WatchRecord]:
    """Return a clone of a model that mitigates, and the record that its runs will fill.

    Where the gate stays shut the images are bit-identical.

    Args:
        model: Stays as it is.
        method: What to do to a run whose prompt the gate lets through.
        gate: When to do it.
        empty: CONDITIONING that scores are measured against; None takes the guider's negative.
        force: Use a calibration that does not fit.
    """
    run: GuardedSampling | None = None
    decided: tuple[GuardedImage, ...] = ()
    weights = ""
    guarded, record = watch(model, guarded=lambda: decided)

    def on_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal decided, weights
        guider, decided = executor.class_obj, ()
        if empty:
            guider.conds[EMPTY] = convert_cond(empty)  # prepared with the others, by ComfyUI
        if gate.calibration is not None:
            weights = weights_sha256(guider.model_patcher)
        return executor(*args, **kwargs)

    def on_sampler(
        executor: Callable,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Any,
        noise: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        nonlocal run, decided
        run = GuardedSampling(guider, method, empty=EMPTY if empty else "negative")
        try:
            options = extra_args["model_options"]
            noise = run.start(gate, sigmas, options, noise, weights=weights, force=force)
            decided = run.images
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        finally:
            run.close()
            run = None

    def on_predictions(
        executor: Callable, network: Any, conds: Sequence, x: Any, sigma: Any, options: dict
    ) -> Sequence:
        predictions = executor(network, conds, x, sigma, options)
        if run is not None:
            run.read(conds, predictions)
        return predictions

    def on_guided(args: Mapping[str, Any]) -> Tensor:
        return args["denoised"] if run is None else run.guided(args)

    guarded.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, on_run)
    guarded.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, on_sampler)
    guarded.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, on_predictions)
    guarded.set_model_sampler_post_cfg_function(on_guided)
    return guarded, record
