"""Images of audited prompts: which prompts get some, and the maps laid over them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import demo
from ...shared.drawing.heatmap import overlay_map
from ...shared.files.images import read_image, save_png
from ...shared.wording import counted
from ..common.copies import OTHERS
from ..common.job import content_key
from ..common.measure import complete
from ..common.subject import Facts
from .config import AuditConfig
from .inputs import read_controls
from .work import Scored, Work

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...shared.models.adapter import PipelineDenoiser

PROMPTS = OTHERS + 5
"""Prompts that are drawn where copies are to be told, at least: some may mean the same image."""
PLACES = 8192
"""Places of all latents of a pass, at most, while images are drawn."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A prompt that gets images."""

    index: int
    """Of the prompt."""
    prompt: str
    seeds: tuple[int, ...]

    @property
    def paths(self) -> dict[int, str]:
        """Return where the image of each seed stands, relative to the output folder."""
        return {seed: f"images/{self.index:05d}-seed{seed}.png" for seed in self.seeds}


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image to draw."""

    prompt: str
    seed: int
    path: str
    """Relative to the output folder."""


def plan_images(config: AuditConfig, prompts: Sequence[str], scored: Scored) -> list[Sampled]:
    """Choose the prompts that get images: the highest flagged, and some of the rest, evenly spread.

    The choice depends on scores and settings alone, so that a continued job makes the same. The
    seeds that a prompt was scored with come first.
    """
    if config.images_per_prompt == 0:
        return []
    flagged = scored.flagged[: config.flagged_pictured]
    rest = [i for i, flag in enumerate(scored.flags) if not flag]
    rest.sort(key=lambda i: (-scored.scores[i], i))
    wanted = min(config.sample, len(rest))
    # From the middle of equal parts of the ranking, so that neither end is favoured.
    others = [rest[(2 * k + 1) * len(rest) // (2 * wanted)] for k in range(wanted)]
    first = config.detection.seeds
    more = (seed for seed in count() if seed not in first)
    seeds = tuple(islice((*first, *islice(more, config.images_per_prompt)),
                         config.images_per_prompt))  # fmt: skip
    chosen = [(i, seeds) for i in flagged] + [(i, seeds[:1]) for i in others]
    return [Sampled(index=i, prompt=prompts[i], seeds=s) for i, s in chosen]


def first_images(plan: Sequence[Sampled]) -> list[Sampled]:
    """Return the plan with the first image of each prompt alone."""
    return [replace(sampled, seeds=sampled.seeds[:1]) for sampled in plan]


def shots_of(plan: Sequence[Sampled]) -> list[Shot]:
    """Return the images of a plan: the first of every prompt, then what further seeds give."""
    shots = [(sampled, place, seed) for sampled in plan for place, seed in enumerate(sampled.seeds)]
    return [Shot(prompt=sampled.prompt, seed=seed, path=sampled.paths[seed])
            for sampled, place, seed in sorted(shots, key=lambda shot: shot[1] > 0)]  # fmt: skip


def at_once(facts: Facts) -> int:
    """Return how many images are drawn at once: small ones fill a pass, of large ones two do."""
    places = math.prod(facts.info.latent_shape[1:])
    return max(2, min(facts.rows, PLACES // places) // 2)


def draw(work: Work, shots: Sequence[Shot], together: int, phase: str) -> None:
    """Draw images into the job's folder; those that are drawn at once are stored together.

    Args:
        work: Of the job.
        shots: The images; they are cut into parts as if none was drawn.
        together: From `at_once`.
        phase: Label of the bar.
    """
    folder, config = work.job.folder, work.config
    parts = [tuple(shots[i : i + together]) for i in range(0, len(shots), together)]

    def draw_part(part: tuple[Shot, ...]) -> dict[str, Any]:
        images = work.subject.denoiser.generate(
            [shot.prompt for shot in part], [shot.seed for shot in part],
            steps=config.generation_steps, cond_scale=config.detection.cond_scale,
        )  # fmt: skip
        for shot, image in zip(part, images, strict=True):
            save_png(image, folder / shot.path)
        return {"files": [shot.path for shot in part]}

    complete(
        work.job.journal("images"),
        {part: content_key(work.job.key, [asdict(shot) for shot in part]) for part in parts},
        draw_part, bars=work.bars, phase=phase, unit="image", size=len,
        whole=lambda stored: all_exist(folder, stored["files"]),
    )  # fmt: skip


def draw_others(
    work: Work, drawn: Sequence[str], together: int = 2
) -> tuple[list[tuple[str, str]], list[str]]:
    """Draw one image of so many other prompts that a verdict on copies has enough of them.

    Audited prompts are taken first, evenly spread, then controls.

    Returns:
        Pairs of prompt and path in the job's folder, and what a report has to tell.
    """
    missing = PROMPTS - len(set(drawn))
    if missing <= 0:
        return [], []
    rest = [prompt for prompt in work.inputs.prompts.prompts if prompt not in set(drawn)]
    chosen = rest[:: max(1, len(rest) // missing)][:missing]
    audited = len(chosen)
    if audited < missing:
        is_demo = work.config.model in demo.BUNDLED
        controls = work.inputs.controls or read_controls(work.config.controls, is_demo=is_demo)[1]
        taken = {*drawn, *chosen}
        chosen += [text for text in controls if text not in taken][: missing - audited]
    paths = {prompt: f"images/other-{i:05d}.png" for i, prompt in enumerate(chosen)}

    shots = [Shot(prompt=prompt, seed=0, path=path) for prompt, path in paths.items()]
    draw(work, shots, together, "other prompts")
    return list(paths.items()), [
        f"To tell copies, {counted(len(chosen), 'image', 'images')} of other prompts were drawn as "
        f"well: {audited} of audited ones, {len(chosen) - audited} of controls. Where controls "
        "show other things than the audited prompts, too much counts as a copy."
    ]


def sample(
    denoiser: "PipelineDenoiser", config: AuditConfig, prompt: str, folder: Path,
    paths: Mapping[int, str],
) -> "list[Image]":  # fmt: skip
    """Sample a prompt once a seed; write the images to `paths` in `folder` and return them."""
    images = denoiser.generate(
        [prompt] * len(paths), list(paths), steps=config.generation_steps,
        cond_scale=config.detection.cond_scale,
    )  # fmt: skip
    for path, image in zip(paths.values(), images, strict=True):
        save_png(image, folder / path)
    return images


def all_exist(folder: Path, names: Iterable[str]) -> bool:
    """Return whether all files stand in the folder."""
    return all((folder / name).is_file() for name in names)


def draw_maps(
    folder: Path, plan: Sequence[Sampled], explanations: Mapping[int, dict[str, Any]]
) -> dict[int, str]:
    """Lay each score-difference map over the prompt's first image; return the paths by index.

    The map is of the first measured seed, which is also the first image's.
    """
    paths = {}
    for sampled in plan:
        first = sampled.paths[sampled.seeds[0]]
        if sampled.index not in explanations or not (folder / first).is_file():
            continue
        paths[sampled.index] = name = f"images/{sampled.index:05d}-map.png"
        if not (folder / name).is_file():
            image = read_image(folder / first)
            save_png(overlay_map(image, explanations[sampled.index]["map"]), folder / name)
    return paths
