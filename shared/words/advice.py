"""Prompt advice: the smallest edits of a prompt that bring its score under a threshold.

The words to touch come from the explanation, and every edit is scored: what is promised here was
measured, with the seeds and steps of the config. It is the lowest of several scores, and other
seeds have others: a score under the threshold is not a proof that nothing comes out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..score.config import DetectionConfig
from ..score.control_basis import ControlBasis
from ..score.denoiser import Denoiser
from ..score.detection import Progress, detect
from .edits import Edit, Kind, Plan, apply, core, move_parts
from .explanation import Explanation, explain
from .phrases import is_function_word, without_words


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An edited prompt and what became of its score."""

    prompt: str
    """With the edits, the rest as typed."""
    edits: tuple[Edit, ...]
    score_before: float
    """Mean over seeds and steps, as the threshold's calibration scores."""
    score_after: float
    under_threshold: bool
    """Whether the prompt would no longer be flagged."""

    @property
    def kind(self) -> Kind:
        """Return what was done, "mixed" when it was not one thing."""
        kinds = {edit.kind for edit in self.edits}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def words(self) -> tuple[str, ...]:
        """Return the words touched, as typed."""
        return sum((edit.words for edit in self.edits), ())

    @property
    def size(self) -> int:
        """Return how many words were dropped, replaced or moved, those along with them aside."""
        return len(self.words)

    def __str__(self) -> str:
        return (
            f"{', '.join(map(str, self.edits))}: the score changes from {self.score_before:.3g} "
            f"to {self.score_after:.3g}"
        )


@dataclass(frozen=True, kw_only=True)
class Advice:
    """How a prompt could be reworded, as far as it was tried."""

    prompt: str
    score: float
    """Of the prompt as typed."""
    threshold: float
    """Scores above it are flagged."""
    candidates: tuple[Candidate, ...]
    """All that were scored, smallest edit first, then lowest score."""

    @property
    def best(self) -> Candidate | None:
        """Return the smallest edit under the threshold, the lowest score among equals."""
        return next((each for each in self.candidates if each.under_threshold), None)

    def __str__(self) -> str:
        """Return the advice as a sentence."""
        limit = f"the threshold, {self.threshold:.3g}"
        if self.score <= self.threshold:
            return f"Nothing has to change: the score, {self.score:.3g}, is not above {limit}."
        if self.best is not None:
            return f"{self.best}, not above {limit}."
        tried = f"None of the {len(self.candidates)} edits tried brings the score to {limit}."
        lowest = min(self.candidates, key=lambda each: each.score_after, default=None)
        return tried if lowest is None else f"{tried} The lowest: {lowest}."


def advise(
    denoiser: Denoiser,
    prompt: str,
    threshold: float,
    config: DetectionConfig | None = None,
    *,
    basis: ControlBasis | None = None,
    explanation: Explanation | None = None,
    replacements: Mapping[str, Sequence[str]] | None = None,
    budget: int = 48,
    top: int = 5,
    largest: int = 2,
    progress: Progress | None = None,
) -> Advice:
    """Search the smallest edits that bring the score of a prompt to `threshold` or below.

    Edits are dropping or replacing one of the `top` words that mean something, and moving whole
    comma-separated parts. With a word go the function words that need it: what is offered stays a
    phrase, as far as `phrases` can tell. All edits of one size are scored in one run of `detect`;
    sizes grow until one has a success. Of two and more words, those go first whose single effects
    add up to most. Moved parts of more than `largest` words come last.

    Args:
        denoiser: The network.
        prompt: Any string.
        threshold: Of the calibration for this model and config; scores above it are flagged.
        config: Seeds and steps, as in the calibration.
        basis: Of the calibration's controls where it judges by residuals.
        explanation: Of this prompt, when it is there already; otherwise its words are left out in
            turn, with the config's first seed.
        replacements: Stand-ins by word, in any case, without punctuation, e.g. {"Mona": ["a"]};
            words not in it are not replaced, and None replaces none: which words can stand for
            another is not known.
        budget: Edited prompts that are scored, at most.
        top: How many of the most significant words are touched.
        largest: Words touched at the same time, at most, moved parts aside.
        progress: Called with the number of prompts scored since the last call.

    Raises:
        ValueError: An argument is out of range, or the explanation is of another prompt.
        PredictionError: A prediction or gradient is NaN or infinite.
    """
    config = config or DetectionConfig()
    _check(threshold, replacements, {"budget": budget, "top": top, "largest": largest})
    if explanation is not None and explanation.prompt != prompt:
        raise ValueError(
            f"The explanation is of {explanation.prompt[:200]!r}, expected one of {prompt[:200]!r}."
        )
    score = detect(denoiser, [prompt], config, basis=basis, progress=progress).scores.item()
    candidates: list[Candidate] = []
    if score > threshold:
        one_seed = replace(config, seeds=config.seeds[:1])  # enough to rank words by
        explanation = explanation or explain(denoiser, prompt, one_seed)

        def score_all(texts: list[str]) -> list[float]:
            measured = detect(denoiser, texts, config, basis=basis, progress=progress)
            return measured.scores.tolist()

        search = _Search(prompt, explanation.words, score, threshold, budget, score_all)
        search.run(_word_edits(explanation, top, replacements), largest)
        candidates = sorted(search.tried, key=lambda each: (each.size, each.score_after))
    return Advice(prompt=prompt, score=score, threshold=threshold, candidates=tuple(candidates))


