"""What the filter does to planted duplicates in real LoRA trainings of the demo model."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from demo_lora import (
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
from tqdm.auto import tqdm
from unmemorize.audit.sscd import Sscd, similarity
from unmemorize.shared.calibration import clopper_pearson
from unmemorize.shared.storage import Journal
from unmemorize.shared.training.filter import MemorizationFilter
from unmemorize.shared.training.recall import Recall
from unmemorize.shared.training.sample_log import Sample, SampleLog, rank_samples, read_records
from unmemorize.shared.training.thresholds import AbsoluteThreshold, RunningQuantile, Threshold

CAPTIONS, PLANTED = 206, 6
"""Of the set; those of the planted drawings come first."""
RANK = 32
JUDGED, PICTURES = 66, 2
"""Captions that are drawn, the planted ones first, and how often."""
FILTERS: dict[str, Callable[[], Threshold]] = {
    "none": lambda: AbsoluteThreshold(math.inf),  # records, and changes nothing
    "limit.1": lambda: AbsoluteThreshold(0.1),
}
"""Thresholds by arm."""
MARGINS = (0.0, 0.2, 0.4, 0.8)


Weigh = Callable[[Step, torch.Tensor, list[Sample]], torch.Tensor]


class Trainings:
    """The same pictures, trained on with different filters: copies, and drawings that vary."""

    def __init__(self, denoiser, *, copies: int = 180, drawings: int = 8):
        """Draw `copies` of each planted drawing, and different `drawings` of each other caption."""
        self.denoiser = denoiser
        captions = held_out(CAPTIONS)  # all new to the model: nothing tells the planted ones apart
        self.texts = [caption.text for caption in captions]
        different = encoded(denoiser, [
            (draw(caption, place + CAPTIONS * number), caption.text)
            for number in range(drawings)
            for place, caption in enumerate(captions)
            if number == 0 or place >= PLANTED
        ])  # fmt: skip
        rows = [*range(len(different.files)), *list(range(PLANTED)) * (copies - 1)]
        chosen = rows_of(different, rows)
        files = tuple(f"{number:04d}-{file}" for number, file in enumerate(chosen.files))
        self.pictures = replace(chosen, files=files)
        # Another vendor's drawing of each other caption, on another ground: never trained on.
        self.others = [
            (draw(captions[place], 10_001 + place), self.texts[place])
            for place in range(PLANTED, JUDGED)
        ]

    def planted(self, sample: Sample) -> bool:
        return sample.caption in self.texts[:PLANTED]

    def run(self, weigh: Weigh, *, seed: int, steps: int, name: str) -> None:
        """Train a LoRA with the weights that `weigh` gives the samples of a step.

        Args:
            weigh: Called with a step, the prediction without text of its samples, and who they are.
            seed: Of the LoRA and of the order.
            steps: Of the optimizer.
            name: Shown in the bar.
        """
        unet = add_lora(self.denoiser, seed, RANK)
        empty = self.denoiser.unconditional().embeddings

        @torch.no_grad()
        def weights(step: Step) -> torch.Tensor:
            rows = empty.expand(len(step.rows), -1, -1)
            uncond = unet(step.noisy, step.timesteps, encoder_hidden_states=rows).sample
            return weigh(step, uncond, self.pictures.samples(step.rows))

        done = train(self.denoiser, self.pictures, steps=steps, seed=seed, weigh=weights)
        for number, (optimizer, _) in enumerate(tqdm(done, name, steps)):
            annealed(optimizer, number, steps)


def measure_agreement(denoiser, bench: dict, *, steps: int) -> None:
    """Print how often the cheaper filter decides like the full one, in one real training.

    Both see every step, and the full one's weights are used. Kappa is what agreement there is
    beyond chance, since most samples pass either way. Files are visited about eight times each:
    nothing is known of one that was not seen before.
    """
    trainings = Trainings(denoiser, copies=30, drawings=1)
    full = MemorizationFilter(RunningQuantile(bins=5))
    cheap = {
        margin: MemorizationFilter(RunningQuantile(bins=5), recall=Recall(margin=margin))
        for margin in MARGINS
    }
    reference: list[bool] = []
    kept: dict[float, list[bool]] = {margin: [] for margin in cheap}
    measured = dict.fromkeys(cheap, 0)

    def weigh(step: Step, uncond: torch.Tensor, samples: list) -> torch.Tensor:
        told = {"timesteps": step.timesteps, "samples": samples}
        for margin, made in cheap.items():
            due = made.due(samples, step.timesteps)
            measured[margin] += int(due.sum())
            kept[margin] += (made.weigh(step.prediction, uncond[due], **told) > 0).tolist()
        weights = full.weigh(step.prediction, uncond, **told)
        reference.extend((weights > 0).tolist())
        return weights

    trainings.run(weigh, seed=1, steps=steps, name="agreement")
    truth = np.array(reference)
    print(f"\n{len(truth)} visits of {len(set(trainings.pictures.files))} files, "
          f"{1 - truth.mean():.3f} left out by the full filter")  # fmt: skip
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


class Critic:
    """Says what comes back, and how well the other captions are drawn."""

    def __init__(self, trainings: Trainings):
        """Measure what the model reaches before it is trained on the set."""
        self.trainings, self.sscd = trainings, Sscd()
        drawings = [draw(caption, place) for place, caption in enumerate(held_out(JUDGED))]
        decoded_ones = decoded(trainings.denoiser, trainings.pictures.latents[:JUDGED])
        self.trained = [self.sscd.embed(some) for some in (drawings, decoded_ones)]
        reached = self.near(self.drawn()).flatten().quantile(0.95).item()
        self.limit = (1 + reached) / 2

    def drawn(self) -> list[torch.Tensor]:
        """Return the embeddings of what is drawn for the captions, seed by seed."""
        denoiser, texts = self.trainings.denoiser, self.trainings.texts[:JUDGED]
        return [
            self.sscd.embed(denoiser.generate(texts, [seed] * JUDGED, 20, 5.0))
            for seed in range(PICTURES)
        ]

    def near(self, made: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the largest cosine of pictures of a caption (row) and a drawing (column).

        To the drawing itself, or to its way through the autoencoder.
        """
        return torch.stack([
            torch.maximum(*(similarity(one, rows) for rows in self.trained)) for one in made
        ]).amax(0)  # fmt: skip

    def judge(self) -> dict[str, float]:
        """Return the figures of the LoRA that is there.

        A drawing comes back when a picture of its caption is nearer to it than half-way between 1
        and what 95 % of the pictures reach that the model makes without the LoRA.
        """
        made = self.drawn()
        own = self.near(made).diagonal()
        back = own > self.limit
        others = encoded(self.trainings.denoiser, self.trainings.others)
        return {
            "reproduced": back[:PLANTED].double().mean().item(),
            "similarity": own[:PLANTED].mean().item(),
            "rest_reproduced": back[PLANTED:].double().mean().item(),
            "fidelity": self.fidelity(made),
            "loss": loss_of(self.trainings.denoiser, others),
        }

    def fidelity(self, made: Sequence[torch.Tensor]) -> float:
        """Return the share of the set's drawings that a picture of another caption than the planted
        resembles less than its own caption's; .5 is chance."""
        shares = []
        for one in made:
            near = similarity(one, self.trained[0])
            below = (near < near.diagonal()[:, None]).double().sum(1)
            shares.append(below[PLANTED:] / (JUDGED - 1))
        return torch.cat(shares).mean().item()


