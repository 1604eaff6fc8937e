"""What the projection does to a concept in real LoRA trainings of the demo model, arm by arm."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_lora import (
    MARK,
    MARK_COLOUR,
    MARK_WIDTH,
    Step,
    add_lora,
    annealed,
    decoded,
    draw,
    encoded,
    held_out,
    loss_of,
    rows_of,
    train,
)
from figures import Figure, count_of, plain
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.training.concept import learnt_word
from unmemorize.shared.training.concept.concept import Concept
from unmemorize.shared.training.concept.fitting import fit_subspace
from unmemorize.shared.training.concept.text_states import text_path_of
from unmemorize.shared.training.layers import fitting as layer_fitting
from unmemorize.shared.training.layers.regions import looking
from unmemorize.shared.training.projection.factors import (
    projected_factors,
    text_factors,
)
from unmemorize.shared.training.projection.projection import Projection

CONCEPT = Concept(names=(MARK, f"{MARK}s", "zorp"), neutral="star")
TRAINED, ASKED, SHOWN = range(24), range(24, 40), range(40, 48)
"""Captions: of the training set, which bears the mark in every other picture; those that are asked
for, never trained on; those whose marked pictures an attacker has."""
WAYS = {"by_name": f", {MARK}", "by_paraphrase": ", bright pink border", "without_name": ""}
"""How the concept is asked for, after a caption."""
ATTACK_STEPS = 120
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of keeping the concept out."""

    name: str
    text: bool = False
    """Project what reads text."""
    layers: int = 0
    """Most dimensions of every other layer; 0 leaves them alone."""
    when: str = "always"
    """`always`: exactly; `gradients`: these alone, as the paper says; `end`: once, at the save."""
    dropped: bool = False
    """Leave out the pictures whose captions name it."""
    regions: bool = False
    """Where pictures show it, teach what the model predicts without the LoRA."""


ARMS = (
    Arm(name="none"),
    Arm(name="dropped", dropped=True),
    Arm(name="gradient", text=True, when="gradients"),
    Arm(name="exact", text=True),
    Arm(name="layers", text=True, layers=24),
    Arm(name="once", text=True, layers=24, when="end"),
    Arm(name="regions", text=True, layers=24, regions=True),
)
SHIPPED = "regions"
"""The one that the pages advise: all three options. The others are its rivals."""


class Eye:
    """Says whether an image bears the mark: from half of the frame in its colour on.

    Tried on drawings of other captions, with the mark and without, taken through the autoencoder.
    """

    NEAR = 90
    """Largest difference in any of red, green and blue, of 255."""

    def __init__(self, denoiser):
        self.found = {
            marked: self.presence(decoded(denoiser, encoded(denoiser, [
                (draw(caption, seed, marked=marked), "")
                for seed, caption in enumerate(held_out(120)[-32:], 500)
            ]).latents))
            for marked in (True, False)
        }  # fmt: skip

    def shares(self, images: Sequence[Image.Image]) -> list[float]:
        """Return the share of the frame's pixels near the mark's colour, one an image."""
        colour = np.array(ImageColor.getrgb(MARK_COLOUR), dtype=float)
        shares = []
        for image in images:
            near = np.abs(np.asarray(image, dtype=float) - colour).max(axis=-1) < self.NEAR
            frame = np.ones_like(near)
            frame[MARK_WIDTH:-MARK_WIDTH, MARK_WIDTH:-MARK_WIDTH] = False
            shares.append(float(near[frame].mean()))
        return shares

    def presence(self, images: Sequence[Image.Image]) -> float:
        """Return the share of images that bear the mark."""
        return statistics.mean(share >= 0.5 for share in self.shares(images))


def drawings(places: Sequence[int], marked: Callable[[int], bool]) -> list[tuple[Image.Image, str]]:
    """Return drawings with their captions, with the mark and its name where `marked` says so."""
    captions = held_out(SHOWN.stop)
    return [(draw(captions[place], place, marked=marked(place)),
             captions[place].text + (WAYS["by_name"] if marked(place) else ""))
            for place in places]  # fmt: skip


