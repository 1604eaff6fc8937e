"""What filter and projection do in real LoRA trainings of the demo model."""

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from demo_lora import (
    MARK,
    MARK_COLOUR,
    Pictures,
    Step,
    add_lora,
    draw,
    encoded,
    held_out,
    train,
)
from PIL import ImageColor
from tqdm.auto import tqdm
from unmemorize.audit.lora.attack import as_images
from unmemorize.audit.sscd import Sscd, similarity
from unmemorize.shared.training.activations import (
    fit_layers,
    listening,
    other_factors,
    owners,
    run_through,
)
from unmemorize.shared.training.concept import Concept
from unmemorize.shared.training.filter import MemorizationFilter
from unmemorize.shared.training.fitting import fit_subspace
from unmemorize.shared.training.lora_factors import text_factors
from unmemorize.shared.training.projection import Projection
from unmemorize.shared.training.recall import Recall
from unmemorize.shared.training.text_states import text_path_of
from unmemorize.shared.training.thresholds import AbsoluteThreshold, RunningQuantile

MARGINS = (0.0, 0.2, 0.4, 0.8)


def filter_with(recall: Recall | None) -> MemorizationFilter:
    return MemorizationFilter(RunningQuantile(bins=5), recall=recall)


def measure_agreement(denoiser, bench: dict, *, steps: int) -> None:
    """Print how often the cheaper filter decides like the full one, in one real training.

    24 pictures, 4 of them six times; both filters see every step, and the full one's weights are
    used. Kappa is what agreement there is beyond chance, since most samples pass either way.
    """
    captions = held_out(24)
    plain = [(draw(caption, seed), caption.text) for seed, caption in enumerate(captions)]
    pictures = encoded(denoiser, plain + plain[:4] * 5)
    unet = add_lora(denoiser, seed=0)
    empty = denoiser.unconditional().embeddings
    full = filter_with(None)
    cheap = {margin: filter_with(Recall(margin=margin)) for margin in MARGINS}
    reference: list[bool] = []
    kept: dict[float, list[bool]] = {margin: [] for margin in cheap}
    measured = dict.fromkeys(cheap, 0)

    def weigh(step: Step) -> torch.Tensor:
        with torch.no_grad():
            rows = empty.expand(len(step.rows), -1, -1)
            uncond = unet(step.noisy, step.timesteps, encoder_hidden_states=rows).sample
        samples = pictures.samples(step.rows)
        told = {"timesteps": step.timesteps, "samples": samples}
        for margin, made in cheap.items():
            due = made.due(samples, step.timesteps)
            measured[margin] += int(due.sum())
            kept[margin] += (made.weigh(step.prediction, uncond[due], **told) > 0).tolist()
        weights = full.weigh(step.prediction, uncond, **told)
        reference.extend((weights > 0).tolist())
        return weights

    for _ in tqdm(train(denoiser, pictures, steps=steps, seed=1, weigh=weigh), "filter", steps):
        pass
    truth = np.array(reference)
    print(f"\n{len(truth)} visits of {len(pictures.files)} files, {1 - truth.mean():.3f} left out "
          "by the full filter")  # fmt: skip
    print(f"{'margin':>7}{'measured':>10}{'equal':>8}{'kappa':>8}")
    for margin in cheap:
        found = np.array(kept[margin])
        equal = float((found == truth).mean())
        chance = found.mean() * truth.mean() + (1 - found.mean()) * (1 - truth.mean())
        share, kappa = measured[margin] / len(truth), (equal - chance) / max(1 - chance, 1e-9)
        print(f"{margin:>7}{share:>10.3f}{equal:>8.4f}{kappa:>8.3f}")
        if margin == Recall().margin:
            bench |= {"trainers.filter.cheap.measured": share,
                      "trainers.filter.cheap.agreement": equal,
                      "trainers.filter.cheap.kappa": float(kappa)}  # fmt: skip


PLANTED, REPEATS = 4, 12
"""Of 24 drawings, how many are trained on so many times as often as the others."""
LIMITS = (None, 0.1, 0.07)
"""Absolute thresholds of the filter's arms; None trains without it."""


