"""The similarity matrix to look at: training images down, kinds of prompts across, on and off."""

from dataclasses import dataclass

import numpy as np

from ...shared.drawing.heatmap import LEVELS
from .result import MARKS, MATRIX, Asked, Generation, ImageVerdict, LoraAudit, Mark

ROWS, HELD_OUT_ROWS = 40, 10
"""At most so many images are shown, those that come nearest first."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One kind of prompt."""

    title: str
    asked: tuple[Asked, ...]
    own: bool | None
    """With the image's own caption, with those of others, or either."""
    lora: bool

    def fits(self, generation: Generation, image: int) -> bool:
        """Return whether a generation's prompt is of this kind, as seen from an image."""
        own = self.own is None or self.own == (generation.source == image)
        return generation.asked in self.asked and generation.lora == self.lora and own


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The nearest that one kind of prompt came to one training image."""

    generation: int
    """Position of the generation."""
    twin: int | None
    """Of the same prompt and seed with the LoRA the other way; the attack has none."""
    similarity: float
    level: int
    """Strength of the colour, 0 to `LEVELS`."""
    mark: Mark
    """Of the generation against the image."""

    @property
    def text(self) -> str:
        """Return .98 for 0.98, so that columns stay narrow; nothing but an equal image reads 1."""
        text = f"{min(self.similarity, 0.994):.2f}" if self.similarity < 1 else "1"
        return text.replace("0.", ".", 1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training image."""

    image: int
    verdict: ImageVerdict | None
    """None for held-out images."""
    cells: tuple[Cell | None, ...]
    """One a column."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The matrix as a table."""

    columns: tuple[Column, ...]
    """LoRA on and off side by side."""
    rows: tuple[Row, ...]
    """Gravest verdict first, then highest similarity."""
    held_out: tuple[Row, ...]
    ground: float
    """Similarity without colour: the median of the cells with the LoRA off."""

    def shown(self) -> list[int]:
        """Return the positions of all generations that its cells stand for, rising."""
        cells = [cell for row in (*self.rows, *self.held_out) for cell in row.cells if cell]
        return sorted({n for cell in cells for n in (cell.generation, cell.twin) if n is not None})


_WAYS: tuple[tuple[str, tuple[Asked, ...], bool | None], ...] = (
    ("own caption", ("caption",), True),
    ("own, reworded", ("paraphrase",), True),
    ("example prompts", ("example",), None),
    ("other captions", ("caption", "paraphrase"), False),
    ("trigger word", ("trigger",), None),
    ("no words", ("empty",), None),
    ("attack", ("attack",), None),
)


def load_matrix(audit: LoraAudit) -> np.ndarray:
    """Return the similarities [generation image] from an audit's folder.

    Raises:
        ValueError: The file does not fit the audit.
    """
    with np.load(audit.folder / MATRIX, allow_pickle=False) as file:
        matrix = file["matrix"]
    expected = (len(audit.generations), len(audit.training.images))
    if matrix.shape != expected:
        raise ValueError(f"{MATRIX} has shape {matrix.shape}, expected {expected}.")
    return matrix


def load_marks(audit: LoraAudit) -> np.ndarray:
    """Return the marks [generation image] from an audit's folder: 0 none, 1 near, 2 verbatim."""
    with np.load(audit.folder / MATRIX, allow_pickle=False) as file:
        return file["marks"]


def make_grid(audit: LoraAudit, matrix: np.ndarray, marks: np.ndarray) -> Grid:
    """Return similarities and marks [generation image] as a table."""
    columns = _columns(audit)
    rank = audit.ranked[:ROWS]
    apart = [n for n, image in enumerate(audit.training.images) if image.held_out]
    apart.sort(key=lambda n: (-matrix[:, n].max(initial=0), n))
    bests = {
        image: [_nearest(audit, matrix, image, column) for column in columns]
        for image in (*(v.image for v in rank), *apart[:HELD_OUT_ROWS])
    }
    off = [matrix[best, image] for image, row in bests.items()
           for column, best in zip(columns, row, strict=True)
           if best is not None and not column.lora]  # fmt: skip
    ground = float(np.median(off)) if off else 0.0
    twins = twins_of(audit)

    def row(image: int, verdict: ImageVerdict | None) -> Row:
        cells = (best if best is None else
                 _cell(best, twins.get(best), float(matrix[best, image]), ground,
                       MARKS[marks[best, image]])
                 for best in bests[image])  # fmt: skip
        return Row(image=image, verdict=verdict, cells=tuple(cells))

    return Grid(
        columns=columns, ground=ground, rows=tuple(row(v.image, v) for v in rank),
        held_out=tuple(row(image, None) for image in apart[:HELD_OUT_ROWS]),
    )  # fmt: skip


def twins_of(audit: LoraAudit) -> dict[int, int]:
    """Return by position the generation of the same prompt and seed, the LoRA the other way."""

    def key(generation: Generation, lora: bool) -> tuple[object, ...]:
        return generation.asked, generation.source, generation.prompt, generation.seed, lora

    known = {key(g, g.lora): n for n, g in enumerate(audit.generations)}
    twins = ((n, known.get(key(g, not g.lora))) for n, g in enumerate(audit.generations))
    return {n: twin for n, twin in twins if twin is not None}


def _columns(audit: LoraAudit) -> tuple[Column, ...]:
    """Return the kinds of prompts that there are."""
    known = {(generation.asked, generation.lora) for generation in audit.generations}
    every = (Column(title=title, asked=asked, own=own, lora=lora)
             for title, asked, own in _WAYS for lora in (True, False))  # fmt: skip
    return tuple(c for c in every if any((asked, c.lora) in known for asked in c.asked))


def _nearest(audit: LoraAudit, matrix: np.ndarray, image: int, column: Column) -> int | None:
    """Return the generation of a column that is nearest to an image; None when it has none."""
    some = [n for n, g in enumerate(audit.generations) if column.fits(g, image)]
    return max(some, key=lambda n: matrix[n, image], default=None)


def _cell(generation: int, twin: int | None, similarity: float, ground: float, mark: Mark) -> Cell:
    part = (similarity - ground) / max(1 - ground, 1e-6)
    return Cell(
        generation=generation, twin=twin, similarity=similarity, mark=mark,
        level=round(LEVELS * min(max(part, 0), 1)),
    )  # fmt: skip