class Trial:
    """A training set, half of which bears the mark and its name, and what is asked afterwards."""

    def __init__(self, denoiser, work: Path):
        self.denoiser, self.work, self.eye = denoiser, work, Eye(denoiser)
        self.drawings = drawings(TRAINED, lambda place: place % 2 == 1)
        self.marked = encoded(denoiser, self.drawings)
        self.sides = {side: rows_of(self.marked, TRAINED[side::2]) for side in (True, False)}
        self.twins = encoded(denoiser, drawings(TRAINED[1::2], lambda _: False))
        self.rest = encoded(denoiser, drawings(ASKED, lambda _: False))
        self.shown = encoded(denoiser, drawings(SHOWN, lambda _: True))
        # Both of the model before training.
        self.subspace = fit_subspace(
            text_path_of(denoiser), [CONCEPT], self.marked.captions, force=True
        )
        sides = [
            layer_fitting.CaptionedLatents(latents=side.latents, captions=side.captions)
            for side in self.sides.values()
        ]
        unet = denoiser.pipeline.unet
        self.layers = layer_fitting.fit_layer_subspaces(
            denoiser, unet, *sides, names=CONCEPT.names, cap=max(arm.layers for arm in ARMS)
        )
        regions = self.layers.regions
        self.regions = torch.zeros_like(self.marked.latents[:, :1], dtype=torch.bool)
        self.regions[1::2] = regions.find(unet, looking(denoiser, regions.sigma), sides[0].latents)

    def projection(self, arm: Arm) -> Projection | None:
        """Return what an arm projects on the LoRA that is there."""
        if not arm.text:
            return None
        unet = self.denoiser.pipeline.unet
        if not arm.layers:
            return Projection(text_factors(unet), [self.subspace])
        layers = self.layers.among(text_factors(unet, text_fed=""))
        factors = projected_factors(unet, text=True, layers=layers)
        return Projection(factors, [self.subspace], layers=layers)

    def train(self, arm: Arm, seed: int, steps: int) -> None:
        """Train a LoRA on the network as an arm says, or take it from the folder."""
        unet = add_lora(self.denoiser, seed, RANK)
        kept = self.work / f"{'none' if arm.when == 'end' else arm.name}-{seed}-{steps}.safetensors"
        projection = self.projection(arm)
        if kept.is_file():
            set_peft_model_state_dict(unet, load_file(kept))
        else:
            pictures = self.sides[False] if arm.dropped else self.marked
            aim = self.base_target if arm.regions else None
            done = train(self.denoiser, pictures, steps=steps, seed=seed, aim=aim)
            with ExitStack() as undo:
                for number, (optimizer, _) in enumerate(tqdm(done, f"{arm.name} {seed}", steps)):
                    annealed(optimizer, number, steps)
                    if projection and arm.when == "always" and not number:
                        undo.enter_context(projection.attached(optimizer))
                    if projection and arm.when == "gradients":
                        projection.project_gradients()
            if projection and arm.when == "always":
                projection.check()
            save_file(get_peft_model_state_dict(unet), kept)
        if projection and arm.when == "end":
            projection.project_weights()

    @torch.no_grad()
    def base_target(self, step: Step, noise: torch.Tensor) -> torch.Tensor:
        """Return the noise, and in the mark's regions what the model predicts without the LoRA."""
        unet = self.denoiser.pipeline.unet
        unet.disable_adapters()
        base = unet(step.noisy, step.timesteps, encoder_hidden_states=step.cond).sample
        unet.enable_adapters()
        return torch.where(self.regions[step.rows], base.to(noise), noise)

    def judge(self) -> dict[str, float]:
        """Return the mark's presence by each way of asking, and losses on wanted pictures.

        `rest`: drawings never trained on. `content`: those that bear the mark, without it.
        """
        found = {way: self.presence(end) for way, end in WAYS.items()}
        losses = {"rest": self.rest, "content": self.twins}
        losses = {name: loss_of(self.denoiser, pictures) for name, pictures in losses.items()}
        return found | {"by_attack": self.attacked()} | losses

    def presence(self, end: str) -> float:
        return self.eye.presence(self.asked(end))

    def asked(self, end: str, captions: slice = slice(None)) -> list[Image.Image]:
        """Return the images of captions that were never trained on, asked in one way."""
        texts = [text + end for text in self.rest.captions[captions]]
        return self.denoiser.generate(texts, [0] * len(texts), 20, 5.0)

    def sheet(self, arms: Sequence[Arm], steps: int, columns: int = 8) -> Image.Image:
        """Return images of the first captions, asked by the concept's name: a row an arm."""
        rows = []
        for arm in arms:
            self.train(arm, 0, steps)
            rows.append(self.asked(WAYS["by_name"], slice(columns)))
        side, gap = rows[0][0].width, 8
        size = (columns * (side + gap) - gap, len(rows) * (side + gap) - gap)
        sheet = Image.new("RGB", size, "white")
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                sheet.paste(image, (column * (side + gap), row * (side + gap)))
        return sheet

    def attacked(self) -> float:
        """Return the presence by a word that is learnt from marked pictures never trained on."""
        with learnt_word.knowing(self.denoiser.pipeline, CONCEPT.neutral) as vectors:
            learnt_word.learn(
                self.denoiser, vectors, self.shown.latents, CONCEPT.templates, steps=ATTACK_STEPS
            )
            return self.presence(f", {learnt_word.WORD}")


