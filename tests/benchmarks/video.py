"""Content and motion of a video model with known truth: ``make bench NAME=video``.

    ARGS="--only detection"    one of the parts: detection, copies

*detection*: planted contents and planted motions against held-out captions, each by its own part of
the score, by the other part, and by the whole magnitude. *copies*: which planted clips come back by
the audit's rule of clips, and what it says of clips that copy nothing.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from bench_models import FOLDER, clips
from figures import Figure, command_of, record, share_of
from scores.ranking import Draw, flagged, ranked
from unmemorize.audit.lora.clips import judge_clips
from unmemorize.audit.lora.rule import COPY, Roles
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.score.config import CLIP_PARTS, DetectionConfig
from unmemorize.shared.score.detection import detect

STEPS, COND_SCALE = 20, 5.0
OF_PLANTED, OF_LEARNT = 2, 40
"""Training clips to compare with: of each planted caption, and one each of so many others."""
UNPLANTED = 40
"""Held-out captions of which a clip is drawn."""
AT_ONCE = 8

Figures = dict[str, Figure]


@dataclass
class Case:
    """The model and the truth about it."""

    folder: Path

    @cached_property
    def denoiser(self) -> PipelineDenoiser:
        """The model, as the product reads it."""
        if not (self.folder / "model").is_dir():
            raise FileNotFoundError(
                f"{self.folder / 'model'} is missing: `make bench-models ARGS=video` makes it."
            )
        return load_denoiser(self.folder / "model", resolution=clips.SIDE, frames=clips.FRAMES)

    @cached_property
    def captions(self) -> list[clips.Caption]:
        """All captions."""
        return clips.load_captions(self.folder / "captions.json")

    def of(self, group: str) -> list[int]:
        """Return the captions of a group by index."""
        return [i for i, caption in enumerate(self.captions) if caption.group == group]


def measure_detection(case: Case) -> Figures:
    """Return how well each part of the score finds what was planted, and nothing else.

    Half of the held-out captions are controls, the others negatives.
    """
    held_out = case.of("held_out")
    controls, negatives = held_out[::2], held_out[1::2]
    found = detect(case.denoiser, [c.text for c in case.captions], DetectionConfig())
    scores = {"magnitude": found.traces, "content": found.clips.content,
              "motion": found.clips.motion}  # fmt: skip
    draws = {name: [Draw(each.mean((1, 2)), each.mean((1, 2))[controls])]
             for name, each in scores.items()}  # fmt: skip
    figures: Figures = {}
    for part in CLIP_PARTS:
        planted, start = case.of(part), f"detection.video.{part}"
        for name, drawn in draws.items():
            key = start if name == part else f"rivals.{start}.by_{name}"
            for figure, value in ranked(drawn, planted, negatives).items():
                figures[f"{key}.{figure}"] = value
        figures[f"{start}.flagged"] = flagged(draws[part], planted)
        figures[f"{start}.false_positive_rate"] = flagged(draws[part], negatives)
        other = CLIP_PARTS[part == CLIP_PARTS[0]]
        figures[f"grid.{start}.flagged_by_{other}"] = flagged(draws[other], planted)
    share = (scores["motion"].mean((1, 2)) / scores["magnitude"].mean((1, 2))).double()
    told = ranked([Draw(share)], case.of("motion"), case.of("content"))
    figures["detection.video.told_apart.auc"] = told["auc"]
    return figures


def measure_copies(case: Case) -> Figures:
    """Return which planted clips come back, and what the rule says of clips that copy nothing."""
    rng = np.random.default_rng(0)
    planted = [*case.of("content"), *case.of("motion")]
    unplanted = [case.of("held_out")[i] for i in rng.permutation(len(case.of("held_out")))]
    unplanted = unplanted[:UNPLANTED]
    training: list[clips.Clip] = []
    every = clips.training(case.captions)
    for index in [*planted, *case.of("learnt")[:OF_LEARNT]]:
        own = [clip for clip in every if clip.caption == index]
        training += own[: OF_PLANTED if index in planted else 1]
    asked = [*planted, *unplanted]
    made = drawn(case, [case.captions[i].text for i in asked])
    fresh = as_clips(clips.draw(case.captions, clips.fresh(case.captions)))
    of_caption = {index: frozenset(i for i, clip in enumerate(training) if clip.caption == index)
                  for index in {clip.caption for clip in training}}  # fmt: skip
    roles = Roles(
        own=[of_caption.get(index, frozenset()) for index in asked] + [frozenset()] * len(fresh),
        on=[True] * len(asked) + [False] * len(fresh), plain=[True] * (len(asked) + len(fresh)),
        groups=[of_caption[clip.caption] for clip in training],
    )  # fmt: skip
    judged = judge_clips(
        [*made, *fresh], as_clips(clips.draw(case.captions, training)), roles
    )  # fmt: skip
    figures: Figures = {}
    for part in CLIP_PARTS:
        copied = getattr(judged, part).marks == COPY
        own = [bool(copied[g, sorted(roles.own[g])].any()) for g in range(len(planted))]
        start = f"copies.video.{part}"
        for group in CLIP_PARTS:
            hits = [own[planted.index(index)] for index in case.of(group)]
            key = start + ".recall" if group == part else f"grid.{start}.of_planted_{group}"
            figures[key] = share_of(hits)
        rest = copied[len(planted) :].any(1).tolist()
        figures[f"{start}.false_positive_rate"] = share_of(rest[: len(unplanted)])
        figures[f"grid.{start}.of_fresh"] = share_of(rest[len(unplanted) :])
    return figures


@torch.no_grad()
def drawn(case: Case, texts: Sequence[str]) -> list[torch.Tensor]:
    """Return a clip of each caption, [frame 3 32 32] in 0..1, by the pipeline's own call."""
    pipeline, found = case.denoiser.pipeline, []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(texts), AT_ONCE):
        part = list(texts[start : start + AT_ONCE])
        seeds = [torch.Generator("cpu").manual_seed(start + k) for k in range(len(part))]
        found += pipeline(
            prompt=part, negative_prompt=[""] * len(part), height=clips.SIDE, width=clips.SIDE,
            num_frames=clips.FRAMES, num_inference_steps=STEPS, guidance_scale=COND_SCALE,
            generator=seeds, output_type="pt",
        ).frames  # fmt: skip
    return [clip.float().clamp(0, 1) for clip in found]


def as_clips(moving: np.ndarray) -> list[torch.Tensor]:
    """Return [frame 3 32 32] in 0..1 of each of clips [clip frame 32 32 3] uint8."""
    return list(torch.from_numpy(moving).movedim(-1, 2).float() / 255)


PARTS = {"detection": measure_detection, "copies": measure_copies}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen parts; each part's figures are written at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, default=FOLDER / "video", help="the model's folder")
    parser.add_argument("--output", type=Path, help="takes the figures, for a trial")
    args = parser.parse_args(argv)
    case = Case(args.work)
    for part in args.only:
        record(PARTS[part](case), command_of("video", argv), output=args.output)


if __name__ == "__main__":
    main()
