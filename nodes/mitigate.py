"""Node: a prompt's embedding changed until it no longer dictates the image."""

import math
from typing import Any

import torch
from comfy_api.latest import io

from nodes import common_ksampler

from ..shared.mitigation.embedding import EmbeddingOptimisation
from ..shared.mitigation.ordinary import OrdinaryEmbedding
from ..shared.score.calibration import Calibration
from .engine.automatic import found
from .engine.measuring import latent_shape
from .engine.mitigating import MitigatedPrompt, mitigate_prompt
from .inputs import GATES, TARGETS, CalibrationSocket, gate_of, schema, target_inputs, target_of
from .panel import CHANGED, PLAIN, panel

RESIDUAL = "residual"
LOOK_STEPS, LOOK_CFG = 20, 7.0
"""Of the images before and after, which are for looking: the sampler's own are unknown here."""
OFF = "Off: the gate is set to never, nothing was measured."


class MitigateMemorization(io.ComfyNode):
    """Prompt-embedding optimisation, behind a gate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeMitigate",
            search_aliases=["unmemorize mitigate", "memorisation", "prompt embedding optimization"],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True
                ),
                io.Combo.Input("gate", options=list(GATES), default="auto"),
                *target_inputs((RESIDUAL, *TARGETS)),
                io.Float.Input(
                    "learning_rate",
                    default=OrdinaryEmbedding.learning_rate,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                ),
                io.Int.Input("iterations", default=OrdinaryEmbedding.iterations, min=0, max=500),
                CalibrationSocket.Input("calibration", optional=True),
                io.Boolean.Input("force", default=False, optional=True),
                io.Vae.Input("vae", optional=True),
            ],
            outputs=[
                io.Conditioning.Output("mitigated"),
                io.String.Output("report"),
                io.Boolean.Output("acted"),
                io.Float.Output("before"),
                io.Float.Output("after"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        negative: list,
        latent: dict,
        seed: int,
        gate: str,
        target_from: str,
        target_quantile: float,
        target_norm: float,
        learning_rate: float,
        iterations: int,
        calibration: Calibration | None = None,
        force: bool = False,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Decide, and search where the gate lets the prompt through."""
        if gate == "never":
            shown = panel(cls, PLAIN, "off", OFF)
            return io.NodeOutput(positive, OFF, False, math.nan, math.nan, ui=shown)
        steps = {"learning_rate": learning_rate, "iterations": iterations}
        method: EmbeddingOptimisation | OrdinaryEmbedding
        if target_from == RESIDUAL:
            method = OrdinaryEmbedding(**steps)
        else:
            target = target_of(target_from, target_quantile, target_norm)
            method = EmbeddingOptimisation(**steps, **target)
        calibration = calibration or found(
            model, [text for text, _ in negative], latent_shape(model, latent)
        )
        chosen = gate_of(gate, calibration)
        result = mitigate_prompt(
            model, positive, negative, latent, seed, method=method, gate=chosen, force=force
        )
        before, after = _measured(result)
        report = _report(result, chosen.threshold)
        pair = None
        if vae is not None and result.acted:
            drawn = [
                _drawn(model, vae, prompt, negative, latent, seed)
                for prompt in (positive, result.positive)
            ]
            pair = drawn[0], drawn[1]
        state, badge = (CHANGED, "changed") if result.acted else (PLAIN, "not changed")
        shown = panel(cls, state, badge, report, pair=pair)
        return io.NodeOutput(result.positive, report, result.acted, before, after, ui=shown)


def _drawn(
    model: Any, vae: Any, positive: list, negative: list, latent: dict, seed: int
) -> torch.Tensor:
    """Return the first image of the batch as a prompt makes it, to look at."""
    each = ("samples", "noise_mask", "batch_index")
    first = {key: value[:1] if key in each else value for key, value in latent.items()}
    (sampled,) = common_ksampler(
        model, seed, LOOK_STEPS, LOOK_CFG, "euler", "normal", positive, negative, first
    )
    return vae.decode(sampled["samples"])


def _measured(result: MitigatedPrompt) -> tuple[float, float]:
    """Return what the search lowered, before and after: the highest magnitude, or the score."""
    if result.optimised is not None:
        return float(result.optimised.before.max()), float(result.optimised.after.max())
    before = math.nan if result.decision.score is None else result.decision.score
    return before, before if result.score_after is None else result.score_after


def _report(result: MitigatedPrompt, threshold: float | None) -> str:
    """Return the decision and what came of it, one fact a line."""
    score, search = result.decision.score, result.optimised
    measured = (
        "" if score is None else f": the prompt scores {score:.4g}, threshold {threshold:.4g}"
    )
    if not result.decision.fired:
        lines = [f"Not changed{measured}."]
    elif not result.acted:
        lines = [f"Not changed, already at its target{measured}."]
    else:
        lines = [f"{' '.join(('Changed', *result.changes[:1]))}{measured}."]
    if search is not None:
        images = zip(
            search.before.tolist(), search.after.tolist(), search.iterations.tolist(), strict=True
        )
        for number, (before, after, steps) in enumerate(images, 1):
            came = f" to {after:.4g} in {steps} steps" if steps else ""
            lines.append(f"image {number}: magnitude at its own noise {before:.4g}{came}")
    if (after := result.score_after) is not None:
        lines.append(f"The changed prompt scores {after:.4g} at the gate's own noises.")
        if threshold is not None and after > threshold:
            lines.append("It is still above the threshold: look whether the image comes back.")
    return "\n".join([*lines, *filter(None, [result.caveat])])
