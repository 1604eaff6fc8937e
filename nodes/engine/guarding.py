"""Mitigation while ComfyUI samples: wrappers on a clone of the model, nothing else.

What other packs' hooks change comes before it: the wrapper reads the network's own answers, and
what the method returns replaces the guided prediction. All wrappers are closures, as in `watching`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond
from torch import Tensor

from ...shared.mitigation.gate import Decision, Gate, GuardedImage
from ...shared.mitigation.initial_noise import InitialNoise
from ...shared.mitigation.method import Method, Mitigation, Start, Step
from ...shared.mitigation.optimisation import Optimised
from ...shared.sampling.watched_runs import WatchRecord
from ...shared.score.metrics import text_noise_norm
from .automatic import MAKE_ONE, found
from .comfy_denoiser import ModelDenoiser, Prompt, percent_of
from .damped_attention import ComfyTwoForces
from .measuring import live_progress
from .mitigating import NOT_ALONE, PROMPT, applied_gate, gate_rows, start_of
from .model_identity import weights_sha256
from .neighbours import FolderNeighbours
from .watching import begins_at_noise, beside_text, places, watch

log = logging.getLogger(__name__)

KEY = "unmemorize guard"
EMPTY = "unmemorize guard empty prompt"
NO_GUIDANCE = (
    "The method {name} of Memorization Guard acts on guidance, which is off in this run: cfg is 1, "
    "or the guider has no single cfg (BasicGuider, DualCFGGuider). Sample with cfg above 1, or "
    "choose the method initial noise, or Mitigate Memorization."
)
NO_NEGATIVE = (
    "The guider has no negative prompt to measure against: connect an encoded empty text to "
    "`negative` of Memorization Guard."
)
NOT_FROM_NOISE = (
    "The method initial noise of Memorization Guard needs sampling that begins at pure noise: set "
    "denoise to 1 and let this sampler add the noise, or choose another method."
)


def guard(
    model: ModelPatcher,
    method: Method,
    gate: Gate | None,
    *,
    empty: list | None = None,
    force: bool = False,
) -> tuple[ModelPatcher, WatchRecord]:
    """Return a clone of a model that mitigates, and the record that its runs will fill.

    Where the gate stays shut the images are bit-identical.

    Args:
        model: Stays as it is.
        method: What to do to a run whose prompt the gate lets through.
        gate: When to do it; None finds the automatic calibration once the size of a run is known.
        empty: CONDITIONING that scores are measured against; None takes the guider's negative.
        force: Use a calibration that does not fit.
    """
    run: GuardedSampling | None = None
    acting, deciding = method, gate
    decided: tuple[GuardedImage, ...] = ()
    weights = ""
    guarded, record = watch(model, guarded=lambda: decided)

    def on_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal acting, decided, weights, deciding
        guider, decided = executor.class_obj, ()
        if empty:
            guider.conds[EMPTY] = convert_cond(empty)  # prepared with the others, by ComfyUI
        if isinstance(method, FolderNeighbours):  # its VAE is loaded before the model
            acting = method.at(guider.model_patcher, tuple(args[0].shape[1:]))
        deciding = gate or automatic_gate(guider, EMPTY if empty else "negative", args[0])
        if deciding.calibration is not None:
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
        run = GuardedSampling(guider, acting, empty=EMPTY if empty else "negative")
        try:
            options = extra_args["model_options"]
            assert deciding is not None  # since the run began
            noise = run.start(deciding, sigmas, options, noise, weights=weights, force=force)
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


def _beside(conds: Mapping[str, Any], empty: str) -> str:
    """Return what the prompt or what it is measured against is besides a text."""
    return beside_text(conds["positive"]) or beside_text(conds[empty])


def automatic_gate(guider: Any, empty: str, noise: Tensor) -> Gate:
    """Return the gate of the calibration that was made by itself.

    Args:
        guider: As its run begins.
        empty: Under which key it holds what scores are measured against.
        noise: [image *latent].

    Raises:
        ValueError: There is none for this model, size and negative.
    """
    negative = [entry["cross_attn"] for entry in guider.conds.get(empty, ())]
    calibration = found(guider.model_patcher, negative, tuple(noise.shape[1:]))
    if calibration is None:
        raise ValueError(MAKE_ONE)
    return Gate(calibration=calibration)


class GuardedSampling:
    """Decides before the first step, then replaces guided predictions."""

    def __init__(self, guider: Any, method: Method, *, empty: str):
        """Prepare a run.

        Args:
            guider: Inside its call of the sampler.
            method: What to do if the gate lets the prompt through.
            empty: Under which key the guider holds what scores are measured against.
        """
        self.guider, self.method, self.empty = guider, method, empty
        self.images: tuple[GuardedImage, ...] = ()
        """What was decided, per image of the batch."""
        self.mitigation = Mitigation()
        self._pair: tuple[Tensor, Tensor] | None = None
        self._calls = 0

    def start(
        self, gate: Gate, sigmas: Tensor, options: dict, noise: Tensor, *, weights: str, force: bool
    ) -> Tensor:
        """Decide, let the method act, and return the initial noise.

        Args:
            gate: Decides once, for the one prompt of all images.
            sigmas: Noise levels of the run.
            options: Model options of the run.
            noise: [image *latent] of unit variance; comes back as it is if nothing changes it.
            weights: Sha256 of the weights, for the gate's calibration.
            force: Use a calibration that does not fit.

        Raises:
            ValueError: The method cannot work in this run, or the calibration does not fit.
        """
        self._check(sigmas, options, noise)
        conds, view = self.guider.conds, copy(self.guider)
        view.conds = {"positive": conds["positive"], "negative": conds[self.empty]}
        rows = gate_rows(gate) + len(noise)
        if isinstance(self.method, InitialNoise):  # one measurement more than steps
            rows += 2 * len(noise) * (self.method.iterations + 1)
        shown = live_progress(self.guider.model_patcher, rows)
        denoiser = ModelDenoiser(view, {PROMPT: Prompt(entries=[])}, options, noise, shown)
        applied, caveat = applied_gate(denoiser, gate, weights, force=force)
        if gate.calibration is not None and (beside := _beside(conds, self.empty)):
            caveat = " ".join(filter(None, [caveat, NOT_ALONE.format(beside)]))
        if caveat:
            log.warning(caveat)
        (decision,) = applied.decide(denoiser.encode([PROMPT]))
        if decision.fired:
            with denoiser.with_gradients() as ours:
                start = start_of(ours, applied, noise)
                self.mitigation = self.method.start(start)
                noise = _noise_of(self.mitigation, start, noise)
        self.images = self._record(decision, gate, len(noise))
        return noise

    def read(self, conds: Sequence, predictions: Sequence[Tensor]) -> None:
        """Keep the network's predictions, if they are of the guider's own pair of prompts."""
        positive, negative = places(self.guider, conds)
        if positive is not None and negative is not None:
            self._pair = predictions[positive], predictions[negative]

    def guided(self, args: Mapping[str, Any]) -> Tensor:
        """Return the guided x0-prediction: the method's, or the one that ComfyUI has computed."""
        if type(self.mitigation).guide is Mitigation.guide:
            return args["denoised"]
        sigma = float(args["sigma"].flatten()[0])
        if sigma == 0:  # some samplers call once more at the end
            return args["denoised"]
        if self._pair is None:
            raise ValueError(NO_GUIDANCE.format(name=self.method.name))
        (cond, uncond), self._pair = self._pair, None
        sampling = self.guider.inner_model.model_sampling
        step = Step(
            index=self._calls,
            percent=percent_of(sampling, sigma),
            x=args["input"],
            cond=cond,
            uncond=uncond,
            cond_scale=float(args["cond_scale"]),
            magnitude=text_noise_norm(cond, uncond) / sigma,
            predict=lambda: self._conditional(args),
            # Guidance is affine, so that it reads the same in clean latents.
            to_x0=lambda prediction: prediction,
            from_x0=lambda x0: x0,
        )
        self._calls += 1
        guided = self.mitigation.guide(step)
        return args["denoised"] if guided is None else guided

    def close(self) -> None:
        """Undo whatever the method has done beyond this object."""
        self.mitigation.close()

    def _conditional(self, args: Mapping[str, Any]) -> Tensor:
        """Return one more prediction from the prompt, [image *latent]."""
        options = args["model_options"]
        if isinstance(self.mitigation, ComfyTwoForces):
            options = self.mitigation.damped(options)
        # A new list: watchers recognise the guider's own prompts by the identity of their list.
        conds = [[*self.guider.conds["positive"]]]
        (x0,) = comfy.samplers.calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], options
        )
        return x0

    def _check(self, sigmas: Tensor, options: dict, noise: Tensor) -> None:
        """Raise ValueError unless the run has what the method and its gate need."""
        conds, cfg = self.guider.conds, self.guider.cfg
        if getattr(noise, "is_nested", False) or noise.ndim != 4:
            raise ValueError("Memorization Guard works on images alone: connect an image's latent.")
        off = math.isclose(cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
        if self.method.needs_guidance and (off or not conds.get("negative")):
            raise ValueError(NO_GUIDANCE.format(name=self.method.name))
        if not conds.get(self.empty) or not conds.get("positive"):
            raise ValueError(NO_NEGATIVE)
        if isinstance(self.method, InitialNoise):
            if not (begins_at_noise(self.guider.model_patcher, sigmas) and noise.any()):
                raise ValueError(NOT_FROM_NOISE)

    def _record(self, decision: Decision, gate: Gate, images: int) -> tuple[GuardedImage, ...]:
        """Return the decision for each image; all have the same prompt."""
        moved = isinstance(self.mitigation, Optimised)
        before, after = (
            (self.mitigation.before.tolist(), self.mitigation.after.tolist())
            if moved else ([None] * images, [None] * images)
        )  # fmt: skip
        return tuple(
            GuardedImage(
                prompt=None,
                fired=decision.fired,
                threshold=gate.threshold,
                score_before=decision.score,
                noise_before=before[image],
                noise_after=after[image],
                method=self.method.name if decision.fired else None,
            )
            for image in range(images)
        )


def _noise_of(mitigation: Mitigation, start: Start, noise: Tensor) -> Tensor:
    """Return noise of unit variance: the method's, and where that moved nothing the sampler's."""
    if mitigation.x is None:
        return noise
    moved = (mitigation.x != start.x).flatten(1).any(1)
    changed = noise.clone()
    changed[moved] = mitigation.x[moved].detach() / start.denoiser.noise_scale(start.sigma)
    return changed
