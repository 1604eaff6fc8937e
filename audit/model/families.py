"""Flagged prompts that are near a memorized one: told by their words and by what they add."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...shared.files.storage import Journal
from ...shared.files.tensors import TensorFolder
from ...shared.score.calibration import Calibration
from ...shared.score.config import DetectionConfig
from ...shared.score.families import (
    CONTROLS,
    Pair,
    near_members,
    overlap,
    related_pairs,
    sharing_words,
)
from ..common.job import content_key
from ..common.measure import Bars, measure_differences
from ..common.subject import Facts, Subject
from .result import NearPrompt


@dataclass(frozen=True, kw_only=True)
class Related:
    """The flagged prompts of a job, and which of them are related."""

    prompts: tuple[str, ...]
    """All of the job."""
    scores: dict[int, float]
    """Of the flagged ones, by index."""
    cosines: dict[Pair, float]
    """Of the related pairs."""
    caveats: tuple[str, ...] = ()

    def near(self, copied: Collection[int] = ()) -> dict[int, NearPrompt]:
        """Return the memorized prompt that flagged ones are near to, by their index.

        Args:
            copied: Prompts whose own training image came back.
        """
        members = near_members(self.scores, self.cosines, copied)
        return {
            index: NearPrompt(
                index=member,
                prompt=self.prompts[member],
                overlap=overlap(self.prompts[index], self.prompts[member]),
                cosine=self.cosines[min(index, member), max(index, member)],
            )
            for index, member in members.items()
        }


def relate(
    subject: Subject,
    facts: Facts,
    prompts: Sequence[str],
    scores: Mapping[int, float],
    config: DetectionConfig,
    journal: Journal,
    *,
    judge: Calibration,
    job_key: str,
    folder: Path,
    bars: Bars,
) -> Related:
    """Find the flagged prompts that are related.

    Those that share half of their words are predicted once more, at the first seed: one forward row
    each, and one for the empty prompt. The others cost nothing.

    Args:
        subject: The model; not loaded when the journal knows the cosines.
        facts: Of the same job.
        prompts: All of the job, distinct.
        scores: Of the flagged ones, by index.
        config: What was measured.
        journal: Keeps the cosines.
        judge: By which the prompts are flagged.
        job_key: Stands for model and settings in the keys.
        folder: Of this job alone, for what is finished.
        bars: Makes the progress bar.
    """
    flagged = sorted(scores)
    pairs = [(flagged[i], flagged[j]) for i, j in sharing_words([prompts[i] for i in flagged])]
    related = Related(prompts=tuple(prompts), scores=dict(scores), cosines={})
    if not pairs:
        return related
    sharing = sorted({index for pair in pairs for index in pair})
    if judge.basis is None or judge.family_cosine is None:
        caveat = (
            f"{len(sharing)} flagged prompts share at least half of their words with another one. "
            "Whether they are near a memorized one cannot be told: that takes a calibration of "
            f"the residual score, from at least {CONTROLS} controls."
        )
        return replace(related, caveats=(caveat,))
    texts = [prompts[index] for index in sharing]
    key, finished = content_key(job_key, "families", texts), TensorFolder(folder)
    if key not in journal:
        one_seed = replace(config, seeds=tuple(judge.settings["seeds"][:1]))
        differences = measure_differences(
            subject, facts, texts, one_seed, judge.basis.steps[:1], finished, bars=bars,
            phase="families",
        )  # fmt: skip
        row = {index: place for place, index in enumerate(sharing)}
        rows = [(row[i], row[j]) for i, j in pairs]
        found = related_pairs(differences[0], rows, judge.basis, judge.family_cosine)
        journal.put(key, [[sharing[i], sharing[j], cosine] for (i, j), cosine in found.items()])
    finished.remove()
    return replace(related, cosines={(i, j): cosine for i, j, cosine in journal.get(key)})