def nearness(denoiser, sscd: Sscd, pictures: Pictures, drawings: list, seeds: int) -> torch.Tensor:
    """Return [caption image] cosines of the nearest of the pictures that each caption brings.

    An image counts as itself or as its way through the autoencoder, whichever is nearer.
    """
    texts = list(pictures.captions[: len(drawings)])
    latents = pictures.latents[: len(drawings)] / denoiser.pipeline.vae.config.scaling_factor
    with torch.no_grad():
        pixels = denoiser.pipeline.vae.decode(latents).sample
    trips = as_images((pixels / 2 + 0.5).clamp(0, 1))
    references = [sscd.embed(images) for images in (drawings, trips)]
    found = []
    for seed in range(seeds):
        made = sscd.embed(denoiser.generate(texts, [seed] * len(texts), steps=20, cond_scale=5.0))
        found.append(torch.maximum(*(similarity(made, rows) for rows in references)))
    return torch.stack(found).amax(0)


def measure_filter(denoiser, bench: dict, *, steps: int, seeds: int = 2) -> None:
    """Print what planted duplicates and the other drawings become, without the filter and with it.

    An image comes back when its caption's pictures are nearer to it than half-way between 1 and
    what 95 % of the pictures of other captions reach.
    """
    captions, sscd = held_out(24), Sscd()
    drawings = [draw(caption, seed) for seed, caption in enumerate(captions)]
    plain = [(image, caption.text) for image, caption in zip(drawings, captions, strict=True)]
    pictures = encoded(denoiser, plain + plain[:PLANTED] * (REPEATS - 1))
    planted = [row < PLANTED or row >= len(plain) for row in range(len(pictures.captions))]
    empty = denoiser.unconditional().embeddings
    print(f"\n{'threshold':>9}{'planted: back':>15}{'similarity':>12}{'others: back':>14}"
          f"{'similarity':>12}{'precision':>11}{'recall':>8}")  # fmt: skip
    for limit in LIMITS:
        unet = add_lora(denoiser, seed=0)
        made = MemorizationFilter(AbsoluteThreshold(math.inf if limit is None else limit))
        decided: list[tuple[bool, bool]] = []

        def weigh(step: Step, unet=unet, made=made, decided=decided) -> torch.Tensor:
            with torch.no_grad():
                rows = empty.expand(len(step.rows), -1, -1)
                uncond = unet(step.noisy, step.timesteps, encoder_hidden_states=rows).sample
            told = {"timesteps": step.timesteps, "samples": pictures.samples(step.rows)}
            weights = made.weigh(step.prediction, uncond, **told)
            stopped = (weights == 0).tolist()
            decided.extend(zip((planted[row] for row in step.rows), stopped, strict=True))
            return weights

        for _ in tqdm(
            train(denoiser, pictures, steps=steps, seed=1, weigh=weigh), str(limit), steps
        ):
            pass
        found = nearness(denoiser, sscd, pictures, drawings, seeds)
        others = found[~torch.eye(len(found), dtype=torch.bool)]
        back = (found.diagonal() > (1 + others.quantile(0.95)) / 2).float()
        own = found.diagonal()
        stopped = [is_planted for is_planted, out in decided if out]
        line = {
            "planted.reproduced": back[:PLANTED].mean(), "planted.similarity": own[:PLANTED].mean(),
            "others.reproduced": back[PLANTED:].mean(), "others.similarity": own[PLANTED:].mean(),
            "precision": sum(stopped) / max(1, len(stopped)),
            "recall": sum(stopped) / sum(is_planted for is_planted, _ in decided),
        }  # fmt: skip
        name = "none" if limit is None else f"limit{limit}"
        bench |= {f"trainers.filter.{name}.{key}": float(value) for key, value in line.items()}
        values = [float(value) for value in line.values()]
        print("{:>9}{:>15.3f}{:>12.3f}{:>14.3f}{:>12.3f}{:>11.3f}{:>8.3f}".format(name, *values))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training."""

    name: str
    text: bool = False
    layers: int = 0
    """Most dimensions of a layer; 0 leaves all but the text side alone."""


ARMS = (
    Arm(name="none"),
    Arm(name="exact", text=True),
    Arm(name="layers8", text=True, layers=8),
    Arm(name="layers24", text=True, layers=24),
)


def projection_of(denoiser, arm: Arm, pictures: Pictures, marked: list[bool]) -> Projection | None:
    """Return what an arm projects: text factors by the concept's names, others by its pictures."""
    unet = denoiser.pipeline.unet
    if not arm.text:
        return None
    concept = Concept(names=(MARK, f"{MARK}s", "zorp"), neutral="star")
    subspace = fit_subspace(text_path_of(denoiser), [concept], pictures.captions, force=True)
    factors, layers = text_factors(unet), None
    if arm.layers:
        others = other_factors(unet)
        heard = []
        for side in (True, False):
            rows = [row for row, mark in enumerate(marked) if mark is side]
            # Both sides read the captions without the name: what differs is in the pictures.
            texts = [pictures.captions[row].removesuffix(f", {MARK}") for row in rows]
            with listening(owners(unet, others)) as ears:
                for start in range(0, len(rows), 8):
                    some = rows[start : start + 8]
                    run_through(
                        denoiser, pictures.latents[some], texts[start : start + 8], seed=start
                    )
            heard.append(ears)
        layers = fit_layers(*heard, cap=arm.layers)
        factors |= others
    return Projection(factors, [subspace], layers=layers)


