"""Draw flagged prompts without their strongest words: does the training image still come back?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from ...shared.words.leaving_out import without_word
from ..common.job import content_key
from ..common.measure import complete
from .comparison import Comparison, comparer_of
from .images import Sampled, all_exist, sample
from .result import NearestImage, Outcome, RedrawnImage
from .work import Work

REDRAWN = 2
"""Words of a prompt without which its image is drawn again, the strongest first."""


def redraw(
    work: Work,
    plan: Sequence[Sampled],
    explanations: Mapping[int, dict[str, Any]],
    comparison: Comparison,
) -> dict[int, tuple[RedrawnImage, ...]]:
    """Return the images without a word, by the prompt's index; each prompt's are stored together.

    Only a prompt whose image is a copy of a training image can say whether a word brings it. The
    seed is the first that brought it. One image a word: an observation, no rate.

    Args:
        work: The folder of its job gets the images.
        plan: The prompts that have images.
        explanations: Stored explanations by the prompt's index.
        comparison: Of the images with the training images.
    """
    copies = {
        sampled: (seed, first)
        for sampled in plan
        if sampled.index in explanations
        for seed, path in reversed(sampled.paths.items())  # so that the first seed stays
        if (first := comparison.nearest.get(path)) is not None and first.copied
    }
    compared = cache(lambda: comparer_of(work))  # reads all training images

    def draw(sampled: Sampled) -> list[dict[str, Any]]:
        seed, first = copies[sampled]
        denoiser, config, folder = work.subject.denoiser, work.config, work.job.folder
        values = explanations[sampled.index]
        shorter = {
            f"images/{sampled.index:05d}-without{left_out['index']}.png":
            (left_out, without_word(sampled.prompt, values["words"], left_out["index"]))
            for left_out in _strongest(values)
        }  # fmt: skip
        for path, (_, prompt) in shorter.items():
            sample(denoiser, config, prompt, folder, {seed: path})
        comparer = compared()
        assert comparer is not None  # the prompt's images were compared
        pairs = [(sampled.prompt, path) for path in shorter]  # is its own image still drawn?
        nearest = comparer.nearest(pairs, comparer.judge([*pairs, *comparison.judged]))
        return [
            asdict(RedrawnImage(
                word=left_out["word"], index=left_out["index"], prompt=prompt, path=path,
                seed=seed, nearest=nearest[path], outcome=_outcome(first, nearest[path]),
            ))
            for path, (left_out, prompt) in shorter.items()
        ]  # fmt: skip

    def whole(drawn: list[dict[str, Any]]) -> bool:
        names = [name for each in drawn for name in (each["path"], each["nearest"]["path"])]
        return all_exist(work.job.folder, names)

    stored = complete(
        work.job.journal("redrawn"),
        {sampled: content_key(work.job.key, sampled.prompt, seed, asdict(first))
         for sampled, (seed, first) in copies.items()},
        draw, bars=work.bars, phase="images without a word", unit="image",
        size=lambda sampled: len(_strongest(explanations[sampled.index])), whole=whole,
    )  # fmt: skip
    return {
        sampled.index: tuple(
            RedrawnImage(**each | {"nearest": NearestImage(**each["nearest"])}) for each in drawn
        )
        for sampled, drawn in stored.items()
    }


def _strongest(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was stored of the words whose absence changes the prediction most."""
    return values["occlusions"][:REDRAWN]


def _outcome(before: NearestImage, after: NearestImage) -> Outcome:
    """Return whether the training image that came back before still does."""
    if not after.copied:
        return "unknown" if after.copied is None else "gone"
    # One drawing may stand among the training images several times, under one caption.
    same = after.path == before.path or after.caption == before.caption
    return "back" if same else "another"
