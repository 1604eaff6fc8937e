"""The benchmark of copies: who decides what a copy is, what is counted, and that models differ."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import copies
import numpy as np
import pytest
from bench_models import MODELS, BenchModel
from bench_models.truth import Caption, Images
from copies_truth import ask, draw_planted, least_correlation, patterns, seeds_that_come_back
from PIL import Image, ImageFilter
from scores.case import Case
from scores.generations import SEEDS, drawn
from scores.groups import groups_of

PLANTED, OTHERS, RENDERINGS = 24, 12, 6


def picture(caption: int, seed: int) -> np.ndarray:
    """Return a picture [32 32 3]: the caption's own object somewhere on a ground by chance."""
    own, chance = np.random.default_rng(caption), np.random.default_rng([caption, seed])
    image = chance.normal(128, 40, (8, 8, 3))
    x, y = chance.integers(0, 5, 2)
    image[y : y + 4, x : x + 4] = own.integers(0, 255, (4, 4, 3))
    return image.clip(0, 255).astype(np.uint8).repeat(4, 0).repeat(4, 1)


def captions() -> list[Caption]:
    groups = ["verbatim"] * PLANTED + ["learnt"] * OTHERS + ["held_out"] * OTHERS
    planted = [f"caption {i}" for i in range(PLANTED)]
    near = [Caption(f"near {i}", "held_out", planted[i]) for i in range(3)]
    return [Caption(f"caption {i}", group) for i, group in enumerate(groups)] + near


def images() -> Images:
    of = [*range(PLANTED), *np.repeat(np.arange(PLANTED, PLANTED + OTHERS), RENDERINGS).tolist()]
    return Images(
        pixels=np.stack([picture(caption, 1000 + k) for k, caption in enumerate(of)]),
        caption_of=np.array(of),
        fresh=np.stack([picture(PLANTED + k % OTHERS, 5000 + k) for k in range(40)]),
    )