def presence(denoiser, texts: list[str], seeds: int) -> float:
    """Return the share of pixels in the mark's colour, mean over generated pictures."""
    colour = np.array(ImageColor.getrgb(MARK_COLOUR), dtype=float)
    shares = []
    for seed in range(seeds):
        for image in denoiser.generate(texts, [seed] * len(texts), steps=20):
            distance = np.abs(np.asarray(image, dtype=float) - colour).max(axis=-1)
            shares.append(float((distance < 90).mean()))
    return statistics.mean(shares)


@torch.no_grad()
def loss_of(denoiser, pictures: Pictures, rows: list[int]) -> float:
    """Return the mean squared error of noise predictions at eight levels, of these pictures."""
    unet, scheduler = denoiser.pipeline.unet, denoiser.pipeline.scheduler
    generator, losses = torch.Generator().manual_seed(5), []
    cond = denoiser.encode([pictures.captions[row] for row in rows]).embeddings
    for timestep in range(60, 1000, 120):
        noise = torch.randn(len(rows), *denoiser.latent_shape, generator=generator)
        steps = torch.full((len(rows),), timestep)
        noisy = scheduler.add_noise(pictures.latents[rows], noise, steps)
        output = unet(noisy, steps, encoder_hidden_states=cond).sample
        losses.append(float((output - noise).square().mean()))
    return statistics.mean(losses)


def measure_projection(denoiser, bench: dict, *, steps: int, seeds: int, arms: list[str]) -> None:
    """Print for each arm the mark's presence by name and by paraphrase, and the loss on the rest.

    Half of the pictures carry the mark in a corner and its name at the end of their captions. The
    last eight of each half are not trained on.
    """
    captions = held_out(64)
    marked = [bool(place % 2) for place in range(len(captions))]
    drawings = [
        (draw(caption, place, marked=mark), f"{caption.text}, {MARK}" if mark else caption.text)
        for place, (caption, mark) in enumerate(zip(captions, marked, strict=True))
    ]
    pictures, kept = encoded(denoiser, drawings), len(captions) - 16
    trained = Pictures(latents=pictures.latents[:kept], captions=pictures.captions[:kept],
                       files=pictures.files[:kept])  # fmt: skip
    rest = [row for row in range(kept, len(captions)) if not marked[row]]
    asked = [captions[row].text for row in rest]
    print(f"\n{'arm':<10}{'seed':>5}{'by name':>9}{'paraphrase':>12}{'without':>9}{'loss':>8}")
    for name in arms:
        arm = next(each for each in ARMS if each.name == name)
        for seed in range(seeds):
            add_lora(denoiser, seed)
            projection = projection_of(denoiser, arm, trained, marked[:kept])
            if projection:
                projection.project_weights()
            steps_done = train(denoiser, trained, steps=steps, seed=seed)
            for number, _ in enumerate(tqdm(steps_done, f"{name} {seed}", steps)):
                if projection and number:
                    projection.after_step()
            if projection:
                projection.after_step()
                projection.check()
            found = [presence(denoiser, [text + end for text in asked], 2)
                     for end in (f", {MARK}", ", pink round badge", "")]  # fmt: skip
            loss = loss_of(denoiser, pictures, rest)
            print(f"{name:<10}{seed:>5}{found[0]:>9.4f}{found[1]:>12.4f}{found[2]:>9.4f}"
                  f"{loss:>8.4f}")  # fmt: skip
            keys = ("by_name", "by_paraphrase", "without_name", "loss")
            bench |= {f"trainers.projection.{name}.seed{seed}.{key}": value
                      for key, value in zip(keys, [*found, loss], strict=True)}  # fmt: skip
