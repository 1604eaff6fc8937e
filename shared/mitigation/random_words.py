"""Random words in the prompt: the baseline that other methods must beat.

Somepalli et al., NeurIPS 2023, arXiv:2305.20086.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from ..score.controls import CONTROLS, load_controls
from .method import Method, Mitigation, Start


@dataclass(frozen=True, kw_only=True)
class RandomInsertion(Method):
    """Insert random words at random places and encode the prompt again.

    Modified: words come from a list of this project, not from the tokenizer's vocabulary, which
    holds halves of words.
    """

    name: ClassVar[str] = "random_words"

    count: int = 4
    """Insertions, at least 0 (authors' code: rand_aug_repeats, 4); 0 changes nothing."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"`count` must be at least 0, got {self.count}.")

    def start(self, start: Start) -> Mitigation:
        """Return the conditioning of the changed prompts.

        Raises:
            ValueError: The host was given embeddings instead of prompts.
        """
        if self.count == 0:
            return Mitigation()
        if not start.prompts:
            raise ValueError(
                "Random insertion needs the prompts' text, and the pipeline was given embeddings: "
                "call it with `prompt`, or choose another method."
            )
        return Mitigation(cond=start.denoiser.encode(self.changed(start.prompts, start.generator)))

    def changed(self, prompts: Sequence[str], generator: torch.Generator) -> list[str]:
        """Return the prompts with insertions, the rest as typed.

        What a prompt gets depends on the generator and the prompt alone, not on its neighbours in
        the batch; when it is there several times, each gets its own.
        """
        run = int(torch.randint(2**31, (), generator=generator))
        return [
            self._insert(prompt, f"{run}/{prompts[:row].count(prompt)}/{prompt}")
            for row, prompt in enumerate(prompts)
        ]

    def _insert(self, prompt: str, seed: str) -> str:
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        words = prompt.split(" ") if prompt else []
        for _ in range(self.count):
            word = vocabulary()[_draw(generator, len(vocabulary()))]
            words.insert(_draw(generator, len(words) + 1), word)
        return " ".join(words)


@cache
def vocabulary() -> tuple[str, ...]:
    """Return the longer words of the bundled control prompts, sorted."""
    text = " ".join(line for name in CONTROLS for line in load_controls(name))
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,}\b", text))))


def _draw(generator: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=generator))
