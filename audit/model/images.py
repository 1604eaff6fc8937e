"""Images of audited prompts: which prompts get some, and the maps laid over them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from .config import AuditConfig
from .inputs import read_controls
from .work import Scored, Work

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...shared.models.adapter import PipelineDenoiser

PROMPTS = OTHERS + 5
"""Prompts that are drawn where copies are to be told, at least: some may mean the same image."""


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


def draw_images(work: Work, plan: Sequence[Sampled]) -> None:
    """Sample the planned images into the job's folder; each prompt's are stored together."""

    def draw(sampled: Sampled) -> dict[str, Any]:
        sample(work.subject.denoiser, work.config, sampled.prompt, work.job.folder, sampled.paths)
        return {"files": list(sampled.paths.values())}

    complete(
        work.job.journal("images"),
        {sampled: content_key(work.job.key, sampled.prompt, sampled.seeds) for sampled in plan},
        draw, bars=work.bars, phase="images", unit="image",
        size=lambda sampled: len(sampled.seeds),
        whole=lambda stored: all_exist(work.job.folder, stored["files"]),
    )  # fmt: skip


def draw_others(work: Work, drawn: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
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

    def draw(prompt: str) -> dict[str, Any]:
        sample(work.subject.denoiser, work.config, prompt, work.job.folder, {0: paths[prompt]})
        return {"file": paths[prompt]}

    complete(
        work.job.journal("others"),
        {prompt: content_key(work.job.key, prompt, path) for prompt, path in paths.items()},
        draw, bars=work.bars, phase="other prompts", unit="image",
        whole=lambda stored: all_exist(work.job.folder, [stored["file"]]),
    )  # fmt: skip
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
        if sampled.index not in explanations:
            continue
        paths[sampled.index] = name = f"images/{sampled.index:05d}-map.png"
        if not (folder / name).is_file():
            image = read_image(folder / sampled.paths[sampled.seeds[0]])
            save_png(overlay_map(image, explanations[sampled.index]["map"]), folder / name)
    return paths
