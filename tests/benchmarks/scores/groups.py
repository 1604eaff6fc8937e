"""What each caption of a model is to a detector: to be found, not to be flagged, a control."""

import random
from dataclasses import dataclass
from pathlib import Path

from bench_models import MODELS, BenchModel
from bench_models.recipes import RECIPES
from bench_models.truth import sort
from unmemorize import demo
from unmemorize.shared.score.controls import CONTROLS, load_controls

MOST_CONTROLS = 400


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Captions of one model; all fields but the first hold indices into it."""

    texts: list[str]
    """All captions, in their own order."""
    planted: list[int]
    """One image of theirs was repeated: what a score should find."""
    negatives: list[int]
    """Learnt or held out, neither near a repeated caption nor a control."""
    controls: list[int]
    near: list[int]
    """Learnt or held out and near a repeated caption: reported apart."""
    template: list[int]
    """Their layout was repeated, not their image; the demo's two models alone have them."""

    def of(self, indices: list[int]) -> list[str]:
        """Return captions by their indices."""
        return [self.texts[i] for i in indices]


def groups_of(model: BenchModel) -> Groups:
    """Return the captions of a model, some of them set aside as controls.

    The demo's controls are its own. Of a model that is made here 400 are spread evenly over learnt
    and held-out captions, in pairs: no negative has a control beside it that differs by one word.
    """
    captions = model.captions()
    ordinary = [
        i for i, c in enumerate(captions) if c.group in ("learnt", "held_out") and not c.near
    ]
    if model.name in RECIPES:
        pairs = list(zip(ordinary[::2], ordinary[1::2], strict=True))
        count = min(MOST_CONTROLS, len(pairs)) // 2
        controls = [i for k in range(count) for i in pairs[k * len(pairs) // count]]
    else:
        own = set(demo.controls())
        controls = [i for i, c in enumerate(captions) if c.text in own]
    taken = set(controls)

    def in_group(name: str) -> list[int]:
        return [i for i, c in enumerate(captions) if c.group == name]

    return Groups(
        texts=[c.text for c in captions],
        planted=in_group("verbatim"),
        negatives=[i for i in ordinary if i not in taken],
        controls=controls,
        near=[i for i, c in enumerate(captions) if c.near and i not in taken],
        template=in_group("template"),
    )


def foreign_controls(model: BenchModel) -> dict[str, list[str]]:
    """Return prompts of other domains to take as controls, by a name for them.

    That is the lists that come with the package, and captions of other art.
    """
    if model.name.startswith("scenes"):
        captions = [c for c in MODELS["demo"].captions() if c.group in ("learnt", "held_out")]
    else:
        captions = sort(RECIPES["scenes"].art(Path()), seed=0, pairs=300)
    domains = {
        "bundled": [text for name in CONTROLS for text in load_controls(name)],
        "other_art": [c.text for c in captions],
    }
    return {
        name: random.Random(0).sample(texts, min(MOST_CONTROLS, len(texts)))
        for name, texts in domains.items()
    }