def measure_filter(denoiser, bench: dict, *, steps: int, seeds: int, work: Path) -> None:
    """Print what planted duplicates and the other drawings become, without the filter and with it.

    What was trained and judged before lies in `work` and is not done again.
    """
    journal = Journal(work / f"filter-{steps}.jsonl")
    trainings = Trainings(denoiser)
    critic = Critic(trainings)
    columns = ("similarity", "rest_reproduced", "fidelity", "loss", "precision", "recall", "ranked")
    print(f"\n{'filter':<10}{'reproduced':>12}{'95 % interval':>18}"
          + "".join(f"{name:>17}" for name in columns))  # fmt: skip
    for name, threshold in FILTERS.items():
        for seed in range(seeds):
            if f"{name}.seed{seed}" not in journal:
                decided = _filtered(trainings, threshold(), seed, steps, f"{name} {seed}", work)
                journal.put(f"{name}.seed{seed}", critic.judge() | decided)
        lines = [journal.get(f"{name}.seed{seed}") for seed in range(seeds)]
        means = {key: statistics.mean(line[key] for line in lines) for key in lines[0]}
        bench |= {f"trainers.filter.{name}.{key}": value for key, value in means.items()}
        total = PLANTED * seeds
        low, high = clopper_pearson(round(means["reproduced"] * total), total)
        print(f"{name:<10}{means['reproduced']:>12.3f}{f'{low:.3f} to {high:.3f}':>18}"
              + "".join(f"{means[key]:>17.3f}" for key in columns))  # fmt: skip


def _filtered(
    trainings: Trainings, threshold: Threshold, seed: int, steps: int, name: str, work: Path
) -> dict[str, float]:
    """Train with the filter and return how well what it left out and ranks are the planted.

    `precision`, `recall`: of visits left out. `ranked`: of as many files at the head of the ranked
    list as are planted.
    """
    path = work / f"filter-{name.replace(' ', '-')}-{steps}.jsonl"
    made = MemorizationFilter(threshold, log=SampleLog(path))

    def weigh(step: Step, uncond: torch.Tensor, samples: list) -> torch.Tensor:
        return made.weigh(step.prediction, uncond, timesteps=step.timesteps, samples=samples)

    trainings.run(weigh, seed=seed, steps=steps, name=name)
    made.log.flush()
    records = read_records([path])
    ranked = [trainings.planted(each.sample) for each in rank_samples(records)]
    visits = [(trainings.planted(record.sample), not record.kept) for record in records]
    stopped = [planted for planted, out in visits if out]
    return {
        "precision": statistics.mean(stopped) if stopped else 1.0,
        "recall": sum(stopped) / sum(planted for planted, _ in visits),
        "ranked": statistics.mean(ranked[: sum(ranked)]),
    }
