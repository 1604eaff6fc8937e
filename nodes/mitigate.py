"""Node: a prompt's embedding changed until it no longer dictates the image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import torch
from comfy_api.latest import io

from ..shared.mitigation.embedding import EmbeddingOptimisation
from ..shared.mitigation.gate import Decision, Gate
from ..shared.mitigation.optimisation import Optimised
from ..shared.score.calibration import Calibration
from .engine.comfy_denoiser import ModelDenoiser, Prompt
from .engine.measuring import model_input, negative_input
from .engine.mitigating import (
    PROMPT,
    calibration_inputs,
    gate_input,
    gate_of,
    probe_of,
    probe_rows,
    start_of,
    target_inputs,
    target_settings,
)
from .engine.model_identity import weights_sha256
from .engine.sampling_work import with_denoiser
from .engine.schema import schema

OFF = "Off: the gate is set to never, nothing was measured."
NOT_ITS_TEXT = (
    "The network does not read this conditioning as it is, so that a change cannot be put back "
    "into it: models that process their text again, and prompts whose first part begins after the "
    "first step. Use Memorization Guard instead."
)


class MitigateMemorization(io.ComfyNode):
    """Prompt-embedding optimisation, behind a gate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return schema(
            node_id="UnmemorizeMitigate",
            display_name="Mitigate Memorization",
            description=(
                "Changes an encoded prompt a little, until it no longer dictates the image: the "
                "score falls, the subject stays. A prompt that is not memorized leaves as it came, "
                "and its images are the very same."
            ),
            search_aliases=["unmemorize mitigate", "memorisation", "prompt embedding optimization"],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt; of a combined one, the first part is changed."
                ),
                negative_input(),
                io.Latent.Input(
                    "latent",
                    tooltip="The one the sampler gets: its size is measured at, and each image of "
                    "its batch gets an embedding of its own.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="That of the sampler, 0 to 2^64 - 1: the embedding is searched at the "
                    "very noise that sampling begins with.",
                ),
                gate_input(),
                *target_inputs(),
                io.Float.Input(
                    "learning_rate", default=0.05, min=0.0001, max=1.0, step=0.001, round=0.0001,
                    tooltip="Size of a step of AdamW in units of the embedding, 0.0001 to 1; the "
                    "authors' code takes 0.05.",
                ),
                io.Int.Input(
                    "iterations", default=10, min=0, max=500,
                    tooltip="Steps at most, 0 to 500; the authors' code takes 10. Each costs about "
                    "three passes of the network per image.",
                ),
                *calibration_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "mitigated", display_name="positive", tooltip="For the sampler, same noise."
                ),
                io.String.Output("report", tooltip="Decision, scores and steps made, in words."),
                io.Boolean.Output("acted", tooltip="Whether the prompt was changed."),
                io.Float.Output(
                    "before",
                    tooltip="Score at the sampler's own noise, highest of the batch: L2 norm in "
                    "latent units, from 0; NaN if switched off.",
                ),
                io.Float.Output("after", tooltip="The same of the prompt that leaves this node."),
            ],
        )  # fmt: skip

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
    ) -> io.NodeOutput:
        """Decide, and search where the gate lets the prompt through."""
        if gate == "never":
            return io.NodeOutput(positive, OFF, False, math.nan, math.nan)
        target = target_settings(target_from, target_quantile, target_norm)
        method = EmbeddingOptimisation(learning_rate=learning_rate, iterations=iterations, **target)
        search = _Search(
            method=method,
            gate=gate_of(gate, calibration),
            positive=positive,
            latent=latent,
            seed=seed,
            model="" if calibration is None else weights_sha256(model),
            force=force,
        )
        found = with_denoiser(
            model, {PROMPT: Prompt(entries=positive)}, negative, latent, search,
            forward_rows=search.forward_rows,
        )  # fmt: skip
        optimised, acted = found.optimised, bool(found.optimised.iterations.any())
        after = _with_embeddings(positive, optimised.cond.embeddings) if acted else positive
        before_after = (float(norms.max()) for norms in (optimised.before, optimised.after))
        return io.NodeOutput(after, _report(found), acted, *before_after)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What was decided about a prompt, and what became of it."""

    gate: Gate
    decision: Decision
    score_after: float | None
    """Of the gate's probe, mean over the embeddings of the batch; None if nothing was changed."""
    optimised: Optimised
    caveat: str


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One search, to be called where ComfyUI samples."""

    method: EmbeddingOptimisation
    gate: Gate
    positive: list
    latent: Mapping[str, Any]
    seed: int
    model: str
    force: bool

    @property
    def forward_rows(self) -> int:
        """Return how many rows the network computes at most."""
        images = len(self.latent["samples"])
        return probe_rows(self.gate) * (1 + images) + images * (2 + self.method.iterations)

    def __call__(self, denoiser: ModelDenoiser) -> _Found:
        cond = denoiser.encode([PROMPT])
        text, further = self.positive[0]
        if further.get("start_percent", 0.0) > 0 or not torch.equal(
            cond.embeddings.cpu(), text[:1].cpu().to(cond.embeddings.dtype)
        ):
            raise ValueError(NOT_ITS_TEXT)
        probe, caveat = probe_of(denoiser, self.gate, self.model, force=self.force)
        (decision,) = probe.decide(cond)
        latent = torch.zeros(len(self.latent["samples"]), *denoiser.latent_shape)
        noise = comfy.sample.prepare_noise(latent, self.seed, self.latent.get("batch_index"))
        # With no steps to make it only measures.
        method = self.method if decision.fired else replace(self.method, iterations=0, target=0.0)
        with denoiser.with_gradients() as ours:
            optimised = method.start(start_of(ours, self.gate, noise))
        scores = probe.scores(optimised.cond) if optimised.iterations.any() else None
        return _Found(
            gate=self.gate,
            decision=decision,
            score_after=sum(scores) / len(scores) if scores else None,
            optimised=optimised,
            caveat=caveat,
        )


def _with_embeddings(positive: list, embeddings: torch.Tensor) -> list:
    """Return a CONDITIONING that differs in the first entry's embeddings, [image token width]."""
    (text, further), *others = positive
    return [[embeddings.to(text), further], *others]


def _report(found: _Found) -> str:
    """Return the decision and what came of it, one fact a line."""
    score, threshold, changed = found.decision.score, found.gate.threshold, found.optimised
    measured = (
        "" if score is None else f": the prompt scores {score:.4g}, threshold {threshold:.4g}"
    )
    if not found.decision.fired:
        lines = [f"Not changed{measured}."]
    elif not changed.iterations.any():
        lines = [f"Not changed, already at its target{measured}."]
    else:
        lines = [f"Changed{measured}."]
    for number, (before, after, steps) in enumerate(
        zip(
            changed.before.tolist(), changed.after.tolist(), changed.iterations.tolist(),
            strict=True,
        ),
        1,
    ):  # fmt: skip
        came = f" to {after:.4g} in {steps} steps" if steps else ""
        lines.append(f"image {number}: score at its own noise {before:.4g}{came}")
    if found.score_after is not None:
        lines.append(f"The changed prompt scores {found.score_after:.4g} at the gate's own noises.")
    return "\n".join([*lines, *filter(None, [found.caveat])])
