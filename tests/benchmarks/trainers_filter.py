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
from figures import Figure, count_of, plain
from tqdm.auto import tqdm
from unmemorize.audit.common.sscd import Sscd, similarity
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.training.filter.expectation import Recall
from unmemorize.shared.training.filter.filter import MemorizationFilter
from unmemorize.shared.training.filter.sample_log import (
    Sample,
    SampleLog,
    rank_samples,
    read_records,
)
from unmemorize.shared.training.filter.thresholds import (
    AbsoluteThreshold,
    RelativeThreshold,
    RunningQuantile,
    Threshold,
)

RANK = 32
JUDGED, PICTURES = 66, 2
"""Captions that are drawn, the planted ones first, and how often."""
FILTERS: dict[str, Callable[[], Threshold]] = {
    "none": lambda: AbsoluteThreshold(math.inf),  # records, and changes nothing
    "limit0.1": lambda: AbsoluteThreshold(0.1),
    "x1.5": lambda: RelativeThreshold(1.5),
}
"""Thresholds by arm."""
SHIPPED = "x1.5"
"""The one that the pages advise; the others are its rivals."""
CHEAP = {"q0.95": RunningQuantile, **{name: FILTERS[name] for name in ("limit0.1", "x1.5")}}
"""Thresholds with which the cheaper filter is compared to the full one."""
CHEAP_SETS = (
    ("few", 4, {"first": 350, "captions": 30, "planted": 2, "copies": 6}),
    ("few2", 5, {"first": 400, "captions": 30, "planted": 2, "copies": 6}),
    ("many", 6, {"first": 276, "copies": 30}),
)
"""Name, seed and set of the trainings in which it is compared."""


Weigh = Callable[[Step, torch.Tensor, list[Sample]], torch.Tensor]


class Trainings:
    """The same pictures, trained on with different filters: copies, and drawings that vary."""

    def __init__(
        self, denoiser, *, first: int = 0, captions: int = 206, planted: int = 6,
        copies: int = 180, drawings: int = 8,
    ):  # fmt: skip
        """Draw `copies` of each planted drawing, and different `drawings` of each other caption.

        Args:
            denoiser: Of the demo model.
            first: Of the captions new to the model, the one that the set begins with.
            captions: Of the set; the first `planted` of them are those of the planted drawings.
            planted: Of them.
            copies: Of each.
            drawings: Of each other.
        """
        self.denoiser, self.count = denoiser, planted
        # All new to the model: nothing tells the planted ones apart.
        captions = held_out(first + captions)[first:]
        self.texts = [caption.text for caption in captions]
        different = encoded(denoiser, [
            (draw(caption, place + len(captions) * number), caption.text)
            for number in range(drawings)
            for place, caption in enumerate(captions)
            if number == 0 or place >= planted
        ])  # fmt: skip
        rows = [*range(len(different.files)), *list(range(planted)) * (copies - 1)]
        chosen = rows_of(different, rows)
        files = tuple(f"{number:04d}-{file}" for number, file in enumerate(chosen.files))
        self.pictures = replace(chosen, files=files)
        # Another vendor's drawing of each other caption, on another ground: never trained on.
        self.others = [
            (draw(caption, 10_001 + place), caption.text)
            for place, caption in enumerate(captions[:JUDGED])
            if place >= planted
        ]

    def planted(self, sample: Sample) -> bool:
        return sample.caption in self.texts[: self.count]

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


