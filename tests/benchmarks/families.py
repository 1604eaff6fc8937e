"""How well near captions are grouped with the memorized one, on a model with a known truth."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from figures import Figure, share_of
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.denoiser import Denoiser
from unmemorize.shared.score.detection import control_differences, detect
from unmemorize.shared.score.families import near_members, related_pairs, sharing_words

if TYPE_CHECKING:
    from bench_models import Caption


def measure_families(
    denoiser: Denoiser, calibration: Calibration, captions: Sequence["Caption"]
) -> dict[str, Figure]:
    """Return figures of families, without images: the highest score is taken for the memorized one.

    `family_recall`: flagged captions one word from a planted one that are called near that very
    one. `family_planted_near`: flagged planted captions that are called near another one.
    `family_other_near`: flagged captions that are neither, called near. `family_planted_pairs`:
    pairs of planted captions that share too few words and whose cosine exceeds the limit all the
    same; for controls it is .01.

    Args:
        denoiser: The model.
        calibration: Of its controls, with a residual.
        captions: That are audited, no controls among them.

    Raises:
        ValueError: The calibration has no limit for the cosine of related prompts.
    """
    judge = calibration.judge
    if judge.basis is None or judge.family_cosine is None:
        raise ValueError("Families take a calibration of the residual score from 50 controls.")
    texts = [caption.text for caption in captions]
    config = DetectionConfig(
        seeds=tuple(judge.settings["seeds"]), schedule_steps=judge.settings["schedule_steps"]
    )
    scores = detect(denoiser, texts, config, basis=judge.basis).scores
    flagged = judge.flags(scores).nonzero().flatten().tolist()
    chosen = sorted({*flagged, *(i for i, c in enumerate(captions) if c.group == "verbatim")})
    one_seed = DetectionConfig(seeds=config.seeds[:1], schedule_steps=config.schedule_steps)
    differences = control_differences(
        denoiser, [texts[i] for i in chosen], one_seed, judge.basis.steps[:1]
    )[0]
    every = related_pairs(
        differences, [*combinations(range(len(chosen)), 2)], judge.basis, judge.family_cosine
    )
    sharing = {*sharing_words([texts[i] for i in chosen])}
    related = {
        (chosen[i], chosen[j]): cosine
        for (i, j), cosine in every.items()
        if (i, j) in sharing and {chosen[i], chosen[j]} <= {*flagged}
    }
    near = near_members({i: float(scores[i]) for i in flagged}, related)
    told: dict[str, list[bool]] = {"recall": [], "planted_near": [], "other_near": []}
    for index in flagged:
        caption = captions[index]
        if caption.near:
            told["recall"].append(index in near and texts[near[index]] == caption.near)
        elif caption.group in ("verbatim", "template"):
            told["planted_near"].append(index in near)
        else:
            told["other_near"].append(index in near)
    planted = [k for k, i in enumerate(chosen) if captions[i].group == "verbatim"]
    told["planted_pairs"] = [p in every for p in combinations(planted, 2) if p not in sharing]
    return {
        f"family_{name}": share_of(hits) if hits else Figure(None, None, None, 0)
        for name, hits in told.items()
    }
