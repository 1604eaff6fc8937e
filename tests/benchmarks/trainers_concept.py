"""A prohibited concept crossed with a wanted novelty, in LoRA trainings of the demo, arm by arm.

Of the training's drawings a quarter bears a frame (prohibited), a quarter a band (wanted), a
quarter both, each named in the caption. Neither is known to the base model, so an arm that learns
nothing is told from one that learns the rest. Cells are kept in --work, one a training.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from demo_lora import (
    MARK,
    MARK_WIDTH,
    Pictures,
    Step,
    add_lora,
    annealed,
    draw,
    encoded,
    held_out,
    train,
)
from figures import Figure, count_of, plain
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from trainers_projection import CONCEPT, RANK, WAYS, Eye
from unmemorize.demo.data import RESOLUTION
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.training.concept.adapter import ConceptAdapter
from unmemorize.shared.training.concept.fitting import fit_subspace
from unmemorize.shared.training.concept.images import CaptionedLatents
from unmemorize.shared.training.concept.learning import ConceptImages, learn_concept
from unmemorize.shared.training.concept.text_states import text_path_of
from unmemorize.shared.training.projection.factors import text_factors
from unmemorize.shared.training.projection.projection import Projection
from unmemorize.shared.training.settings import SubtractedConcept, SubtractionSettings
from unmemorize.shared.training.subtracted import SubtractedTraining

BAND, BAND_COLOUR = "quix band", "#12c93a"
BAND_ROWS = 48, 80
"""Pixels from the upper edge between which the band lies."""
TRAINED, ASKED, SHOWN, OTHERS = range(24), range(24, 40), range(40, 56), range(56, 88)
"""Captions: of the training set; those that are asked for; those whose drawings the concept's
adapter is learnt from, with the frame and without. No caption is in two of them."""
ASK = {"by_name": WAYS["by_name"], "paraphrase": WAYS["by_paraphrase"], "unasked": ""}
LEVELS = range(60, 1000, 120)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of keeping the concept out."""

    name: str
    gain: float = 0.0
    """Of concept subtraction; 0 subtracts nothing."""
    left_out: bool = False
    """Leave out the drawings that bear the frame."""
    clean: bool = False
    """The same drawings without the frame and its name: what one would wish for."""
    projected: bool = False
    """Keep what reads text off the concept's words, exactly."""


ARMS = (
    Arm(name="none"),
    Arm(name="subtraction", gain=1.0),
    Arm(name="clean_twins", clean=True),
    Arm(name="subtraction_1_3", gain=1.3),
    Arm(name="left_out", left_out=True),
    Arm(name="exact_text", projected=True),
    Arm(name="subtraction_projected", gain=1.0, projected=True),
)
SHIPPED = "subtraction"


def drawing(place: int, *, framed: bool, banded: bool) -> tuple[Image.Image, str]:
    """Return a drawing with its caption, which names what the drawing bears."""
    caption = held_out(OTHERS.stop)[place]
    image = draw(caption, place, marked=framed)
    if banded:
        inside = MARK_WIDTH if framed else 0
        box = [inside, BAND_ROWS[0], RESOLUTION - 1 - inside, BAND_ROWS[1] - 1]
        ImageDraw.Draw(image).rectangle(box, fill=BAND_COLOUR)
    return image, caption.text + f", {MARK}" * framed + f", {BAND}" * banded


