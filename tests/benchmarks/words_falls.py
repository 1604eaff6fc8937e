"""What the fall of a magnitude without a word says, and how often advice finds a wording."""

from collections.abc import Sequence

import torch
from figures import Figure, share_of
from scores.case import Case
from tqdm.auto import tqdm
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.denoiser import Denoiser
from unmemorize.shared.score.detection import detect
from unmemorize.shared.words.advice import advise
from unmemorize.shared.words.leaving_out import TELLING, shortened

SEEDS = (0, 1, 2, 3)
CAPTIONS = 28
"""Of each model, whose words are left out from several starting noises."""


def falls(denoiser: Denoiser, caption: str) -> torch.Tensor:
    """Return how far the magnitude falls without each word, share of it, [word seed]."""
    words = caption.split()
    texts = [caption, *shortened(caption, words, range(len(words))).values()]
    traces = detect(denoiser, texts, DetectionConfig(seeds=SEEDS)).traces.mean(2)
    return (traces[0] - traces[1:]) / traces[0]


def rises(fallen: torch.Tensor) -> tuple[list[bool], list[bool]]:
    """Return whether a fall at one starting noise is a rise at another.

    Args:
        fallen: From `falls`, of any number of words, [word seed].

    Returns:
        Of falls below `TELLING` and of those from it on, one entry a fall and other noise.
    """
    small, telling = [], []
    for one in range(fallen.shape[1]):
        for other in range(fallen.shape[1]):
            for fall, again in zip(fallen[:, one], fallen[:, other], strict=True):
                if other != one and fall > 0:
                    (telling if fall >= TELLING else small).append(bool(again < 0))
    return small, telling


def measure_falls(case: Case, captions: Sequence[str]) -> dict[str, Figure]:
    """Return how often falls are undone by another starting noise, and print it."""
    each = [falls(case.subject.denoiser, text) for text in tqdm(captions[:CAPTIONS], "falls")]
    fallen = torch.cat(each)
    found, key = {}, f"grid.words.{case.model.name}.rises_elsewhere"
    for name, undone in zip(("small_fall", "telling_fall"), rises(fallen), strict=True):
        if undone:
            found[f"{key}.{name}"] = figure = share_of(undone)
            print(f"{case.model.name}, {len(fallen)} words: a {name.replace('_', ' ')} is a rise "
                  f"at another noise in {figure.value:.3f} of {figure.n}")  # fmt: skip
    return found


def measure_advice(case: Case, captions: Sequence[str]) -> dict[str, Figure]:
    """Return for how many flagged captions advice finds a wording that is not, and print it."""
    judge, found = case.calibration.judge, []
    for text in tqdm(captions, "advice"):
        advice = advise(case.subject.denoiser, text, judge.threshold, case.config,
                        basis=judge.basis)  # fmt: skip
        if advice.score > judge.threshold:
            found.append(advice.best is not None)
    if not found:
        return {}
    figure = share_of(found)
    print(f"{case.model.name}: a wording for {figure.value:.2f} of {figure.n} flagged captions")
    return {f"words.{case.model.name}.advice_found": figure}