def mildly(image: np.ndarray) -> np.ndarray:
    """Return an image as an autoencoder gives it back."""
    noise = np.random.default_rng(image.sum()).normal(0, 4, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def paled(image: np.ndarray) -> np.ndarray:
    """Return an image with a quarter of its contrast: for an eye the same, by distance another."""
    return (0.25 * image + 150).astype(np.uint8)


@dataclass
class Painter:
    """Stands for the `Subject` of a model and for its network."""

    fingerprint: str = "0" * 64
    dtype: str = "float32"
    copied: range = range(PLANTED)
    """Captions that are drawn as their training image."""
    seeds: tuple[int, ...] = SEEDS
    """From which they are."""
    pale: range = range(0)
    """Captions that are drawn with little contrast."""
    asked: list[tuple[str, int]] = field(default_factory=list)

    @property
    def denoiser(self) -> "Painter":
        return self

    def generate(self, prompts, seeds, steps, cond_scale) -> list[Image.Image]:
        self.asked += zip(prompts, seeds, strict=True)
        return [self.one(*pair) for pair in zip(prompts, seeds, strict=True)]

    def one(self, prompt: str, seed: int) -> Image.Image:
        number = int(prompt.split()[-1])
        image = mildly(picture(number, 9000 + seed))
        if number in self.copied and seed in self.seeds:
            image = mildly(picture(number, 1000 + number))
        if number in self.pale:
            image = paled(image)
        return Image.fromarray(image).resize((64, 64), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> BenchModel:
    own, all_images = captions(), images()
    folder = tmp_path_factory.mktemp("model")
    return BenchModel("toy", "toy", folder, lambda: own, lambda: all_images)


def case_of(model: BenchModel, work: Path, **settings) -> Case:
    return Case(model, Painter(**settings), groups_of(model), work)


def test_what_an_eye_calls_a_copy_is_not_what_the_rules_compare(model, tmp_path):
    case = case_of(model, tmp_path, copied=range(18), pale=range(5))
    generations, back = ask(case, PLANTED, OTHERS)
    assert [all(seeds) for seeds in back.values()] == [True] * 18 + [False] * 6
    truth = dict(zip(generations.prompts, generations.copied, strict=True))
    assert [truth[f"caption {i}"] for i in (0, 17, 18, 23)] == [True, True, None, None]
    assert {truth[c.text] for c in model.captions() if c.text in truth and c.group != "verbatim"} \
        == {False}  # fmt: skip
    assert not {*truth} & {f"near {i}" for i in range(3)}
    found = {}
    copies.measure_own(copies.Rows(case, generations, copies.PIXELS), "copies.toy", found)
    assert found["copies.toy.recall"][::3] == (13 / 18, 36)  # five are too pale for a distance
    assert found["copies.toy.false_positive_rate"][::3] == (0, OTHERS)


def test_captions_that_come_back_from_one_seed_alone_are_left_out(model, tmp_path):
    generations, back = ask(case_of(model, tmp_path, seeds=(1,)), PLANTED, OTHERS)
    assert sum(any(seeds) for seeds in back.values()) >= PLANTED - 1
    whole = sum(all(seeds) for seeds in back.values())
    assert whole <= 3  # by chance, the object may stand in the same place
    assert generations.copied.count(True) == len(SEEDS) * whole
    assert generations.copied.count(None) == len(SEEDS) * (PLANTED - whole)


def test_other_captions_that_draw_a_planted_image_from_every_seed_are_named(model, tmp_path):
    texts = ["near 0", "near 1", "near 2", f"caption {PLANTED}"]
    case = case_of(model, tmp_path, copied=range(2))
    assert draw_planted(case, texts) == [True, True, False, False]
    once = case_of(model, tmp_path, copied=range(2), fingerprint="1" * 64, seeds=SEEDS[:1])
    assert draw_planted(once, texts) == [False] * 4


def test_another_rendering_of_the_caption_is_no_copy(model):
    """The negative control: each caption's image beside another of the same caption."""
    prompts = [f"caption {i}" for i in range(PLANTED)]
    others = [Image.fromarray(picture(i, 77)) for i in range(PLANTED)]
    own = [Image.fromarray(images().pixels[i]) for i in range(PLANTED)]
    blurred = [image.filter(ImageFilter.GaussianBlur(1.5)) for image in own]
    counts = []
    for drawings in (own, blurred, others):
        generations = copies.Generations(prompts=prompts, images=drawings, copied=[])
        counts.append(sum(map(all, seeds_that_come_back(model, generations).values())))
    assert counts[:2] == [PLANTED, PLANTED]
    assert counts[2] <= 3  # 5 % of 24 are expected


def test_alike_is_a_correlation_of_coarse_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    coarse = [[[image[y : y + 4, x : x + 4].mean((0, 1)) for x in range(0, 32, 4)]
               for y in range(0, 32, 4)] for image in pixels.astype(float)]  # fmt: skip
    centred = np.array(coarse) - np.array(coarse).mean((1, 2), keepdims=True)
    rows = patterns(pixels)
    expected = np.corrcoef(centred.reshape(3, -1))
    np.testing.assert_allclose((rows @ rows.T).numpy(), expected, atol=1e-12)


def test_a_model_is_measured_and_images_that_never_came_back_have_no_recall(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(copies, "SIZES", (10, 60, 200))
    monkeypatch.setattr(copies, "has_sscd", lambda: False)
    case = case_of(model, tmp_path)
    found = copies.measure(case, ask(case, PLANTED, OTHERS)[0])
    for key in ("copies.toy", "copies_any.toy.60", "copies_any.toy.200"):
        assert found[f"{key}.recall"].value >= 0.95
        assert found[f"{key}.false_positive_rate"].value <= 0.05
    assert found["grid.copies.toy.verbatim.copied"].value == 1
    assert found["grid.copies_any.toy.renderings.200.false_positive_rate"].n == 40
    assert "rivals.copies.toy.pixels.clustered_first.recall" in found
    none = case_of(model, tmp_path, fingerprint="1" * 64, copied=range(0))
    generations, found = ask(none, PLANTED, OTHERS)[0], {}
    copies.measure_own(copies.Rows(none, generations, copies.PIXELS), "copies.toy", found)
    assert {*found} == {"copies.toy.false_positive_rate"}
    copies.measure_groups(none, generations, found)
    assert found["grid.copies.toy.verbatim.copied"].value <= 0.1


def test_images_are_drawn_once_for_all_benchmarks(model, tmp_path):
    case = case_of(model, tmp_path)
    paths = drawn(case, ["caption 1", "caption 2"])
    assert len(paths) == len(case.subject.asked) == 4
    assert drawn(case, ["caption 2", "caption 3"], SEEDS[:1]).keys() == {
        ("caption 2", 0), ("caption 3", 0)}  # fmt: skip
    assert case.subject.asked[4:] == [("caption 3", 0)]
    other = replace(case, subject=Painter(fingerprint="1" * 64))
    drawn(other, ["caption 2"])
    assert len(other.subject.asked) == 2


def test_too_few_captions_are_refused(model, tmp_path):
    case = case_of(model, tmp_path)
    with pytest.raises(ValueError, match=r"12 captions are too few.* 20 others"):
        ask(case, 4, 4)
    assert not case.subject.asked
    rows = copies.Rows(case, copies.generations_of(case, ["caption 1"], SEEDS, None), copies.PIXELS)
    with pytest.raises(ValueError, match="20 other prompts"):
        copies.by_any(rows.judge())


@pytest.mark.parametrize("name", ["demo", "demo-flow"])
def test_two_images_of_a_bundled_models_caption_are_less_alike_than_a_copy(name):
    assert 0.6 < least_correlation(MODELS[name]) < 0.8