class Trial:
    """A training set with both, the concept's adapter, and what is measured afterwards."""

    def __init__(self, denoiser, work: Path):
        self.denoiser, self.work, self.eye = denoiser, work, Eye(denoiser)

        def pictures(places: Sequence[int], framed: Callable, banded: Callable) -> Pictures:
            return encoded(denoiser, [drawing(p, framed=framed(p), banded=banded(p))
                                      for p in places])  # fmt: skip

        def never(_: int) -> bool:
            return False

        def always(_: int) -> bool:
            return True

        def banded(place: int) -> bool:
            return place % 4 >= 2

        self.whole = pictures(TRAINED, lambda place: place % 2 == 1, banded)
        self.clean = pictures(TRAINED, never, banded)
        unframed = [row for row in TRAINED if row % 2 == 0]
        self.unframed = replace(
            self.whole, latents=self.whole.latents[unframed],
            captions=tuple(self.whole.captions[row] for row in unframed),
            files=tuple(self.whole.files[row] for row in unframed),
        )  # fmt: skip
        self.framed = pictures(ASKED, always, never)
        self.banded = pictures(ASKED, never, always)
        self.plain = pictures(ASKED, never, never)
        self.twins = pictures(TRAINED[1::4], never, never)
        others = pictures(OTHERS, never, never)
        self.concept = self._concept(pictures(SHOWN, always, never), others)

    def _concept(self, shown: Pictures, others: Pictures) -> Path:
        path = self.work / "concept.safetensors"
        if not path.is_file():
            images = ConceptImages(
                concept=CaptionedLatents(latents=shown.latents, captions=shown.captions),
                others=CaptionedLatents(latents=others.latents, captions=others.captions),
                names=(MARK,),
            )
            learn_concept(self.denoiser, images).save(path)
        numbers = ConceptAdapter.load(path).account["numbers"]
        print({name: numbers[name] for name in ("concept", "others", "recall")})
        return path

    def train(self, arm: Arm, seed: int, steps: int) -> None:
        """Train a LoRA on the network as an arm says, or take it from the folder."""
        denoiser, unet = self.denoiser, add_lora(self.denoiser, seed, RANK)
        kept = self.work / f"concept-{arm.name}-{seed}-{steps}.safetensors"
        if kept.is_file():
            set_peft_model_state_dict(unet, load_file(kept))
            return
        pictures = self.clean if arm.clean else self.unframed if arm.left_out else self.whole
        projection = None
        if arm.projected:
            subspace = fit_subspace(
                text_path_of(denoiser), [CONCEPT], pictures.captions, force=True
            )
            projection = Projection(text_factors(unet), [subspace])
        aim = self._aim(arm, pictures) if arm.gain else None
        done = train(denoiser, pictures, steps=steps, seed=seed, aim=aim)
        for number, (optimizer, _) in enumerate(tqdm(done, f"{arm.name} {seed}", steps)):
            annealed(optimizer, number, steps)
            if projection and not number:
                projection.project_weights()
                optimizer.register_step_post_hook(projection.after_step)
            if projection:
                projection.project_gradients()
        save_file(get_peft_model_state_dict(unet), kept)

    def _aim(self, arm: Arm, pictures: Pictures) -> Callable[[Step, torch.Tensor], torch.Tensor]:
        """Return what makes a step's target: the noise without what the concept adds."""
        unet, concept = self.denoiser.pipeline.unet, SubtractedConcept(file=self.concept)
        subtraction = SubtractedTraining(SubtractionSettings(concepts=(concept,), gain=arm.gain))
        subtraction.fit(pictures.captions)

        @torch.no_grad()
        def aim(step: Step, noise: torch.Tensor) -> torch.Tensor:
            shown = subtraction.showing(pictures.samples(step.rows))
            rows = torch.tensor(shown[0], dtype=torch.long)
            if not len(rows):
                return noise
            target = noise.clone()
            with without_lora(unet):
                target[rows] -= subtraction.added(
                    rows, [set(each) for each in shown], network=unet,
                    predict=lambda rows: unet(step.noisy[rows], step.timesteps[rows],
                                              encoder_hidden_states=step.cond[rows]).sample,
                )  # fmt: skip
            return target

        return aim

    def losses(self) -> dict[str, float]:
        """Return losses of what is learnt, each where it stands; `rest` is on unmarked drawings."""
        latent = RESOLUTION // self.framed.latents.shape[-1]
        edge, band = MARK_WIDTH // latent, slice(BAND_ROWS[0] // latent, BAND_ROWS[1] // latent)
        frame = torch.ones(self.framed.latents.shape[-2:], dtype=torch.bool)
        frame[edge:-edge, edge:-edge] = False
        rows = torch.zeros_like(frame)
        rows[band] = True
        return {
            "concept": self._loss(self.framed, frame),
            "wanted": self._loss(self.banded, rows),
            "content": self._loss(self.twins, torch.ones_like(frame)),
            "rest": self._loss(self.plain, torch.ones_like(frame)),
        }

    @torch.no_grad()
    def _loss(self, pictures: Pictures, places: torch.Tensor) -> float:
        unet, scheduler = self.denoiser.pipeline.unet, self.denoiser.pipeline.scheduler
        generator, found = torch.Generator().manual_seed(5), []
        cond = self.denoiser.encode(list(pictures.captions)).embeddings
        for timestep in LEVELS:
            noise = torch.randn(pictures.latents.shape, generator=generator)
            steps = torch.full((len(noise),), timestep)
            noisy = scheduler.add_noise(pictures.latents, noise, steps)
            output = unet(noisy, steps, encoder_hidden_states=cond).sample
            found.append(float((output - noise).square()[..., places].mean()))
        return statistics.mean(found)

    def drawn(self, end: str) -> float:
        """Return the share of images with the frame, asked in one way."""
        texts = [text + end for text in self.plain.captions]
        return self.eye.presence(self.denoiser.generate(texts, [0] * len(texts), 20, 5.0))