@dataclass
class _Search:
    """What was tried on one prompt so far."""

    prompt: str
    words: Sequence[str]
    score: float
    threshold: float
    budget: int
    score_all: Callable[[list[str]], list[float]]
    tried: list[Candidate] = field(default_factory=list)

    def run(self, edits: Sequence[Edit], largest: int) -> None:
        """Try edits by size until one brings the score under the threshold."""
        parts = move_parts(self.prompt, self.words)
        late = [plan for plan in parts if len(plan[0][0].indices) > largest]
        kept = min(len(late), self.budget // 4)  # pairs alone could use up everything
        plans: list[tuple[Edit, ...]] = [(edit,) for edit in edits]
        for size in range(1, largest + 1):
            fitting = [plan for plan in parts if len(plan[0][0].indices) == size]
            texts = [(plan, self._edited(plan)) for plan in plans]
            if self._try([*fitting, *texts], keep=kept):
                return
            plans = self._longer(size)
        self._try(late, keep=0)

    def _edited(self, edits: Sequence[Edit]) -> str:
        """Return the prompt with words replaced and dropped."""
        replaced = [edit for edit in edits if edit.kind == "replace"]
        words = list(self.words)
        for edit in replaced:
            (index,), (word,) = edit.indices, edit.words
            first, last = core(word)
            words[index] = word[:first] + edit.to + word[last:]
        gone = {edit.indices[0] for edit in edits if edit.kind == "drop"}
        return without_words(apply(self.prompt, self.words, replaced), words, gone)

    def _try(self, plans: Sequence[Plan], *, keep: int) -> bool:
        """Score the new among `plans` in one run; return whether anything is under the threshold.

        The last `keep` of the budget is left for later.
        """
        new: dict[tuple[str, ...], Plan] = {}  # white space alone makes no other prompt
        known = {tuple(text.split()) for text in ("", self.prompt, *(f.prompt for f in self.tried))}
        for plan in plans:
            if (key := tuple(plan[1].split())) not in known:
                new.setdefault(key, plan)
        chosen = list(new.values())[: max(0, self.budget - len(self.tried) - keep)]
        scores = self.score_all([text for _, text in chosen]) if chosen else []
        self.tried += [
            Candidate(prompt=text, edits=edits, score_before=self.score, score_after=after,
                      under_threshold=after <= self.threshold)
            for (edits, text), after in zip(chosen, scores, strict=True)
        ]  # fmt: skip
        return any(each.under_threshold for each in self.tried)

    def _longer(self, size: int) -> list[tuple[Edit, ...]]:
        """Return edits of one word more, first those whose effects add up to the lowest score."""
        plain = [each for each in self.tried if not any(edit.part for edit in each.edits)]
        singles = [each for each in plain if each.size == 1]
        estimates: dict[tuple[Edit, ...], float] = {}
        for shorter in (each for each in plain if each.size == size):
            touched = {index for edit in shorter.edits for index in edit.indices}
            for single in singles:
                if touched.isdisjoint(single.edits[0].indices):
                    longer = sorted((*shorter.edits, *single.edits), key=lambda e: e.indices)
                    estimates.setdefault(tuple(longer), shorter.score_after + single.score_after)
        return sorted(estimates, key=estimates.__getitem__)


def _word_edits(
    explanation: Explanation, top: int, replacements: Mapping[str, Sequence[str]] | None
) -> list[Edit]:
    """Return all edits of one of the `top` words, those of the most significant word first."""
    by_word = {word.casefold(): texts for word, texts in (replacements or {}).items()}
    edits = []
    meant = [i for i in explanation.ranked if not is_function_word(explanation.words[i])]
    for index in meant[:top]:
        word = explanation.words[index]
        first, last = core(word)
        texts = by_word.get(word[first:last].casefold(), ())
        changes: list[tuple[Kind, str]] = [("drop", ""), *(("replace", text) for text in texts)]
        edits += [Edit(kind=kind, indices=(index,), words=(word,), to=to) for kind, to in changes]
    return edits


def _check(
    threshold: float, replacements: Mapping[str, Sequence[str]] | None, counts: Mapping[str, int]
) -> None:
    if not math.isfinite(threshold):
        raise ValueError(f"`threshold` must be finite, got {threshold}.")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    for word, texts in (replacements or {}).items():
        if isinstance(texts, str):  # would be taken for its letters
            raise ValueError(
                f"`replacements` must hold a list per word, got {texts!r} for {word!r}."
            )
