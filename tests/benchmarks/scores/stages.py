"""Score and collapse together: what the second stage finds, and what it is spent on."""

from collections.abc import Sequence

import torch
from copies_truth import draw_planted
from figures import Figure, plain, share_of
from torch import Tensor
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.collapse import SEEDS, STEPS, collapses
from unmemorize.shared.score.denoiser import Denoiser
from unmemorize.shared.score.detection import Progress, detect

from .case import Case
from .ranking import Draw, flagged, ranked

FORWARDS = len(SEEDS) * STEPS * 2
"""Rows that sampling one prompt costs, with and without the prompt."""
TOGETHER = 10
"""Captions that are sampled in one batch."""
BELOW = 1e6
"""What prompts that are not sampled rank lower by: more than any evidence."""


def measure_two_stage(case: Case) -> dict[str, Figure]:
    """Return the figures of the shipped score with its second stage, and what they cost.

    `suspicious`: share of negatives that are sampled. `forwards`: rows a negative on average, at
    all seeds of the first stage. `collapse_alone`: how well the second measure alone tells the
    sampled ones apart. `draw_planted`: which of the negatives that are flagged, and of those that
    are sampled and not flagged, draw a repeated training image, that of another caption.
    """
    groups, key = case.groups, f"detection_two_stage.{case.model.name}"
    judge = case.calibration.judge
    scores = detect(case.subject.denoiser, groups.texts, case.config, basis=judge.basis).scores
    tried = {*groups.planted, *groups.negatives, *groups.near, *groups.template}
    chosen = [i for i in judge.suspicious(scores) if i in tried]
    collapses = torch.full_like(scores, torch.nan)
    collapses[chosen] = collapses_of(case, chosen)
    # Controls are sampled by their own scores, which are by directions of others.
    own, sampled = judge.seed_scores.mean(1), judge.suspicious(judge.seed_scores.mean(1))
    measured = collapses_of(case, [groups.controls[i] for i in sampled])
    both = case.calibration.with_second(dict(zip(sampled, measured.tolist(), strict=True))).judge
    of_controls = torch.full_like(own, torch.nan)
    of_controls[sampled] = measured
    draw = Draw(ranks(both, scores, collapses), ranks(both, own, of_controls))
    suspicious = [i in {*chosen} for i in groups.negatives]
    rows = len(case.config.seeds) + sum(suspicious) / len(suspicious) * FORWARDS
    found = {
        f"{key}.{name}": figure
        for name, figure in ranked([draw], groups.planted, groups.negatives).items()
    }
    found |= {
        f"{key}.false_positive_rate": flagged([draw], groups.negatives),
        f"{key}.recall": flagged([draw], groups.planted),
        f"{key}.forwards": plain(rows, len(suspicious)),
        f"grid.{key}.suspicious": share_of(suspicious),
        f"grid.{key}.planted_suspicious": share_of([i in {*chosen} for i in groups.planted]),
    }  # fmt: skip
    threshold, rank = both.require_second().threshold, ranks(both, scores, collapses)
    sampled_negatives = [i for i in groups.negatives if i in {*chosen}]
    for name, flags in (("flagged", True), ("not_flagged", False)):
        some = [i for i in sampled_negatives if (rank[i].item() > threshold) is flags]
        if some:
            drawing = draw_planted(case, groups.of(some))
            found[f"grid.{key}.draw_planted.{name}"] = share_of(drawing)
    planted, others = ([i for i in of if i in {*chosen}]
                       for of in (groups.planted, groups.negatives))  # fmt: skip
    if planted and others:
        alone = ranked([Draw(collapses)], planted, others)
        found |= {f"grid.{key}.collapse_alone.{name}": figure for name, figure in alone.items()}
    return found


def ranks(judge: Calibration, scores: Tensor, collapses: Tensor) -> Tensor:
    """Return one number a prompt, by which the pair of stages ranks them."""
    evidence = judge.require_second().evidence(scores, collapses)
    return torch.where(evidence.isnan(), scores - BELOW, evidence)


def collapses_of(case: Case, captions: Sequence[int]) -> Tensor:
    """Return the collapses [caption] of captions by index, float64."""
    texts = case.groups.of(list(captions))

    def compute(denoiser: Denoiser, progress: Progress) -> Tensor:
        values: list[float] = []
        for start in range(0, len(texts), TOGETHER):
            values += collapses(denoiser, texts[start : start + TOGETHER])
            progress(len(texts[start : start + TOGETHER]))
        return torch.tensor(values, dtype=torch.float64)

    return case.kept(f"collapse-{len(SEEDS)}-{STEPS}", texts, compute)
