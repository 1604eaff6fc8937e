"""Concept subtraction over one whole training: what a concept adds to predictions is not taught.

For samples that show the concept, the target loses what the concept's adapter adds to the base
model's prediction: target - gain x (prediction with the adapter - prediction without it), both
without the LoRA that is trained. A loss of prediction - target is the same when the prediction
gains what the target should lose, so no trainer has to say what its target is.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arrays import Float, Tensor, widened
from ..files.weights import file_sha256
from ..wording import name_some
from .concept.adapter import ConceptAdapter, ConceptSwitch
from .concept.concept import named_words
from .filter.sample_log import Sample
from .settings import SubtractedConcept, SubtractionSettings

logger = logging.getLogger(__name__)

COUNTS = ("visits", "subtracted", "changed")
"""Of samples of this process: all, those that show the concept, those whose prediction its adapter
changed."""


class NothingSubtracted(RuntimeError):
    """A concept was to be subtracted, and no sample of the training shows it."""


class SubtractedTraining:
    """Made from the settings, `fit` to the training set, then asked in each step."""

    def __init__(self, settings: SubtractionSettings):
        self.settings = settings
        self.concepts: list[_Concept] = []
        """Once they are loaded."""
        self.asked = False
        """Whether a step has come by."""

    def fit(self, captions: Collection[str], files: Collection[str] | None = None) -> None:
        """Load the concepts, and check that the training set holds samples that show them.

        Args:
            captions: Of the training set; without any, its captions are not known.
            files: Images of the training set; None where they are not known.

        Raises:
            ModelError: A concept's file is damaged, or does not show what it learnt.
            NothingSubtracted: No sample shows a concept.
        """
        self.concepts = [_Concept(each) for each in self.settings.concepts]
        for each in self.concepts:
            each.check_set(captions, files)
            logger.info(
                "Concept subtraction: %s, from %s, %g times what its adapter adds",
                each.wanted.file.name, each.described(), self.settings.gain,
            )  # fmt: skip

    def showing(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Return by concept the rows of a step's batch that show it, and count them."""
        self.asked = True
        return [each.showing(samples) for each in self.concepts]

    def added(
        self,
        rows: Tensor,
        shown: Sequence[Collection[int]],
        *,
        network: nn.Module,
        predict: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, " shown *latent"]:
        """Return gain x what the concepts add to some rows, in float32 or wider.

        The caller switches the trained LoRA off and leaves no trace in the random state.

        Args:
            rows: Of the batch that show any of the concepts, [shown].
            shown: By concept those that show it.
            network: The bare network, whose layers the adapters belong to.
            predict: Returns the step's prediction at some rows [row], with the same random numbers
                every time.

        Raises:
            ModelError: The network is not the one that a concept was learnt on.
        """
        base = widened(predict(rows))
        total = torch.zeros_like(base)
        for concept, its in zip(self.concepts, shown, strict=True):
            mine = torch.tensor([int(row) in its for row in rows], device=base.device)
            if not mine.any():
                continue
            # All rows: dropout draws the same only for the same batch.
            with concept.switch(network).on():
                change = widened(predict(rows)) - base
            change = change * mine.view(-1, *[1] * (change.ndim - 1))
            concept.counts["changed"] += int(change.flatten(1).any(1).sum())
            total += change
        return self.settings.gain * total

    @property
    def seen(self) -> bool:
        """Whether a sample has come by."""
        return any(each.counts["visits"] for each in self.concepts)

    def scalars(self) -> dict[str, float]:
        """Return values to log next to the loss; none before a sample was seen."""
        counts = [each.counts for each in self.concepts if each.counts["visits"]]
        shares = [each["subtracted"] / each["visits"] for each in counts]
        return {"subtracted_share": max(shares)} if shares else {}

    def account(self) -> dict[str, Any]:
        """Return what was subtracted, for the LoRA's metadata; no path of this machine is in it."""
        concepts = [each.account() | each.counts for each in self.concepts]
        return {"gain": self.settings.gain, "concepts": concepts}

    def state_dict(self) -> list[dict[str, int]]:
        """Return what a resumed training needs, plain data."""
        return [dict(each.counts) for each in self.concepts]

    def load_state_dict(self, state: Sequence[Mapping[str, int]]) -> None:
        """Continue from `state_dict`, of a training with as many concepts."""
        for concept, counts in zip(self.concepts, state, strict=True):
            concept.counts = {name: int(counts[name]) for name in COUNTS}

    def finish(self) -> None:
        """Log how often each concept was subtracted.

        Raises:
            NothingSubtracted: One never was.
        """
        faults = []
        for each in self.concepts:
            name, counts = each.wanted.file.name, each.counts
            if not counts["subtracted"]:
                faults.append(
                    f"{name} was never subtracted: none of {counts['visits']} samples is among "
                    f"{each.described()}."
                )
            elif not counts["changed"]:
                faults.append(f"{name} changed none of {counts['subtracted']} predictions.")
            logger.info(
                "Concept subtraction: %s from %d of %d samples",
                name, counts["subtracted"], counts["visits"],
            )  # fmt: skip
        if faults or not self.concepts:
            raise NothingSubtracted(" ".join(faults) or "No concept was ever loaded.")


