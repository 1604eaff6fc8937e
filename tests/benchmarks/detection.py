"""Detection on models with known truth: ``make bench NAME=detection``.

    ARGS="--models demo scenes"    some of the five; without, all that are made
    ARGS="--only accuracy grid"    some of the parts

*accuracy*: the shipped score, and what the text alone gives away. *two_stage*: with the collapse of
the suspicious. *near*: captions near a memorized one. *grid*: all settings. *rivals*: other scores.
*speed*, *memory*, *observer*, *audit*: what it costs; the audit is that of the demo.
What the network predicts and what it draws is kept in --work, by the weights it comes from.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_models import MODELS, chosen_models
from families import measure_families
from figures import Figure, command_of, record
from scores.case import WORK, Case, magnitudes, residuals
from scores.generations import reproduced
from scores.grid import measure_grid
from scores.ranking import Draw, flagged, measured, ranked
from scores.rivals import measure_rivals
from scores.speed import measure_audit, measure_memory, measure_observer, measure_speed
from scores.stages import measure_two_stage
from torch import Tensor
from unmemorize.shared.score.control_basis import directions_for
from unmemorize.shared.score.denoiser import Denoiser
from unmemorize.shared.score.detection import detect

ENCODED_AT_ONCE = 64

Figures = dict[str, Figure]


def measure_accuracy(case: Case) -> Figures:
    """Return the figures of the shipped score, and of the paper's magnitude beside it.

    Both come from the product's own calibration and detection.
    """
    denoiser, groups, name = case.subject.denoiser, case.groups, case.model.name
    come_back, found = reproduced(case), {}
    for key, part in ((f"detection.{name}", case.calibration.judge),
                      (f"rivals.detection.{name}.magnitude", case.calibration)):  # fmt: skip
        traces = detect(denoiser, groups.texts, case.config, basis=part.basis).traces[..., 0]
        draws = [Draw(traces.mean(1), part.seed_scores.mean(1))]
        grid = f"grid.{key.removeprefix('rivals.')}"
        few = [Draw(traces[:, :2].mean(1), part.seed_scores[:, :2].mean(1))]
        figures = measured(few, groups.planted, groups.negatives)
        found |= {f"{grid}.two_seeds.{figure}": value for figure, value in figures.items()}
        ranks = {key: groups.planted, f"{grid}.reproduced": come_back,
                 f"{grid}.template": groups.template}  # fmt: skip
        rates = {f"{key}.false_positive_rate": groups.negatives, f"{grid}.recall": groups.planted,
                 f"{grid}.template.flagged": groups.template,
                 f"{grid}.near.flagged": groups.near}  # fmt: skip
        for start, positives in ranks.items():
            if positives:
                figures = ranked(draws, positives, groups.negatives)
                found |= {f"{start}.{figure}": value for figure, value in figures.items()}
        found |= {rate: flagged(draws, members) for rate, members in rates.items() if members}
    return found | text_alone(case)


def measure_near(case: Case) -> Figures:
    """Return the figures of captions near a memorized one, by their keys."""
    own = {*case.groups.controls}
    captions = [c for i, c in enumerate(case.model.captions()) if i not in own]
    found = measure_families(case.subject.denoiser, case.calibration, captions)
    start = f"detection.{case.model.name}."
    return {
        f"{start if name == 'family_recall' else f'grid.{start}'}{name}": figure
        for name, figure in found.items()
    }


def text_alone(case: Case) -> Figures:
    """Return how well the text embedding tells planted captions, without any network.

    What it separates the text encoder has learnt: figures of such a model say little of others.
    """
    groups, name = case.groups, case.model.name
    rows = coordinates(embedded(case.subject.denoiser, groups.texts))[None]
    count = directions_for(len(groups.controls))
    by_method = {
        "magnitude": magnitudes(rows, groups.controls),
        "residual": residuals(rows, rows[:, groups.controls], count),
    }
    figures = {
        method: ranked(draws, groups.planted, groups.negatives)
        for method, draws in by_method.items()
    }
    largest = max(figures, key=lambda method: figures[method]["auc"].value)
    print(f"{name}: of the text alone, its {largest} tells planted captions best")
    return {f"detection.{name}.text_alone_auc": figures[largest]["auc"]} | {
        f"grid.detection.{name}.text_alone.{method}.{part}": figure
        for method, parts in figures.items() for part, figure in parts.items()
    }  # fmt: skip


@torch.inference_mode()
def embedded(denoiser: Denoiser, texts: Sequence[str]) -> Tensor:
    """Return embeddings of all tokens minus those of the empty prompt, [prompt number] float64."""
    empty = denoiser.encode([""]).embeddings
    parts = [
        (denoiser.encode(texts[start : start + ENCODED_AT_ONCE]).embeddings - empty).flatten(1)
        for start in range(0, len(texts), ENCODED_AT_ONCE)
    ]
    return torch.cat(parts).double()


def coordinates(rows: Tensor) -> Tensor:
    """Return points [row row] that lie to each other and to zero as `rows` [row number] do.

    All that norms and residuals depend on, of embeddings that are far longer than they are many.
    """
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors * values.clamp(min=0).sqrt()


PARTS = {
    "accuracy": measure_accuracy, "two_stage": measure_two_stage, "near": measure_near,
    "grid": measure_grid, "rivals": measure_rivals, "speed": measure_speed,
    "memory": measure_memory, "observer": measure_observer, "audit": measure_audit,
}  # fmt: skip
"""What is measured of each model; each returns figures by their keys."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen parts of the chosen models; each part's figures are written at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, help="takes the figures, for a trial")
    args = parser.parse_args(argv)
    logging.getLogger("unmemorize").setLevel(logging.ERROR)  # prompts of other domains may be cut
    for model in chosen_models(args.models):
        case = Case.of(model, args.work)
        for part in args.only:
            if figures := PARTS[part](case):
                record(figures, command_of("detection", argv), output=args.output)


if __name__ == "__main__":
    main()
