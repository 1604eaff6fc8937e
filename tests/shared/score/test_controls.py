"""The bundled control prompts are many, different, ordinary and varied."""

import re
import statistics

import pytest
from unmemorize.shared.score.controls import CONTROLS, load_controls

FAMOUS = (
    "mona lisa|starry night|van gogh|monet|picasso|rembrandt|vermeer|hokusai|klimt|dali|warhol|"
    "banksy|michelangelo|leonardo|rutkowski|mucha|artstation|getty|shutterstock|stock photo|"
    "mickey|disney|pixar|marvel|batman|superman|pokemon|mario|harry potter|star wars|simpson|"
    "taylor|trump|obama|einstein|marilyn|elvis|eiffel|times square|taj mahal|iphone|coca|nike"
)


@pytest.mark.parametrize("name", CONTROLS)
def test_at_least_250_different_captions(name):
    captions = load_controls(name)
    assert len({caption.casefold() for caption in captions}) == len(captions) >= 250
    assert all(caption == caption.strip() for caption in captions)


@pytest.mark.parametrize("name", CONTROLS)
def test_captions_are_varied(name):
    captions = load_controls(name)
    lengths = [len(caption.split()) for caption in captions]
    assert min(lengths) >= 3
    assert max(lengths) <= 20
    assert statistics.stdev(lengths) > 1.5
    words = [word for caption in captions for word in re.findall(r"[a-z']+", caption.casefold())]
    assert len(set(words)) > 600
    # No two captions are one sentence with a word exchanged.
    sets = [set(caption.casefold().split()) for caption in captions]
    closest = max(len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[:i])
    assert closest < 0.75


def test_lists_do_not_overlap():
    assert not set(load_controls("photographs")) & set(load_controls("art"))


@pytest.mark.parametrize("name", CONTROLS)
def test_no_famous_names(name):
    found = re.findall(rf"\b(?:{FAMOUS})\b", "\n".join(load_controls(name)).casefold())
    assert found == []
    assert re.findall(rf"\b(?:{FAMOUS})\b", "a copy of the mona lisa")  # the check can fail


def test_unknown_list_names_the_known_ones():
    with pytest.raises(ValueError, match="'photos'; choose one of photographs, art"):
        load_controls("photos")
