"""Words left out of a prompt: what is left stays a phrase, and everything else as typed."""

import pytest
from unmemorize.shared.words.phrases import is_function_word, without_words


@pytest.mark.parametrize(
    ("prompt", "gone", "left"),
    [
        ("man bowing on teal", "teal", "man bowing"),
        ("man bowing on teal", "man", "bowing on teal"),
        ("man on teal", "man", "teal"),
        ("on teal, sky", "sky", "on teal"),  # it was typed so
        ("man bowing on teal, sky", "teal,", "man bowing, sky"),
        ("museum poster, magic wand", "poster,", "museum, magic wand"),
        ("museum poster, magic wand", "museum poster,", "magic wand"),
        ("cupcake, bakery, dessert", "dessert", "cupcake, bakery"),
        ("a cat. A dog.", "dog.", "a cat."),
        ("a man with a hat and a dog", "hat", "a man and a dog"),
        ("a man with a hat and a dog", "man", "a hat and a dog"),
        ("page out of a red book", "red", "page out of a book"),
        ("woman\u2019s hat, clothes", "hat,", "clothes"),
        ("a\tred  cat", "red", "a\t cat"),
        ("in an", "an", ""),
        ("a cat", "", "a cat"),
    ],
)
def test_what_is_left_is_a_phrase(prompt, gone, left):
    words, dropped = prompt.split(), gone.split()
    indices = [index for index, word in enumerate(words) if word in dropped]
    assert without_words(prompt, words, indices) == left


def test_function_words_are_known_by_their_letters():
    assert all(map(is_function_word, ("The", "on", "(of", "and,")))
    assert not any(map(is_function_word, ("one", "teal", "", "\u732b")))
