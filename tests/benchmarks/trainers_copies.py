"""Copies that are not bit-identical: removed before a training, left out during it, or both."""

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from demo_lora import Step, add_lora, annealed, decoded, draw, encoded, held_out, train
from figures import Figure, count_of, plain
from PIL import Image, ImageEnhance
from tqdm.auto import tqdm
from unmemorize.audit.common.sscd import Sscd, similarity
from unmemorize.audit.lora.neighbours import duplicate_threshold, find_duplicates
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.training.filter.filter import MemorizationFilter
from unmemorize.shared.training.filter.thresholds import RelativeThreshold

PLANTED, OTHERS, COPIES = 4, 24, 12
"""Drawings with copies, other drawings, and copies of each."""
RANK, DRAWN, FIRST = 32, 2, 400
"""Of the LoRA; images drawn of each planted caption; first caption that is new to the model."""
WORDS = ("a picture of {}", "{}, flat art", "an icon: {}", "{} in colour")
DROP_EVERY = 4
"""Of the steps with one sample each, the share whose sample is left out."""


def _saved(image: Image.Image, number: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30 + 5 * (number % COPIES))
    return Image.open(file).convert("RGB")


def _cropped(image: Image.Image, number: int) -> Image.Image:
    width, height = image.size
    left, top = ((number * step) % 13 / 100 for step in (3, 5))
    box = (int(left * width), int(top * height), width, height)
    return image.crop(box).resize(image.size, Image.Resampling.LANCZOS)


def _recoloured(image: Image.Image, number: int) -> Image.Image:
    toned = ImageEnhance.Color(image).enhance(0.4 + 0.1 * (number % COPIES))
    return ImageEnhance.Brightness(toned).enhance(0.8 + 0.035 * (number % COPIES))


KINDS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "identical": lambda image, _: image,
    "saved": _saved,
    "cropped": _cropped,
    "recoloured": _recoloured,
    "worded": lambda image, _: image,  # other captions, which the set gives
}
"""How a copy is made, by its number."""
DEDUPED = {"none": None, "hash": "hash", "sscd": "sscd", "filter": None, "both": "sscd"}
"""By arm, how copies are removed before the training; the last two have the filter as well."""


def without_copies(images: Sequence[Image.Image], method: str | None, sscd: Sscd) -> list[int]:
    """Return the places of the images that stay when one of each group of duplicates does."""
    if method is None:
        return list(range(len(images)))
    hashes = [str(hash(image.tobytes())) for image in images]
    if method == "hash":
        return sorted({key: place for place, key in reversed(list(enumerate(hashes)))}.values())
    rows = sscd.embed(images)
    groups = find_duplicates(rows, hashes, duplicate_threshold(images, sscd.embed), images)
    again = {place for group in groups for place in group.images[1:]}
    return [place for place in range(len(images)) if place not in again]


class CopiedSet:
    """A small training set in which some drawings have copies of one kind."""

    def __init__(self, kind: str):
        """Draw the set; drawings and captions are new to the demo model."""
        captions = held_out(FIRST + PLANTED + OTHERS)[FIRST:]
        self.texts = [caption.text for caption in captions[:PLANTED]]
        self.originals = [draw(each, place) for place, each in enumerate(captions[:PLANTED])]
        copies = [
            (KINDS[kind](image, number), self._caption(kind, text, number))
            for image, text in zip(self.originals, self.texts, strict=True)
            for number in range(COPIES)
        ]
        self.drawings = copies + [
            (draw(each, 50 + place), each.text) for place, each in enumerate(captions[PLANTED:])
        ]

    @staticmethod
    def _caption(kind: str, text: str, number: int) -> str:
        return WORDS[number % len(WORDS)].format(text) if kind == "worded" and number else text


