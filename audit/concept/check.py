"""The concept audit: does a LoRA draw a concept, however it is asked, against its base model?"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...shared.files.images import read_image, save_png
from ...shared.files.storage import write_text
from ...shared.files.tensors import TensorFolder
from ...shared.files.weights import file_sha256
from ...shared.training.concept.adapter import ConceptAdapter, ConceptSwitch
from ...shared.training.concept.gain import gains, line_above, without_names
from ...shared.training.concept.images import captioned_images
from ...shared.training.concept.learnt_word import WORD
from ..common.job import Job, content_key, open_job
from ..common.measure import Bars, complete, silent
from ..common.result import dumps, versions
from ..common.subject import Subject
from .appearance import WAYS, Appearance, Asked, Drawn, Way
from .check_page import render_check
from .inversion import reading_word

Mode = Literal["on", "off", "adapter"]
"""With the LoRA, without it, or with the concept's adapter in its place."""
PAGE, RESULTS = "report.html", "audit.json"
STRENGTH = 3.0
"""Of the adapter when it draws: taught shortly, it tints images at 1 and draws its concept from 2
on (seen on the demo with a frame)."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is asked, and how images are drawn."""

    prompts: tuple[str, ...]
    """Ordinary ones; each is drawn once a way and mode, from a noise of its own."""
    description: str = ""
    """What the concept looks like, in words that do not name it; empty for none."""
    images: Path | None = None
    """Folder of images of the concept, from which a word for it is learnt; None for none."""
    word_steps: int = 500
    """Steps in which the word is learnt."""
    generation_steps: int = 20
    """Sampling steps of an image."""
    cond_scale: float = 5.0
    """Guidance."""
    together: int = 4
    """Images that are drawn at once; another number may move their last digits."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image to draw."""

    way: Way
    mode: Mode
    prompt: str
    bare: str
    """The prompt without what asks for the concept, by which the image is judged."""
    seed: int

    @property
    def path(self) -> str:
        """Relative to the output folder."""
        return f"images/{self.way}-{self.mode}-{self.seed:03d}.png"


def check_concept(
    subject: Subject,
    concept: Path,
    config: CheckConfig,
    *,
    output: Path,
    overwrite: bool = False,
    bars: Bars = silent,
) -> Appearance:
    """Draw with the LoRA and without it, judge every image, and write page and results.

    Args:
        subject: The base model with the LoRA.
        concept: File of the concept, learnt on the base model.
        config: What is asked.
        output: Folder to write. The same job continues there.
        overwrite: Replace another job in it.
        bars: Makes progress bars.

    Raises:
        ModelError: The file is no concept of this model.
        NotEnoughImages: There are too few prompts for a line.
    """
    adapter = ConceptAdapter.load(concept)
    images = [path for path, _ in captioned_images(config.images)] if config.images else []
    if images and not adapter.account["model"]["network"].startswith("UNet"):
        raise ValueError(
            "A word is learnt for SD 1, SD 2 and SDXL, whose layers read text states, and the "
            f"concept is of a {adapter.account['model']['network']}: leave --concept-images out."
        )
    plan = shots(config, adapter)
    asked = asdict(config) | {"images": content_key([file_sha256(path) for path in images])}
    identity = {
        "concept": file_sha256(concept), "model and LoRA": subject.fingerprint,
        "dtype": subject.dtype, "resolution": subject.resolution, "asked": asked,
        **{f"version of {name}": number for name, number in versions().items()},
    }  # fmt: skip
    with open_job(output, identity, overwrite=overwrite) as job:
        found = _draw(subject, adapter, plan, config, images, job, bars)
        controls = [found[s] for s in plan if (s.way, s.mode) == ("unasked", "off")]
        line = line_above(torch.tensor(controls, dtype=torch.float64))

        def drawn(way: Way, mode: Mode) -> tuple[Drawn, ...]:
            return tuple(
                Drawn(path=s.path, prompt=s.prompt, seed=s.seed, gain=found[s],
                      shown=found[s] > line)
                for s in plan if (s.way, s.mode) == (way, mode)
            )  # fmt: skip

        ways = [Asked(way=way, on=drawn(way, "on"), off=drawn(way, "off")) for way in WAYS]
        positive = [image for way in WAYS for image in drawn(way, "adapter")]
        result = Appearance(
            asked=tuple(each for each in ways if each.on), positive=tuple(positive), line=line,
            controls=len(controls), concept=adapter, file=concept.name,
            lora=subject.lora.name if subject.lora else "", model=subject.name,
            description=config.description, folder=output,
        )  # fmt: skip
        write_text(output / RESULTS, dumps(document(result), indent=1) + "\n")
        write_text(output / PAGE, render_check(result))
    return result


