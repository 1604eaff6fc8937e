"""A finished subspace measured again: with another model, other prompts, a trained LoRA."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.weights import ModelError
from ..models.lora.dialects import check_pairs
from ..models.lora.layer_names import TEXT_FED
from .concept.concept import Concept
from .concept.fitting import COLLATERAL, RESIDUAL, collateral, residual, retained_energy
from .concept.subspace import ConceptSubspace
from .concept.text_states import TextPath, differences
from .layers.subspaces import LayerSubspaces
from .projection.factors import factors_of, saved_state
from .projection.products import Products
from .projection.projection import TOLERANCES, Projection


@dataclass(frozen=True, kw_only=True)
class PromptShare:
    """One prompt."""

    prompt: str
    named: str | None
    """First name of the concept that it names; None for none."""
    share: float
    """Share outside the subspace where the prompt names the concept, else share inside; 0..1."""

    @property
    def within(self) -> bool:
        """Whether the share is within the limit for that share."""
        return self.share <= (COLLATERAL if self.named is None else RESIDUAL)


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """One layer of a trained LoRA."""

    share: float | None
    """|A V| / |A| (Frobenius norms, 0 to 1); None where the layer has no subspace."""
    within: bool
    """Whether there is one, and rounding explains the share."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a subspace does to the states of one text encoder."""

    residuals: Mapping[str, float]
    """By first name, the share of the concept in held-out sentences that lies outside."""
    collateral: float
    """Share of ordinary captions that lies inside."""
    prompts: tuple[PromptShare, ...] = ()
    """The requested prompts, one by one."""

    @property
    def within(self) -> bool:
        """Whether both acceptance limits hold; single prompts do not count."""
        most = max(self.residuals.values(), default=0.0)
        return most <= RESIDUAL and self.collateral <= COLLATERAL


def concepts_of(provenance: Mapping[str, Any]) -> tuple[Concept, ...]:
    """Return the concepts that a subspace was built from.

    Raises:
        ModelError: The provenance names none: the subspace was not built from words alone.
    """
    if "learnt" in provenance:
        raise ModelError(
            "The subspace was learnt from images, and the word for them is known only while it "
            "is built: build it again."
        )
    try:
        templates = tuple(provenance["templates"])
        return tuple(
            Concept(names=tuple(each["names"]), neutral=each["neutral"], templates=templates)
            for each in provenance["concepts"]
        )
    except (KeyError, TypeError) as error:
        raise ModelError(
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
        text_path: Of the model to measure with.
        subspace: Built from words, with this model or another one of the same width.
        captions: Ordinary ones; those that name a concept are left out, and one must remain.
        prompts: Measured one by one.
    """
    concepts = concepts_of(subspace.provenance)
    kept = [text for text in captions if not any(c.is_named_in(text) for c in concepts)]
    if not kept:
        raise ValueError("`captions` must hold one that names no concept.")
    basis = subspace.basis
    held_out = {c.names[0]: differences(text_path, c.pairs(holdout=True)) for c in concepts}
    return Examination(
        residuals={name: residual(change, basis) for name, change in held_out.items()},
        collateral=collateral(retained_energy(text_path, kept), basis),
        prompts=tuple(_share(text_path, subspace, concepts, prompt) for prompt in prompts),
    )


def shares_read(lora: Path, subspace: ConceptSubspace | LayerSubspaces) -> dict[str, LayerShare]:
    """Return by layer what a saved LoRA reads of a subspace.

    Args:
        lora: File of kohya, PEFT or diffusers.
        subspace: Of text states, for the layers that read text; or subspaces of single layers,
            for all other layers. A layer without one is not within: the LoRA could learn the
            concept there.

    Raises:
        ModelError: The file is no whole LoRA, changes a text encoder, or has none of the layers.
        ValueError: The subspace is of another width.
    """
    state, source = saved_state(lora), str(lora)
    if isinstance(subspace, ConceptSubspace):
        factors = factors_of(state, source=source)
        products = Products.of(state.items(), factors)
        shares = Projection(factors, [subspace], products=products).residuals()
    else:
        check_pairs(state, lora)
        every = factors_of(state, text_fed="", source=source)
        factors = {name: each for name, each in every.items() if not re.search(TEXT_FED, name)}
        held = subspace.among(factors)
        if not held.bases:
            raise ModelError(f"{source} has none of the {len(subspace.bases)} layers.")
        own = {name: factors[name] for name in held.of(factors)}
        shares = Projection(own, [], layers=held).residuals()
    return {
        name: LayerShare(
            share=(share := shares.get(name)),
            within=share is not None and share <= TOLERANCES[factor.dtype],
        )
        for name, factor in factors.items()
    }


def _share(
    text_path: TextPath, subspace: ConceptSubspace, concepts: Sequence[Concept], prompt: str
) -> PromptShare:
    for concept in concepts:
        if pair := concept.pair_of(prompt):
            missed = residual(differences(text_path, [pair]), subspace.basis)
            return PromptShare(prompt=prompt, named=concept.names[0], share=missed)
    taken = collateral(retained_energy(text_path, [prompt]), subspace.basis)
    return PromptShare(prompt=prompt, named=None, share=taken)