class _Concept:
    """One concept with its counts."""

    def __init__(self, wanted: SubtractedConcept):
        self.wanted, self.counts = wanted, dict.fromkeys(COUNTS, 0)
        self._adapter = ConceptAdapter.load(wanted.file)
        self._files = None if wanted.listed is None else frozenset(wanted.listed)
        self._switch: ConceptSwitch | None = None

    def described(self) -> str:
        """Say in words which samples it is subtracted from."""
        if self._files is not None:
            return f"the {len(self._files)} images of {self.wanted.samples}"
        if self.wanted.samples == "all":
            return "all samples"
        return f"samples whose captions name {name_some(self._adapter.names)}"

    def check_set(self, captions: Collection[str], files: Collection[str] | None) -> None:
        """Raise NothingSubtracted where the training set is known and nothing of it is meant."""
        names, file = self._adapter.names, self.wanted.file.name
        others = (
            "Say which samples show it: --subtract_samples with the list that `unmemorize concept "
            "find` writes, or all."
        )
        if self._files is not None:
            if files is not None and not any(self._lists(name) for name in files):
                raise NothingSubtracted(
                    f"{file}: none of the training's {len(files)} images stands in "
                    f"{self.wanted.samples}, which lists {name_some(sorted(self._files), 2)}. "
                    "Write the list anew for this folder: unmemorize concept find"
                )
        elif self.wanted.samples == "named" and not names:
            raise NothingSubtracted(f"{file} has no name that captions could hold. {others}")
        elif self.wanted.samples == "named" and captions:
            if not any(named_words(names, caption) is not None for caption in captions):
                raise NothingSubtracted(
                    f"{file}: none of {len(captions)} captions names {name_some(names)}. {others}"
                )

    def showing(self, samples: Sequence[Sample]) -> list[int]:
        """Return the rows of a step's batch that show the concept, and count them."""
        rows = [row for row, sample in enumerate(samples) if self._is_shown_by(sample)]
        self.counts["visits"] += len(samples)
        self.counts["subtracted"] += len(rows)
        return rows

    def switch(self, network: nn.Module) -> ConceptSwitch:
        """Return what puts the adapter on a network, made at its first use."""
        if self._switch is None:
            self._switch = ConceptSwitch(network, self._adapter)
        return self._switch

    def account(self) -> dict[str, Any]:
        """Return what the LoRA's metadata say of the concept."""
        samples = "listed" if self._files is not None else self.wanted.samples
        return {
            "file": self.wanted.file.name,
            "sha256": file_sha256(self.wanted.file),
            "names": list(self._adapter.names),
            "samples": samples,
        }

    def _is_shown_by(self, sample: Sample) -> bool:
        if self._files is not None:
            return self._lists(sample.file)
        return (
            self.wanted.samples == "all"
            or named_words(self._adapter.names, sample.caption) is not None
        )

    def _lists(self, file: str) -> bool:
        return self._files is not None and str(Path(file).resolve()) in self._files
