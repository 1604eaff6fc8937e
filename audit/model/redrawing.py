"""Draw flagged prompts without their strongest words: does the training image still come back?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...shared.words.leaving_out import without_word
from ..common.job import content_key
from .comparison import Comparer, Comparison
from .images import Sampled, Shot, all_exist, draw
from .result import NearestImage, Outcome, RedrawnImage
from .work import Work

REDRAWN = 2
"""Words of a prompt without which its image is drawn again, the strongest first."""


def redraw(
    work: Work,
    plan: Sequence[Sampled],
    explanations: Mapping[int, dict[str, Any]],
    comparison: Comparison,
    comparer: Callable[[], Comparer | None],
    together: int,
) -> dict[int, tuple[RedrawnImage, ...]]:
    """Return the images without a word, by the prompt's index.

    Only a prompt whose image is a copy of a training image can say whether a word brings it. The
    seed is the first that brought it. One image a word: an observation, no rate.

    Args:
        work: The folder of its job gets the images.
        plan: The prompts that have images.
        explanations: Stored explanations by the prompt's index.
        comparison: Of the images with the training images.
        comparer: Returns what compares; called where something has to be compared.
        together: Images that are drawn at once.
    """
    copies = {
        sampled: (seed, first)
        for sampled in plan
        if sampled.index in explanations
        for seed, path in reversed(sampled.paths.items())  # so that the first seed stays
        if (first := comparison.nearest.get(path)) is not None and first.copied
    }
    shorter = {
        sampled: [
            (left_out, Shot(
                prompt=without_word(sampled.prompt, values["words"], left_out["index"]), seed=seed,
                path=f"images/{sampled.index:05d}-without{left_out['index']}.png",
            ))
            for values in [explanations[sampled.index]]
            for left_out in values["occlusions"][:REDRAWN]
        ]
        for sampled, (seed, _) in copies.items()
    }  # fmt: skip
    pairs = [(sampled, shot) for sampled, each in shorter.items() for _, shot in each]
    if not pairs:
        return {}
    draw(work, [shot for _, shot in pairs], together, "images without a word")
    key = content_key(work.job.key, [[s.index, asdict(copies[s][1]), asdict(t)] for s, t in pairs])
    journal, folder = work.job.journal("redrawn"), work.job.folder
    stored = journal.get(key)
    if stored is None or not all_exist(folder, (each["path"] for each in stored.values())):
        compares = comparer()
        assert compares is not None  # the prompts' images were compared
        # Is its own image still drawn?
        named = [(sampled.prompt, shot.path) for sampled, shot in pairs]
        found = compares.nearest(named, compares.judge([*named, *comparison.judged]))
        stored = {path: asdict(image) for path, image in found.items()}
        journal.put(key, stored)
    return {
        sampled.index: tuple(
            RedrawnImage(
                word=left_out["word"], index=left_out["index"], prompt=shot.prompt, path=shot.path,
                seed=shot.seed, nearest=after, outcome=_outcome(copies[sampled][1], after),
            )
            for left_out, shot in each for after in [NearestImage(**stored[shot.path])]
        )
        for sampled, each in shorter.items()
    }  # fmt: skip


def _outcome(before: NearestImage, after: NearestImage) -> Outcome:
    """Return whether the training image that came back before still does."""
    if not after.copied:
        return "unknown" if after.copied is None else "gone"
    # One drawing may stand among the training images several times, under one caption.
    same = after.path == before.path or after.caption == before.caption
    return "back" if same else "another"