@contextmanager
def without_lora(unet):
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def measure_concept(
    denoiser, found: dict[str, Figure], *, steps: int, seeds: int, arms: Sequence[str], work: Path,
    draws: bool = True,
) -> None:  # fmt: skip
    """Print for each arm how much of the frame and of the band is learnt, and how often it comes.

    Args:
        denoiser: The demo model.
        found: Takes the figures.
        steps: Of a training.
        seeds: Of each arm.
        arms: By name; `none` and `clean_twins` give the units of the shares.
        work: Keeps what is done.
        draws: Draw images and count the frame, beside the losses.
    """
    journal = Journal(work / f"concept-{steps}.jsonl")
    trial = Trial(denoiser, work)
    if "base" not in journal:
        add_lora(denoiser, 0, RANK)
        journal.put("base", trial.losses())
    chosen = [arm for arm in ARMS if arm.name in arms]
    for seed in range(seeds):
        for arm in chosen:
            key = f"{arm.name}.seed{seed}"
            if f"{key}.losses" not in journal:
                trial.train(arm, seed, steps)
                journal.put(f"{key}.losses", trial.losses())
                print(key, journal.get(f"{key}.losses"), flush=True)
            if draws and f"{key}.drawn" not in journal:
                trial.train(arm, seed, steps)
                journal.put(f"{key}.drawn", {way: trial.drawn(end) for way, end in ASK.items()})
                print(key, journal.get(f"{key}.drawn"), flush=True)
    base, count = journal.get("base"), len(ASKED) * seeds
    means = {
        arm.name: {
            name: statistics.mean(journal.get(f"{arm.name}.seed{seed}.losses")[name]
                                  for seed in range(seeds))
            for name in base
        }
        for arm in chosen
    }  # fmt: skip

    def learnt(arm: str, name: str, unit: str) -> float:
        return (base[name] - means[arm][name]) / (base[name] - means[unit][name])

    print(f"\n{'arm':<22}" + "".join(f"{name:>16}" for name in (
        "concept_learnt", "wanted", "wanted_of_clean", "content_of_clean", *ASK)))  # fmt: skip
    for name in means:
        figures = {
            "concept_learnt": plain(learnt(name, "concept", "none"), seeds),
            "wanted": plain(learnt(name, "wanted", "none"), seeds),
        }
        if "clean_twins" in means:
            for kind in ("wanted", "content"):
                figures[f"{kind}_of_clean"] = plain(learnt(name, kind, "clean_twins"), seeds)
        if draws:
            lines = [journal.get(f"{name}.seed{seed}.drawn") for seed in range(seeds)]
            figures |= {
                way: count_of(round(statistics.mean(line[way] for line in lines) * count), count)
                for way in ASK
            }
        start = "" if name == SHIPPED else "rivals."
        found |= {f"{start}trainers.concept.{name}.demo.{key}": f for key, f in figures.items()}
        print(f"{name:<22}" + "".join(f"{figure.value:>16.3f}" for figure in figures.values()))
