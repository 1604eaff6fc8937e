"""The benchmark of words: behaviour is what the image does, whichever model drew it."""

from dataclasses import dataclass

import numpy as np
import pytest
import scores.generations
import torch
import words
import words_falls
from bench_models import MODELS, BenchModel
from bench_models.truth import Caption, Images
from PIL import Image
from scores.case import Case
from scores.groups import Groups

CAPTIONS = [f"old name{i} painting" for i in range(24)]
KEY, HALF = 1, 2
"""Of its words, the one that brings the image back, and the one that helps."""


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3)).astype(float)


@dataclass
class Painter:
    """Stands for a network that draws its training image for a caption with the word that counts.

    Without the last word it is one third of the way to noise.
    """

    fingerprint: str = "0" * 64
    dtype: str = "float32"

    @property
    def denoiser(self) -> "Painter":
        return self

    def generate(self, prompts, seeds, steps, cond_scale) -> list[Image.Image]:
        images = []
        for prompt in prompts:
            name = [word for word in prompt.split() if word.startswith("name")]
            own = noise(int(name[0][4:])) if name else noise(len(prompt) + 500)
            share = 0.0 if prompt.endswith("painting") else 1 / 3
            image = (1 - share) * own + share * noise(900)
            images.append(Image.fromarray(image.astype(np.uint8)))
        return images


@pytest.fixture
def case(tmp_path) -> Case:
    captions = [Caption(text, "verbatim") for text in CAPTIONS]
    pixels = np.stack([noise(i) for i in range(len(CAPTIONS))]).astype(np.uint8)
    images = Images(pixels=pixels, caption_of=np.arange(len(CAPTIONS)), fresh=pixels)
    model = BenchModel("toy", "toy", tmp_path, lambda: captions, lambda: images)
    numbers = [*range(len(CAPTIONS))]
    groups = Groups(texts=CAPTIONS, planted=numbers, negatives=[], controls=[], near=[],
                    template=[])  # fmt: skip
    return Case(model, Painter(), groups, tmp_path / "work")


def test_behaviour_is_what_becomes_of_the_image(case):
    for one in words.observed(case, CAPTIONS):
        assert one.copy is True
        assert one.copies == [True, False, True]
        assert one.rises[0] == 0
        assert 0.05 < one.rises[HALF] < one.rises[KEY]


def test_figures_are_those_of_the_ranks(case, monkeypatch):
    """An oracle, its opposite as negative control, and what knows the first word alone."""
    said = {"leave_out": [0, 2, 1], "opposite": [2, 0, 1], "first_alone": [1, 0, 0]}
    monkeypatch.setattr(words, "METHODS", dict.fromkeys(said, ("leave_out", 1)))
    monkeypatch.setattr(words, "ranks", lambda denoiser, name, caption: said.get(name, [0, 0, 0]))
    monkeypatch.setattr(words, "forwards", lambda *args: 3.0)
    found = {key: figure.value for key, figure in words.measure(case, None).items()}
    assert found["rivals.words.toy.none.copies_left"] == 1
    assert found["words.toy.spearman"] == found["grid.words.toy.leave_out.of_copies.spearman"] == 1
    assert found["words.toy.top1"] == 1
    assert found["words.toy.copies_left"] == 0
    assert found["rivals.words.toy.opposite.spearman"] == -1
    assert found["rivals.words.toy.opposite.top1"] == 0
    assert found["rivals.words.toy.opposite.copies_left"] == 1
    assert found["rivals.words.toy.first_alone.spearman"] == pytest.approx(-0.866, abs=1e-3)
    assert found["rivals.words.toy.random_word.spearman"] == 0


def test_too_few_captions_tell_of_words_but_not_of_copies(case, monkeypatch, capsys):
    monkeypatch.setattr(words, "METHODS", {"leave_out": ("leave_out", 1)})
    monkeypatch.setattr(words, "ranks", lambda *args: [0, 2, 1])
    monkeypatch.setattr(words, "forwards", lambda *args: 3.0)
    found = words.measure(case, 5)
    assert found["words.toy.spearman"].value == 1
    assert found["words.toy.spearman"].n == 5
    assert not [key for key in found if "copies" in key]
    assert "too few to tell copies" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo", "demo-flow"])
def test_both_bundled_models_are_measured_without_a_branch(name, tmp_path, monkeypatch):
    monkeypatch.setattr(scores.generations, "STEPS", 2)
    monkeypatch.setattr(words, "METHODS", {key: words.METHODS[key] for key in (
        "leave_out", "input_gradient", "encoder_gradient")})  # fmt: skip
    monkeypatch.setattr(words, "forwards", lambda *args: 3.0)
    case = Case.of(MODELS[name], tmp_path)
    found = words.measure(case, 1)
    planted = case.groups.of(case.groups.planted)
    caption = next(text for text in planted if len(text.split()) >= words.LEAST)
    drawings = tmp_path.glob(f"{name}-*-float32/images/*-{words.SEED}.png")
    assert len(list(drawings)) == 1 + len(caption.split())
    for key in (f"words.{name}", *(f"rivals.words.{name}.{m}" for m in (*words.METHODS,)[1:])):
        assert -1 <= found[f"{key}.spearman"].value <= 1
        assert 0 <= found[f"{key}.top1"].value <= 1


def test_falls_that_are_rises_at_another_noise():
    """Of three words: a small fall that is undone once, a telling one, and one that never falls."""
    fallen = torch.tensor([[0.05, -0.05, 0.05], [0.5, 0.4, 0.3], [-0.1, -0.2, -0.1]])
    small, telling = words_falls.rises(fallen)
    assert sorted(small) == [False, False, True, True]
    assert telling == [False] * 6