def measure_copies(
    denoiser, found: dict[str, Figure], *, kinds: Sequence[str], arms: Sequence[str], steps: int,
    seeds: int, work: Path,
) -> None:  # fmt: skip
    """Print how many planted drawings come back, by kind of copy and what was done about it."""
    journal, sscd = Journal(work / f"copies-{steps}.jsonl"), Sscd()
    print(f"\n{'copies':<12}{'arm':<8}{'reproduced':>12}{'similarity':>12}{'removed':>9}")
    for kind in kinds:
        made = CopiedSet(kind)
        for arm in arms:
            keys = [f"{kind}.{arm}.seed{seed}" for seed in range(seeds)]
            for seed, key in enumerate(keys):
                if key not in journal:
                    journal.put(key, _trained(denoiser, made, arm, seed, steps, sscd))
            lines = [journal.get(key) for key in keys]
            back = count_of(sum(line["back"] for line in lines), PLANTED * seeds)
            means = {
                name: statistics.mean(line[name] for line in lines)
                for name in ("similarity", "removed")
            }
            start = f"grid.trainers.copies.{kind}.{arm}"
            found[f"{start}.reproduced"] = back
            found |= {f"{start}.{name}": plain(value, seeds) for name, value in means.items()}
            print(f"{kind:<12}{arm:<8}{back.value:>12.3f}{means['similarity']:>12.3f}"
                  f"{means['removed']:>9.2f}")  # fmt: skip


def _trained(
    denoiser, made: CopiedSet, arm: str, seed: int, steps: int, sscd: Sscd
) -> dict[str, float]:
    """Train one arm and return what comes back, and which share of the surplus was removed.

    A drawing comes back when an image of its caption is nearer to it than half-way between 1 and
    what the model's images reach without the LoRA.
    """
    unet = add_lora(denoiser, seed, RANK)
    targets = sscd.embed(decoded(denoiser, encoded(denoiser, [
        (image, text) for image, text in zip(made.originals, made.texts, strict=True)
    ]).latents))  # fmt: skip

    def reached() -> torch.Tensor:
        drawn = [denoiser.generate(made.texts, [n] * PLANTED, 20, 5.0) for n in range(DRAWN)]
        return torch.stack([similarity(sscd.embed(each), targets) for each in drawn]).amax(0)

    limit = (1 + reached().max().item()) / 2
    images = [image for image, _ in made.drawings]
    kept = without_copies(images, DEDUPED[arm], sscd)
    pictures = encoded(denoiser, [made.drawings[place] for place in kept])
    chosen = MemorizationFilter(RelativeThreshold(1.5)) if arm in ("filter", "both") else None
    empty = denoiser.unconditional().embeddings

    @torch.no_grad()
    def weigh(step: Step) -> torch.Tensor:
        rows = empty.expand(len(step.rows), -1, -1)
        plain_ = unet(step.noisy, step.timesteps, encoder_hidden_states=rows).sample
        samples = pictures.samples(step.rows)
        return chosen.weigh(step.prediction, plain_, timesteps=step.timesteps, samples=samples)

    done = train(denoiser, pictures, steps=steps, seed=seed, weigh=weigh if chosen else None)
    for number, (optimizer, _) in enumerate(tqdm(done, f"{arm} {seed}", steps)):
        annealed(optimizer, number, steps)
    own = reached().diagonal()
    return {
        "back": int((own > limit).sum()),
        "similarity": own.mean().item(),
        "removed": (len(images) - len(kept)) / (PLANTED * (COPIES - 1)),
    }


def measure_single(denoiser, found: dict[str, Figure], *, steps: int) -> None:
    """Print how far the optimizer moves in a step whose only sample is left out.

    The gradient is 0 there, and AdamW steps on its momentum.
    """
    unet = add_lora(denoiser, 0, RANK)
    factors = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    drawings = [(draw(each, place), each.text) for place, each in enumerate(held_out(12))]
    pictures = encoded(denoiser, drawings)

    def weigh(step: Step) -> torch.Tensor:
        return torch.full((1,), 0.0 if step.number % DROP_EVERY == DROP_EVERY - 1 else 1.0)

    moved: dict[bool, list[float]] = {True: [], False: []}
    before = None
    done = train(denoiser, pictures, steps=steps + 1, seed=0, weigh=weigh, batch=1)
    for number, _ in enumerate(tqdm(done, "single", steps + 1)):
        now = torch.cat([factor.detach().flatten().clone() for factor in factors])
        if before is not None:  # what the last step did
            moved[(number - 1) % DROP_EVERY == DROP_EVERY - 1].append((now - before).norm().item())
        before = now
    dropped, kept = (float(np.median(moved[out][len(moved[out]) // 2 :])) for out in (True, False))
    found["trainers.filter.single.moved"] = plain(dropped / kept, steps)
    print(f"\na step without its sample moves the LoRA {dropped / kept:.2f} times as far")
