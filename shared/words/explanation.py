"""Explanation: which words of a prompt make its score high, and what their removal does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..arrays import Float, Tensor
from ..score.config import DetectionConfig
from ..score.denoiser import Conditioning, Denoiser, InputsEncoder, Token
from ..score.metrics import difference_map
from .gradients import TokenGradients, encoder_gradient, input_gradient
from .leaving_out import Occlusion, leave_out, leave_out_each, shortened

Method = Literal["leave_out", "input_gradient", "encoder_gradient"]
METHODS: tuple[Method, ...] = get_args(Method)

LEFT_OUT = 24
"""Words of one prompt that `leave_out` leaves out, where a gradient can choose among more."""
CONFIRMED = 3
"""Words that are left out after a gradient ranked them: it is local, and may be wrong."""
SUGGESTED = 3
"""Sentences about words whose removal lowers the score."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Where in the prompt, and where in the latent, the text-conditional prediction comes from."""

    prompt: str
    method: Method = "leave_out"
    words: tuple[str, ...]
    """As typed."""
    significance: tuple[float, ...]
    """Per word, >= 0. `leave_out`: how far the prediction changes without it (L2 norm, latent
    units; NaN for words that were not tried). Gradients: their L2 norm over the word's tokens. 0
    for words that the text encoder did not read."""
    tokens: tuple[Token, ...] = ()
    """What `token_significance` belongs to; start, end and padding included."""
    token_significance: tuple[float, ...] = ()
    """Per token, of the gradient methods."""
    occlusions: tuple[Occlusion, ...]
    """Of the words that were left out, greatest change of the prediction first."""
    difference_map: Float[Tensor, " *place"]
    """log(1 + D squared summed over channels) at the first seed and step, on the CPU."""
    notes: tuple[str, ...] = ()
    """Sentences on what was not measured."""

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Return what leaving the strongest words out does, where that clearly lowers the score."""
        return tuple(str(o) for o in self.occlusions if o.telling)[:SUGGESTED]

    @property
    def ranked(self) -> tuple[int, ...]:
        """Return the words that carry some of the score, the strongest first, as indices."""
        carrying = [i for i, value in enumerate(self.significance) if value > 0]  # NaN is not
        return tuple(sorted(carrying, key=lambda i: -self.significance[i]))


def explain(
    denoiser: Denoiser,
    prompt: str,
    config: DetectionConfig | None = None,
    *,
    method: Method = "leave_out",
    occlude: int | None = None,
) -> Explanation:
    """Explain the score of a prompt by its words.

    ``leave_out`` scores the prompt without each of its words: a forward row a word and seed, and
    two more a seed. What it says of a word was measured, and it ranks words as their removal
    changes the image; one seed is enough. Of a prompt with more than `occlude` words, those are
    left out that ``input_gradient`` ranks first, where the host can differentiate through its text
    encoder; else all.

    ``input_gradient`` and ``encoder_gradient`` (the published one) cost a few forward rows, however
    long the prompt: see `gradients`. A gradient is local: a word of great significance need not
    lower the score when it goes. Therefore its first words are left out as well.

    Args:
        denoiser: The network.
        prompt: Any string; one without words has an empty explanation.
        config: Seeds and steps; None for the first step of seed 0.
        method: What ranks the words.
        occlude: How many words are left out, one at a time; None for `LEFT_OUT` or, with a
            gradient, the `CONFIRMED` most significant.

    Raises:
        ValueError: The method is not known, or the host cannot do it.
        PredictionError: A prediction or gradient is NaN or infinite.
    """
    config = config or DetectionConfig(seeds=(0,))
    _check(denoiser, method, occlude)
    if method == "leave_out":
        return _by_leaving_out(denoiser, [prompt], config, occlude or LEFT_OUT)[0]
    cond = denoiser.encode([prompt]).detached()
    words = cond.words[0] if cond.words else ()
    read = _read_words(cond, 0)
    if method == "input_gradient":
        assert isinstance(denoiser, InputsEncoder)  # by `_check`
        found = input_gradient(denoiser, prompt, config)
    else:
        found = encoder_gradient(denoiser, prompt, cond, config)
    explanation = _by_gradient(prompt, words, read, method, found)
    first = explanation.ranked[: CONFIRMED if occlude is None else occlude]
    shorter = shortened(prompt, words, first)
    return replace(explanation, occlusions=leave_out(denoiser, prompt, words, shorter, config))


def explain_each(
    denoiser: Denoiser, prompts: Sequence[str], config: DetectionConfig
) -> list[Explanation]:
    """Explain several prompts as `explain` does one, by ``leave_out`` in the same forward passes.

    Args:
        denoiser: The network.
        prompts: Any strings.
        config: Seeds and steps.

    Raises:
        PredictionError: A prediction or gradient is NaN or infinite.
    """
    return _by_leaving_out(denoiser, prompts, config, LEFT_OUT)


def _by_leaving_out(
    denoiser: Denoiser, prompts: Sequence[str], config: DetectionConfig, most: int
) -> list[Explanation]:
    """Leave out each word of each prompt, or those that a gradient ranks first."""
    cond, wishes, gathered = denoiser.encode(prompts).detached(), [], []
    for row, prompt in enumerate(prompts):
        words = cond.words[row] if cond.words else ()
        read = _read_words(cond, row)
        chosen, heat, notes = list(read), None, _cut_note(words, read)
        if len(read) > most:
            if isinstance(denoiser, InputsEncoder):
                found = input_gradient(denoiser, prompt, config)
                strength, heat = found.of_words(len(words)), found.difference_map
                chosen = sorted(sorted(read, key=lambda i: -strength[i])[:most])
                notes += (
                    f"Of {len(read)} words, {most} were left out, those that the gradient at the "
                    "text encoder's input ranks first. The others were not measured.",
                )
            else:
                notes += (
                    f"All {len(read)} words were left out: this host cannot differentiate through "
                    "its text encoder, to choose among them.",
                )
        wishes.append((prompt, words, shortened(prompt, words, chosen)))
        gathered.append((read, heat, notes))
    explanations = []
    for (prompt, words, _), (read, heat, notes), (occlusions, added) in zip(
        wishes, gathered, leave_out_each(denoiser, wishes, config), strict=True
    ):
        changes = {occlusion.index: occlusion.change for occlusion in occlusions}
        tried = dict.fromkeys(read, math.nan) | changes
        if heat is None:
            heat = difference_map(added[:1].view(1, *denoiser.latent_shape))[0]
        explanations.append(Explanation(
            prompt=prompt, words=words, occlusions=occlusions, notes=notes, difference_map=heat,
            significance=tuple(tried.get(index, 0.0) for index in range(len(words))),
        ))  # fmt: skip
    return explanations


def _by_gradient(
    prompt: str, words: Sequence[str], read: Sequence[int], method: Method, found: TokenGradients
) -> Explanation:
    return Explanation(
        prompt=prompt, method=method, words=tuple(words), notes=_cut_note(words, read),
        significance=tuple(found.of_words(len(words))), tokens=found.tokens,
        token_significance=found.values, occlusions=(), difference_map=found.difference_map,
    )  # fmt: skip


def _read_words(cond: Conditioning, row: int) -> list[int]:
    """Return which words stand at a position of the embeddings; all where positions are unknown."""
    if not (cond.tokens and cond.tokens[row]):
        return list(range(len(cond.words[row]) if cond.words else 0))
    return sorted({token.word for token in cond.tokens[row] if token.word is not None})


def _cut_note(words: Sequence[str], read: Sequence[int]) -> tuple[str, ...]:
    """Return what to say of the words that the text encoder did not read."""
    cut = [index for index in range(len(words)) if index not in set(read)]
    if not cut:
        return ()
    return (
        f"The text encoder does not read {len(cut)} of {len(words)} words, from "
        f"“{words[cut[0]][:40]}” on: the score does not depend on them. Without another word, the "
        "next of them are read in its place.",
    )


def _check(denoiser: Denoiser, method: str, occlude: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    least = 1 if method == "leave_out" else 0
    if occlude is not None and occlude < least:
        raise ValueError(f"`occlude` must be at least {least} with {method}, got {occlude}.")
    if method == "input_gradient" and not isinstance(denoiser, InputsEncoder):
        raise ValueError(
            "This host cannot differentiate through its text encoder, as input_gradient does. "
            "Choose leave_out or encoder_gradient."
        )