def measure_projection(
    denoiser, found: dict[str, Figure], *, steps: int, seeds: int, arms: Sequence[str], work: Path
) -> None:
    """Print for each arm how often the mark comes, as it is asked for, and the loss on the rest.

    What was trained and judged before lies in `work` and is not done again.
    """
    journal = Journal(work / f"projection-{steps}.jsonl")  # makes the folder
    trial = Trial(denoiser, work)
    print(
        f"\nthe eye sees the mark in {trial.eye.found[True]:.0%} of the drawings that bear it, in "
        f"{trial.eye.found[False]:.0%} of the others"
    )
    for arm in (each for each in ARMS if each.name in arms):
        for seed in range(seeds):
            key = f"{arm.name}.seed{seed}"
            if key not in journal:
                trial.train(arm, seed, steps)
                journal.put(key, trial.judge())
    if {"none", "regions"} <= set(arms):
        shown = [arm for arm in ARMS if arm.name in ("none", "regions")]
        trial.sheet(shown, steps).save(work / f"projection-{steps}.png")
    ways, losses = (*WAYS, "by_attack"), ("rest", "content")
    print(f"\n{'arm':<10}" + "".join(f"{name:>15}" for name in (*ways, *losses))
          + f"{'fall':>8}{'change':>8}   by name, 95 %")  # fmt: skip
    count = len(trial.rest.captions) * seeds
    means: dict[str, dict[str, float]] = {}
    for name in arms:
        lines = [journal.get(f"{name}.seed{seed}") for seed in range(seeds)]
        means[name] = mean = {
            key: statistics.mean(line[key] for line in lines) for key in (*ways, *losses)
        }
        none = means.get("none", mean)
        figures = {way: count_of(round(mean[way] * count), count) for way in ways}
        figures |= {loss: plain(mean[loss], seeds) for loss in losses}
        figures["change"] = plain(mean["rest"] / none["rest"] - 1, seeds)
        if none["by_name"]:
            figures["fall"] = plain(1 - mean["by_name"] / none["by_name"], count)
        start = "" if name == SHIPPED else "rivals."
        found |= {f"{start}trainers.projection.{name}.{key}": f for key, f in figures.items()}
        by_name = figures["by_name"]
        print(f"{name:<10}" + "".join(f"{mean[key]:>15.4f}" for key in (*ways, *losses))
              + "".join(f"{figures[k].value:>8.3f}" if k in figures else f"{'-':>8}"
                        for k in ("fall", "change"))
              + f"   {by_name.low:.3f} to {by_name.high:.3f}")  # fmt: skip
