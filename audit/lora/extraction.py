"""What the extraction attack brought out."""

from collections.abc import Sequence

from ...shared.arrays import Float, Tensor
from .attack import GUIDANCE, central, cliques
from .result import Attack, Clique, Generation, Thresholds
from .verdicts import rate


def judge_attack(
    rows: Float[Tensor, " generation dimension"],
    generations: Sequence[Generation],
    limits: Thresholds,
    trained: int,
) -> Attack | None:
    """Return the cliques of the attack's generations and the training images they are.

    Args:
        rows: Embeddings of all generations.
        generations: Of the audit; those of the attack are looked at.
        limits: Two generations agree, and a clique is a training image, above `verbatim`.
        trained: Number of training images.
    """
    places = [i for i, generation in enumerate(generations) if generation.asked == "attack"]
    if not places:
        return None
    found = []
    if limits.verbatim is not None:
        for members in cliques(rows[places], limits.verbatim):
            member = generations[places[central(rows[places], members)]]
            found.append(
                Clique(
                    size=len(members), member=member.path, nearest=member.nearest,
                    similarity=member.similarity, extracted=member.similarity > limits.verbatim,
                )
            )  # fmt: skip
    out = {clique.nearest for clique in found if clique.extracted}
    return Attack(
        generations=len(places), guidance=GUIDANCE, cliques=tuple(found),
        extracted=rate(len(out), trained),
    )  # fmt: skip
