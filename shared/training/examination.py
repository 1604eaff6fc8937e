"""A finished subspace looked at again: with another model, other prompts, a trained LoRA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .acceptance import COLLATERAL, RESIDUAL, collateral, residual, retained_energy
from .concept import Concept
from .subspace import ConceptSubspace
from .text_states import TextPath, differences


@dataclass(frozen=True, kw_only=True)
class PromptShare:
    """One prompt."""

    prompt: str
    named: str | None
    """First name of the concept that it names; None for none."""
    share: float
    """Of a named concept what lies outside the subspace, of other text what lies inside; 0..1."""

    @property
    def within(self) -> bool:
        """Whether the share is within the limit that holds for its kind."""
        return self.share <= (COLLATERAL if self.named is None else RESIDUAL)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a subspace does to the states of one text encoder."""

    residuals: Mapping[str, float]
    """By first name, the share of the concept in held-out sentences that lies outside."""
    collateral: float
    """Share of ordinary captions that lies inside."""
    prompts: tuple[PromptShare, ...] = ()
    """Prompts that were asked for."""

    @property
    def within(self) -> bool:
        """Whether both acceptance limits hold; single prompts do not count."""
        most = max(self.residuals.values(), default=0.0)
        return most <= RESIDUAL and self.collateral <= COLLATERAL


def concepts_of(provenance: Mapping[str, Any]) -> tuple[Concept, ...]:
    """Return the concepts that a subspace was built from.

    Raises:
        ValueError: The provenance names none: the subspace was not built from words alone.
    """
    if "learnt" in provenance:
        raise ValueError(
            "The subspace was learnt from pictures, and the word for them is known only while it "
            "is built: build it again."
        )
    try:
        templates = tuple(provenance["templates"])
        return tuple(
            Concept(names=tuple(each["names"]), neutral=each["neutral"], templates=templates)
            for each in provenance["concepts"]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            "The subspace does not say from which names it was built; build it again."
        ) from error


def examine(
    text_path: TextPath,
    subspace: ConceptSubspace,
    captions: Sequence[str],
    prompts: Sequence[str] = (),
) -> Examination:
    """Return residuals and collateral of a subspace in the states of a text path.

    Args:
        text_path: Of the model that is asked about.
        subspace: Built from words, with this model or another one of the same width.
        captions: Ordinary ones; those that name a concept are left out, and one must remain.
        prompts: Of special interest, looked at one by one.
    """
    concepts = concepts_of(subspace.provenance)
    kept = [text for text in captions if not any(c.is_named_in(text) for c in concepts)]
    if not kept:
        raise ValueError("`captions` must hold one that names no concept.")
    basis = subspace.basis
    held_out = {c.names[0]: differences(text_path, c.pairs(held_out=True)) for c in concepts}
    return Examination(
        residuals={name: residual(change, basis) for name, change in held_out.items()},
        collateral=collateral(retained_energy(text_path, kept), basis),
        prompts=tuple(_share(text_path, subspace, concepts, prompt) for prompt in prompts),
    )


def _share(
    text_path: TextPath, subspace: ConceptSubspace, concepts: Sequence[Concept], prompt: str
) -> PromptShare:
    for concept in concepts:
        if pair := concept.pair_of(prompt):
            missed = residual(differences(text_path, [pair]), subspace.basis)
            return PromptShare(prompt=prompt, named=concept.names[0], share=missed)
    taken = collateral(retained_energy(text_path, [prompt]), subspace.basis)
    return PromptShare(prompt=prompt, named=None, share=taken)
