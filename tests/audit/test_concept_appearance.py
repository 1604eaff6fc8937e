"""The verdict of a concept audit, by what was drawn."""

from pathlib import Path

import pytest
from scipy.stats import binom, fisher_exact
from unmemorize.audit.concept.appearance import Appearance, Asked, Drawn, detectable
from unmemorize.shared.training.concept.adapter import ConceptAdapter

NUMBERS = {"concept": 0.02, "others": 0.0, "threshold": 0.01, "recall": 1.0, "false_positives": 0.0,
           "concept_gains": [0.02, 0.005]}  # fmt: skip


def images(shown: int, count: int) -> tuple[Drawn, ...]:
    return tuple(
        Drawn(path=f"{i}.png", prompt="a cat", seed=i, gain=float(i < shown), shown=i < shown)
        for i in range(count)
    )


def appearance(positive: int = 10, **ways: tuple[int, int]) -> Appearance:
    asked = [Asked(way=way, on=images(on, 16), off=images(off, 16))
             for way, (on, off) in ways.items()]  # fmt: skip
    adapter = ConceptAdapter(pairs={}, samples={}, account={"names": ["zorp"], "numbers": NUMBERS})
    return Appearance(
        asked=tuple(asked), positive=images(positive, 16), line=0.01, controls=16, concept=adapter,
        file="zorp.safetensors", lora="l.safetensors", model="demo", description="", folder=Path(),
    )  # fmt: skip


def test_a_lora_that_draws_it_more_often_than_its_base_is_named_with_the_ways():
    found = appearance(by_name=(9, 0), unasked=(2, 0))
    assert found.appears
    assert found.headline == "l.safetensors draws zorp by its name"
    assert not appearance(by_name=(9, 8)).appears  # the base model draws it as often
    assert "at most 9 of 16" in appearance(by_name=(9, 8)).headline


def test_where_the_judge_does_not_see_the_concept_there_is_no_verdict():
    """A false "clean" is the worst defect: neither a verdict of presence nor of absence."""
    found = appearance(positive=7, by_name=(9, 0))
    assert (found.can_judge, found.appears) == (False, False)
    assert "No verdict: of 16 images" in found.headline
    assert "only 7" in found.headline


def test_what_was_not_asked_is_told():
    remarks = " ".join(appearance(unasked=(0, 0)).remarks)
    assert "10 of 16 images that the base model draws" in remarks
    assert "and 1 of 2 of the concept's own images" in remarks
    assert "not asked by name" in remarks
    assert "--description" in remarks
    assert "word that is learnt from images" in remarks


@pytest.mark.parametrize("count", [8, 24])
def test_the_power_is_that_of_the_test(count):
    share = detectable(count)

    def power(share: float) -> float:
        return sum(
            binom.pmf(hits, count, share)
            for hits in range(count + 1)
            if fisher_exact([[hits, count - hits], [0, count]], "greater").pvalue <= 0.05
        )

    assert power(share) >= 0.8 > power(share - 0.01)


def test_so_few_images_tell_nothing_apart():
    assert detectable(2) == 1.0