def shots(config: CheckConfig, adapter: ConceptAdapter) -> list[Shot]:
    """Return every image: all ways with the LoRA and without, one way with the adapter."""
    ends: dict[Way, str | None] = {
        "by_name": adapter.names[0] if adapter.names else None,
        "by_description": config.description or None,
        "unasked": "",
        "by_learnt_word": WORD if config.images else None,
    }
    bare = [without_names(prompt, adapter.names) for prompt in config.prompts]
    planned: list[Shot] = []
    for way, end in ends.items():
        if end is None:
            continue
        # Asked as the adapter was taught to draw it: by its name where it has one.
        modes: tuple[Mode, ...] = ("on", "off", "adapter")
        own = way == ("by_name" if adapter.names else "unasked")
        planned += [
            Shot(way=way, mode=mode, prompt=", ".join(filter(None, (text, end))), bare=text,
                 seed=seed)
            for mode in modes[: 3 if own else 2]
            for seed, text in enumerate(bare)
        ]  # fmt: skip
    return planned


def _draw(
    subject: Subject,
    adapter: ConceptAdapter,
    plan: Sequence[Shot],
    config: CheckConfig,
    images: Sequence[Path],
    job: Job,
    bars: Bars,
) -> dict[Shot, float]:
    """Draw and judge every image; what is known is not drawn again."""
    alike: dict[tuple[Way, Mode], list[Shot]] = {}
    for shot in plan:
        alike.setdefault((shot.way, shot.mode), []).append(shot)
    parts = [
        tuple(some[start : start + config.together])
        for some in alike.values()
        for start in range(0, len(some), config.together)
    ]
    switches: list[ConceptSwitch] = []
    words = TensorFolder(job.folder / "journal" / "words")

    def draw(part: tuple[Shot, ...]) -> list[float]:
        denoiser = subject.denoiser
        if not switches:
            network = denoiser.family.network
            switches.extend(ConceptSwitch(network, adapter, each) for each in (1.0, STRENGTH))
        judging, drawing = switches
        way, mode = part[0].way, part[0].mode
        with ExitStack() as entered:
            if mode != "on":
                entered.enter_context(denoiser.lora_disabled())
            if mode == "adapter":
                entered.enter_context(drawing.on())
            if way == "by_learnt_word":
                entered.enter_context(reading_word(
                    denoiser, images, words, int(mode == "on"), steps=config.word_steps, bars=bars
                ))  # fmt: skip
            drawn = denoiser.generate(
                [s.prompt for s in part], [s.seed for s in part], steps=config.generation_steps,
                cond_scale=config.cond_scale,
            )  # fmt: skip
        for shot, image in zip(part, drawn, strict=True):
            save_png(image, job.folder / shot.path)
        # As they are kept: a later look at the files gives the same numbers.
        latents = denoiser.encode_images([read_image(job.folder / s.path) for s in part])
        with denoiser.lora_disabled():
            return gains(denoiser, judging.on, latents, [s.bare for s in part]).tolist()

    done = complete(
        job.journal("concept"), {part: content_key(job.key, [s.path for s in part])
                                 for part in parts},
        draw, bars=bars, phase="images", unit="image", size=len,
    )  # fmt: skip
    return {shot: gain for part in parts for shot, gain in zip(part, done[part], strict=True)}


def document(result: Appearance) -> dict[str, Any]:
    """Return the one JSON document of the audit."""
    ways = {
        each.way: {
            "on": each.counts[0], "off": each.counts[1], "images": len(each.on),
            "low": each.interval[0], "high": each.interval[1], "p_value": each.p_value,
            "appears": each.appears and result.can_judge,
            "gains": {"on": [i.gain for i in each.on], "off": [i.gain for i in each.off]},
        }
        for each in result.asked
    }  # fmt: skip
    return {
        "schema_version": 1, "headline": result.headline, "remarks": list(result.remarks),
        "appears": result.appears, "can_judge": result.can_judge, "ways": ways,
        "line": result.line, "controls": result.controls,
        "positive_control": {"recognised": result.recognised, "images": len(result.positive)},
        "lora": result.lora, "model": result.model, "concept": dict(result.concept.account),
    }  # fmt: skip
