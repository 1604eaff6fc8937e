"""The residual score at every setting that was weighed for it, evaluated from a record."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from figures import Figure
from torch import Tensor
from unmemorize.audit.common.subject import Subject
from unmemorize.shared.score.control_basis import FOLDS, TOLD, directions_for
from unmemorize.shared.score.trajectory import PredictionError

from .case import Case, magnitudes, over_seeds, residuals
from .groups import Groups, foreign_controls
from .ranking import measured

SHARES = (0.0, TOLD[0], 0.6, TOLD[1], 0.96)
"""Of the schedule that is behind where the network is told to be, while it reads pure noise."""
DIRECTIONS = (1, 4, 8, 16, 32, 64)
CONTROLS = (20, 50, 100, 200, 400)
SETS = 5
"""Of controls, drawn by chance from those there are, for each number below theirs."""
SHIPPED = "shipped"
"""Where the starting noises take turns at the shipped levels."""
DTYPES = ("bfloat16", "float16")
"""Of the network; everything else is measured in float32."""

Figures = dict[str, Figure]


def measure_grid(case: Case) -> Figures:
    """Print and return the figures of all settings, which their keys say.

    `told_28.directions_16.seeds_1`: the network was told the level behind 28 % of the schedule, 16
    directions were taken out, one seed. `shipped.directions_16.seeds_2`: the shipped levels in
    turns. `same_controls_50.shipped`: 50 controls of the model's own
    domain with as many directions as are shipped for them, at the shipped level and seeds.
    """
    start, groups = f"grid.detection.{case.model.name}", case.groups
    print(f"\n{case.model.name}: AUC, TPR at 1 % false, false positives calibrated at 1 %")
    found = by_level(case, start)
    own = case.shipped()
    found |= by_controls(own, own[:, groups.controls], groups, f"{start}.same_controls")
    for domain, texts in foreign_controls(case.model).items():
        controls = case.shipped(texts)
        found |= by_controls(own, controls, groups, f"{start}.{domain}_controls")
    return found | by_dtype(case, start)


def by_level(case: Case, start: str) -> Figures:
    """Return the figures by told level, number of directions and of seeds."""
    found, groups, seeds = {}, case.groups, len(case.config.seeds)
    levels = {f"told_{100 * share:.0f}": share for share in SHARES} | {SHIPPED: None}
    counts = {f"directions_{count}": count for count in usable(len(groups.controls))}
    for level, share in levels.items():
        differences = case.shipped() if share is None else case.differences(case.step(share))
        controls = differences[:, groups.controls]
        by_method = {"magnitude": magnitudes(differences, groups.controls)} | {
            name: residuals(differences, controls, count) for name, count in counts.items()
        }
        for method, by_seed in by_method.items():
            for drawn in range(1, seeds + 1) if level == SHIPPED else (1, seeds):
                draws = over_seeds(by_seed, drawn)
                found |= evaluated(draws, groups, f"{start}.{level}.{method}.seeds_{drawn}")
    for drawn in range(1, seeds + 1):
        print_table(
            f"seeds_{drawn}", levels, ("magnitude", *counts), f"{start}.{{}}.{{}}.seeds_{drawn}",
            found,
        )  # fmt: skip
    return found


def by_controls(own: Tensor, controls: Tensor, groups: Groups, start: str) -> Figures:
    """Return the figures by number of controls and of directions.

    Args:
        own: D of the model's captions, [seed caption element].
        controls: D of those to draw controls from, [seed control element].
        groups: Which captions are to be told apart.
        start: Of the keys.
    """
    found, there = {}, controls.shape[1]
    numbers = [*(n for n in CONTROLS if n < there), min(there, max(CONTROLS))]
    columns = ("shipped", *(f"directions_{count}" for count in DIRECTIONS))
    for number in numbers:
        sets = [
            torch.randperm(there, generator=torch.Generator().manual_seed(k))[:number].sort().values
            for k in range(SETS if number < there else 1)
        ]
        counts = {"shipped": directions_for(number)}
        counts |= {f"directions_{count}": count for count in usable(number)}
        for name, count in counts.items():
            draws = [
                over_seeds(residuals(own, controls[:, some], count), len(own))[0] for some in sets
            ]
            found |= evaluated(draws, groups, f"{start}_{number}.{name}")
    print_table(start.rsplit(".", 1)[1], numbers, columns, f"{start}_{{}}.{{}}", found)
    return found


def by_dtype(case: Case, start: str) -> Figures:
    """Return the shipped score's figures, and the magnitude's, where the network is narrower.

    With two seeds, one a told level.
    """
    found, controls = {}, case.groups.controls
    for dtype in DTYPES:
        narrow = replace(
            case, subject=Subject(case.model.model, dtype=dtype),
            config=replace(case.config, seeds=case.config.seeds[:2]),
        )  # fmt: skip
        try:
            first, told = narrow.differences(0), narrow.shipped(case.groups.texts)
        except (RuntimeError, PredictionError) as error:  # what a processor lacks, or overflows
            print(f"{case.model.name} in {dtype}: {str(error).splitlines()[0]}")
            continue
        by_method = {
            "magnitude": magnitudes(first, controls),
            "shipped": residuals(told, told[:, controls], directions_for(len(controls))),
        }
        for method, by_seed in by_method.items():
            draws = over_seeds(by_seed, len(by_seed))
            found |= evaluated(draws, case.groups, f"{start}.{dtype}.{method}")
    print_table("dtype", DTYPES, ("magnitude", "shipped"), f"{start}.{{}}.{{}}", found)
    return found


def usable(controls: int) -> list[int]:
    """Return the numbers of directions that so many controls have, those of a fold left out."""
    return [count for count in DIRECTIONS if count < controls - math.ceil(controls / FOLDS)]


def evaluated(draws: Sequence, groups: Groups, key: str) -> Figures:
    """Return the figures of scores under keys that begin with `key`."""
    figures = measured(draws, groups.planted, groups.negatives)
    return {f"{key}.{name}": figure for name, figure in figures.items()}


def print_table(
    corner: str, rows: Sequence, columns: Sequence[str], key: str, found: Figures
) -> None:
    """Print values of a plane of settings, where a setting was measured.

    Args:
        corner: What the rows are.
        rows: Fill the first gap of the keys.
        columns: Fill the second.
        key: With two gaps, to be followed by the name of a figure.
        found: The figures.
    """
    places = {"auc": 3, "tpr_at_1pct_fpr": 2, "false_positive_rate": 3}
    lines = []
    for row in rows:
        starts = [key.format(row, column) for column in columns]
        cells = [
            " ".join(f"{found[at].value:.{digits}f}" for name, digits in places.items()
                     if (at := f"{start}.{name}") in found)
            for start in starts
        ]  # fmt: skip
        if any(cells):
            lines.append(f"{row:<12}" + "".join(f"{cell or '-':>18}" for cell in cells))
    if lines:
        print("\n" + "\n".join([f"{corner:<12}" + "".join(f"{c:>18}" for c in columns), *lines]))