class Comparison:
    """The cheaper filter beside the full one, with one threshold, in one training."""

    def __init__(self, threshold: Callable[[], Threshold]):
        self.full = MemorizationFilter(threshold())
        self.cheap = MemorizationFilter(threshold(), recall=Recall())
        self.decided: list[tuple[bool, bool]] = []
        """By visit, whether the full one keeps it and whether the cheaper one does."""

    def weigh(self, step: Step, uncond: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
        """Ask both, and return the full one's weights."""
        told = {"timesteps": step.timesteps, "samples": samples}
        some = uncond[self.cheap.due(samples, step.timesteps)]
        cheap = self.cheap.weigh(step.prediction, some, **told)
        full = self.full.weigh(step.prediction, uncond, **told)
        self.decided += zip((full > 0).tolist(), (cheap > 0).tolist(), strict=True)
        return full

    def shares(self) -> dict[str, float]:
        """Return shares of the visits; kappa is the agreement beyond chance, as most pass."""
        full, cheap = np.array(self.decided).T
        equal = (full == cheap).mean()
        chance = cheap.mean() * full.mean() + (1 - cheap.mean()) * (1 - full.mean())
        return {
            "left_out": float(1 - full.mean()),
            "measured": self.cheap.measured / self.cheap.seen,
            "agreement": float(equal),
            "kappa": float((equal - chance) / max(1 - chance, 1e-9)),
        }


def measure_agreement(denoiser, found: dict[str, Figure], *, steps: int) -> None:
    """Print how often the cheaper filter decides like the full one, in three real trainings.

    Two of a LoRA's usual kind, tens of pictures that are visited tens of times, and one of many
    files with few visits each: of what was not seen before nothing is known. All filters see every
    step; what the first full one decides is learnt. The settings of the cheaper filter were chosen
    in other trainings (`seed` 1 to 3, sets that begin elsewhere).
    """
    columns = ("left_out", "measured", "agreement", "kappa")
    start = "trainers.filter.cheap"
    print(f"\n{'set':<7}{'files':>6}{'visits':>8}{'threshold':>11}"
          + "".join(f"{column:>11}" for column in columns))  # fmt: skip
    for name, seed, chosen in CHEAP_SETS:
        trainings = Trainings(denoiser, drawings=1, **chosen)
        made = {threshold: Comparison(make) for threshold, make in CHEAP.items()}

        def weigh(step: Step, uncond: torch.Tensor, samples: list, made=made) -> torch.Tensor:
            weights = [each.weigh(step, uncond, samples) for each in made.values()]
            return weights[0]

        trainings.run(weigh, seed=seed, steps=steps, name=name)
        for threshold, each in made.items():
            shares = each.shares()
            print(
                f"{name:<7}{len(set(trainings.pictures.files)):>6}{len(each.decided):>8}"
                f"{threshold:>11}" + "".join(f"{shares[column]:>11.3f}" for column in columns)
            )
            found |= {
                f"grid.{start}.{name}.{word_of(threshold)}.{c}": plain(shares[c], len(each.decided))
                for c in columns
            }
    usual = [name for name, *_ in CHEAP_SETS if name.startswith("few")]
    for column in columns:
        values = [found[f"grid.{start}.{name}.q0_95.{column}"] for name in usual]
        found[f"{start}.{column}"] = plain(
            statistics.mean(each.value for each in values), sum(each.n for each in values)
        )


def word_of(threshold: str) -> str:
    """Return a threshold's name as keys have it, where dots part words."""
    return threshold.replace(".", "_")


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
            "reproduced": back[: self.trainings.count].double().mean().item(),
            "similarity": own[: self.trainings.count].mean().item(),
            "rest_reproduced": back[self.trainings.count :].double().mean().item(),
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
            shares.append(below[self.trainings.count :] / (JUDGED - 1))
        return torch.cat(shares).mean().item()


def measure_filter(
    denoiser, found: dict[str, Figure], *, filters: Sequence[str], steps: int, seeds: int,
    work: Path,
) -> None:  # fmt: skip
    """Print what planted duplicates and the other drawings become, without the filter and with it.

    What was trained and judged before lies in `work` and is not done again.
    """
    journal = Journal(work / f"filter-{steps}.jsonl")
    trainings = Trainings(denoiser)
    critic = Critic(trainings)
    columns = ("similarity", "rest_reproduced", "fidelity", "loss", "precision", "recall", "ranked")
    total = trainings.count * seeds
    print(f"\n{'filter':<10}{'reproduced':>12}{'95 % interval':>18}"
          + "".join(f"{name:>17}" for name in columns))  # fmt: skip
    for name in filters:
        for seed in range(seeds):
            if f"{name}.seed{seed}" not in journal:
                decided = _filtered(trainings, FILTERS[name](), seed, steps, f"{name} {seed}", work)
                journal.put(f"{name}.seed{seed}", critic.judge() | decided)
        lines = [journal.get(f"{name}.seed{seed}") for seed in range(seeds)]
        means = {key: statistics.mean(line[key] for line in lines) for key in lines[0]}
        line = {key: plain(value, seeds) for key, value in means.items()}
        line["reproduced"] = back = count_of(round(means["reproduced"] * total), total)
        start = "" if name == SHIPPED else "rivals."
        found |= {f"{start}trainers.filter.{word_of(name)}.{k}": f for k, f in line.items()}
        print(f"{name:<10}{back.value:>12.3f}{f'{back.low:.3f} to {back.high:.3f}':>18}"
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
