"""A prompt's embedding changed until it no longer dictates the image, behind a gate.

What decides and what a run starts from are the same for `guarding`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

from ...shared.arrays import Float, Tensor
from ...shared.mitigation.embedding import EmbeddingOptimisation
from ...shared.mitigation.gate import AppliedGate, Decision, Gate
from ...shared.mitigation.method import Start
from ...shared.mitigation.optimisation import Optimised
from ...shared.mitigation.ordinary import OrdinaryEmbedding
from .comfy_denoiser import ModelDenoiser, Prompt
from .measuring import caveat_of, with_denoiser
from .model_identity import settings, weights_sha256
from .watching import beside_text

PROMPT = "prompt"
"""Name of the one prompt of a denoiser here."""
NOT_ITS_TEXT = (
    "The network does not read this conditioning as it is, so that a change cannot be put back "
    "into it: models that process their text again, and prompts whose first part begins after the "
    "first step. Use Memorization Guard instead."
)
NOT_ALONE = (
    "The score need not compare with the threshold: the controls are texts alone, and here {}. "
    "Memorization Check and Unmemorize take each text by itself."
)


@dataclass(frozen=True, kw_only=True)
class MitigatedPrompt:
    """What was decided about a prompt, and what became of it."""

    positive: list
    """CONDITIONING; the very one that came in where nothing was changed."""
    decision: Decision
    optimised: Optimised | None
    """The search by magnitude, one embedding per image of the batch; None of one by residual."""
    changes: tuple[str, ...]
    """What was changed, for people, one per image; of the search by residual alone."""
    score_after: float | None
    """At the gate's noises, mean over the embeddings of the batch; None if nothing was changed."""
    caveat: str
    """Why the calibration does not fit, "" where it does."""

    @property
    def acted(self) -> bool:
        """Return whether the prompt was changed."""
        return (
            self.score_after is not None
            if self.optimised is None
            else bool(self.optimised.iterations.any())
        )


def mitigate_prompt(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: Mapping[str, Any],
    seed: int,
    *,
    method: EmbeddingOptimisation | OrdinaryEmbedding,
    gate: Gate,
    force: bool,
) -> MitigatedPrompt:
    """Decide, and search where the gate lets the prompt through.

    Args:
        model: MODEL.
        positive: CONDITIONING; the embeddings of its first entry are changed.
        negative: CONDITIONING that scores are measured against.
        latent: LATENT that the sampler will get; each image of its batch gets its own embedding.
        seed: Of the sampler: the search is at the very noise that sampling begins with.
        method: How to search; by magnitude it also measures where the gate is shut.
        gate: Whether to search.
        force: Use a calibration that does not fit.

    Raises:
        ValueError: The network does not read the conditioning as it is, or the calibration does not
            fit.
    """
    images = len(latent["samples"])
    weights = "" if gate.calibration is None else weights_sha256(model)

    def work(denoiser: ModelDenoiser) -> MitigatedPrompt:
        cond = denoiser.encode([PROMPT])
        (text, further), *others = positive
        if further.get("start_percent", 0.0) > 0 or not torch.equal(
            cond.embeddings.cpu(), text[:1].cpu().to(cond.embeddings.dtype)
        ):
            raise ValueError(NOT_ITS_TEXT)
        applied, caveat = applied_gate(denoiser, gate, weights, force=force)
        beside = next(filter(None, (beside_text([one for _, one in side])
                                    for side in (positive, negative))), "")  # fmt: skip
        if gate.calibration is not None and beside:
            caveat = " ".join(filter(None, [caveat, NOT_ALONE.format(beside)]))
        (decision,) = applied.decide(cond)
        like = torch.zeros(images, *denoiser.latent_shape)
        noise = comfy.sample.prepare_noise(like, seed, latent.get("batch_index"))
        by_residual = isinstance(method, OrdinaryEmbedding)
        # With no steps to make it only measures.
        still = {"iterations": 0} if by_residual else {"iterations": 0, "target": 0.0}
        chosen = method if decision.fired else replace(method, **still)
        with denoiser.with_gradients() as ours:
            found = chosen.start(start_of(ours, applied, noise))
        assert found.cond is not None  # both searches give embeddings
        changed = not torch.equal(found.cond.embeddings, cond.embeddings[[0] * images])
        scores = applied.scores(found.cond) if changed else None
        embeddings = found.cond.embeddings.to(text)
        return MitigatedPrompt(
            positive=[[embeddings, further], *others] if changed else positive,
            decision=decision,
            optimised=found if isinstance(found, Optimised) else None,
            changes=found.changes if changed else (),
            score_after=sum(scores) / len(scores) if scores else None,
            caveat=caveat,
        )

    prompts = {PROMPT: Prompt(entries=positive)}
    searched = len(gate.config.seeds) if isinstance(method, OrdinaryEmbedding) else images
    rows = gate_rows(gate) * (1 + images) + images + searched * (1 + method.iterations)
    return with_denoiser(model, prompts, negative, latent, work, forward_rows=rows)


def gate_rows(gate: Gate) -> int:
    """Return how many rows the network computes to score one prompt for a gate."""
    if gate.calibration is None:
        return 0
    return 2 * len(gate.config.seeds) * gate.config.steps


def applied_gate(
    denoiser: ModelDenoiser, gate: Gate, model: str, *, force: bool
) -> tuple[AppliedGate, str]:
    """Return what scores prompts for a gate, and "" or a caveat to print with every score.

    Args:
        denoiser: The network, at the size of the images.
        gate: Its calibration must fit.
        model: Sha256 of the weights.
        force: It need not fit.

    Raises:
        ValueError: It does not; names what differs.
    """
    caveat = ""
    if gate.calibration is not None:
        judge = gate.calibration.judge
        now = settings(denoiser, gate.config, judge.settings.get("told"))
        caveat = caveat_of(judge, model, now, force)
    return AppliedGate(gate, denoiser), caveat


def start_of(
    denoiser: ModelDenoiser, applied: AppliedGate, noise: Float[Tensor, " image *latent"]
) -> Start:
    """Return a sampling run before its first step, at the first level that the gate measures at.

    Args:
        denoiser: With the prompt under the name `PROMPT`, and with gradients.
        applied: After its decision; its calibration may give a target.
        noise: Of unit variance.
    """
    gate, noises = applied.gate, applied.noises()
    rows, sigma = [0] * len(noise), denoiser.sigmas(gate.config.schedule_steps)[0]
    x = noise.to(denoiser.device) * denoiser.noise_scale(sigma)
    with torch.no_grad():
        x0_uncond = denoiser.denoise(x, sigma, denoiser.unconditional()[rows])
    return Start(
        denoiser=denoiser,
        cond=denoiser.encode([PROMPT])[rows],
        x=x,
        sigma=sigma,
        x0_uncond=x0_uncond,
        generator=torch.Generator("cpu").manual_seed(0),
        calibration=gate.calibration,
        network=denoiser.network.diffusion_model,
        noises=noises and replace(noises, denoiser=denoiser),
    )
