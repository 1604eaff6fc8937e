"""Copies among points with known truth: who is called a copy, and how often wrongly."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import f as fisher
from unmemorize.audit.common import copies
from unmemorize.audit.common.copies import OTHERS, OWN_QUANTILE
from unmemorize.shared.copies.neighbours import (
    FEWEST,
    NEIGHBOURS,
    Bounds,
    TrainingImages,
    ratio_limit,
)
from unmemorize.shared.score.rates import clopper_pearson

DIMENSIONS = 8
BOUNDS = Bounds(own_factor=0.5, ratio=0.55)


def judge(generated, asked, training, bounds=BOUNDS):
    return copies.judge(generated, asked, training, bounds)


def points(count, seed=0, dimensions=DIMENSIONS):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def near(rows, part=0.05, seed=7):
    """Return the same points, each moved by a small part of what lies between them."""
    noise = points(len(rows), seed, rows.shape[1])
    return rows + part * noise


def prompts(count, start="other"):
    return [f"{start} {i}" for i in range(count)]


@pytest.fixture
def scene():
    """60 images, the first 12 of which come back; 40 captions mean no image."""
    images, others = points(60), points(40, seed=1)
    captions = prompts(60, "caption")
    generated = torch.cat([near(images[:12]), others])
    return images, captions, generated, [*captions[:12], *prompts(40)]


def called(judged):
    return [verdict.copied for verdict in judged.verdicts]


def test_both_rules_match_a_loop_over_everything(scene):
    images, captions, generated, asked = scene
    judged = judge(generated, asked, TrainingImages(images, captions))
    rows, training = generated.double().numpy(), images.double().numpy()
    table = np.sqrt(((rows[:, None] - training[None]) ** 2).sum(2))
    order = np.sort(table, axis=1)
    count = min(NEIGHBOURS, max(FEWEST, len(training) // 4))
    spacings = [
        (j + 1) * math.log(row[j + 1] / row[j]) for row in order for j in range(1, count - 1)
    ]
    assert judged.dimension == pytest.approx(1 / np.mean(spacings), rel=1e-4)
    taken = order[:, 0] / order[:, 1] < judged.limit
    for number, verdict in enumerate(judged.verdicts):
        assert verdict.index == table[number].argmin()
        assert verdict.distance == pytest.approx(order[number, 0], rel=1e-3)
        assert verdict.ratio == pytest.approx(order[number, 0] / order[number, 1], rel=1e-3)
        if number >= 12:
            assert verdict.own_ratio is None
            assert verdict.copied == taken[number]
            continue
        others = [table[k, number] for k in range(len(rows)) if k != number
                  and not (taken[k] and table[k].argmin() == number)]  # fmt: skip
        expected = table[number, number] / np.quantile(others, OWN_QUANTILE)
        assert verdict.own_ratio == pytest.approx(expected, rel=1e-3)
        assert verdict.is_own == (table[number].argmin() == number)
    assert called(judged)[:12] == [True] * 12
    assert sum(called(judged)[12:]) <= 1


def test_a_pair_that_looks_alike_raises_no_limit(scene):
    images, captions, generated, asked = scene
    plain = judge(generated, asked, TrainingImages(images, captions))
    twin = near(images[30:31], 0.001)
    with_pair = judge(
        generated, asked, TrainingImages(torch.cat([images, twin]), [*captions, "a twin"])
    )
    assert with_pair.limit == pytest.approx(plain.limit, rel=0.02)
    assert called(with_pair) == called(plain)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_only_relations_of_distances_matter(scene, scale):
    images, captions, generated, asked = scene
    plain = judge(generated, asked, TrainingImages(images, captions))
    scaled = judge(generated * scale, asked, TrainingImages(images * scale, captions))
    assert called(scaled) == called(plain)
    assert scaled.limit == pytest.approx(plain.limit, rel=1e-3)
    for one, other in zip(scaled.verdicts, plain.verdicts, strict=True):
        assert one.ratio == pytest.approx(other.ratio, rel=1e-2)
        assert one.own_ratio == (other.own_ratio and pytest.approx(other.own_ratio, rel=1e-2))


@pytest.mark.parametrize("times", [1, 4, 20])
def test_a_training_set_saved_more_than_once_hides_no_copy(scene, times):
    """Every image stands there `times` more, a little changed, under captions of their own."""
    images, captions, generated, asked = scene
    plain = judge(generated, asked, TrainingImages(images, captions))
    again = [near(images, 0.02, seed=100 + k) for k in range(times)]
    more = [f"{caption}, saved {k}" for k in range(times) for caption in captions]
    judged = judge(
        generated, asked, TrainingImages(torch.cat([images, *again]), [*captions, *more])
    )
    assert called(judged)[:12] == [True] * 12
    assert all(verdict.is_own for verdict in judged.verdicts[:12])
    assert sum(called(judged)[12:]) <= 1
    assert judged.dimension == pytest.approx(plain.dimension, rel=0.25)


def test_copies_of_an_image_saved_twice_are_seen_without_a_caption(scene):
    """Only the rule of any image can tell: the two lie side by side, and the next far off."""
    images, captions, generated, _ = scene
    twice = TrainingImages(
        torch.cat([images, near(images, 0.02, seed=100)]), [*captions, *captions]
    )
    judged = judge(generated, prompts(len(generated)), twice)
    assert called(judged)[:12] == [True] * 12
    assert sum(called(judged)[12:]) <= 1


def test_prompts_that_ask_for_the_same_image_do_not_hide_it(scene):
    """Half of the others bring the first image back, by captions of no image or a duplicate's."""
    images, captions, generated, asked = scene
    back = near(images[:1].repeat(20, 1), seed=9)
    for names, more, texts in (
        (prompts(20, "rewording"), images[:0], []),
        (prompts(20, "duplicate"), near(images[:1].repeat(20, 1), 0.01), prompts(20, "duplicate")),
    ):
        training = TrainingImages(torch.cat([images, more]), [*captions, *texts])
        judged = judge(torch.cat([generated, back]), [*asked, *names], training)
        assert judged.verdicts[0].copied
        assert judged.verdicts[0].own_ratio < BOUNDS.own_factor
        assert called(judged)[-20:] == [True] * 20


def test_too_few_other_prompts_or_images_give_no_verdict(scene):
    images, captions, generated, asked = scene
    training = TrainingImages(images, captions)
    few = judge(generated[: OTHERS - 1], asked[: OTHERS - 1], training)
    assert few.limit is None
    assert called(few) == [None] * (OTHERS - 1)
    assert all(verdict.own_ratio is None for verdict in few.verdicts)
    # One prompt's seeds are one prompt.
    seeds = judge(points(60, seed=3), ["the same"] * 60, training)
    assert called(seeds) == [None] * 60
    # Two images: whether its own came back can be told, whether any did cannot.
    two = judge(generated, asked, TrainingImages(images[:2], captions[:2]))
    assert two.limit is None
    assert called(two)[:2] == [True, True]
    assert called(two)[2:] == [None] * (len(asked) - 2)
    # An image beside the own one: not the own, but of any nothing can be told.
    crossed = judge(generated, [captions[1], captions[0], *asked[2:]],
                    TrainingImages(images[:4], captions[:4]))  # fmt: skip
    assert crossed.limit is None
    assert [v.is_own for v in crossed.verdicts[:2]] == [False, False]
    assert all(v.own_ratio is not None for v in crossed.verdicts[:2])
    assert called(crossed)[:2] == [None, None]
    with pytest.raises(ValueError, match="At least 2"):
        TrainingImages(images[:1], captions[:1])


def test_an_image_all_others_come_near_to_is_judged_by_its_own_yardstick(scene):
    """A pale image, in the middle of everything: near to all, a copy only of what is nearer."""
    images, captions, generated, asked = scene
    pale = torch.zeros(1, DIMENSIONS)
    training = TrainingImages(torch.cat([images, pale]), [*captions, "pale"])
    asked = [*asked, "pale", "pale"]
    usual = points(1, seed=4) * 0.7
    copy = points(1, seed=5) * 0.05
    judged = judge(torch.cat([generated, usual, copy]), asked, training)
    assert called(judged)[-2:] == [False, True]
    assert judged.verdicts[-2].distance > judged.verdicts[-1].distance


def test_of_several_own_images_one_is_near_by_chance():
    """A caption with 30 images: what other prompts reach counts to the nearest of them as well."""
    generator = torch.Generator().manual_seed(0)
    own, rest = torch.rand(30, 2, generator=generator), 5 + points(60, dimensions=2)
    training = TrainingImages(torch.cat([own, rest]), [*["many"] * 30, *prompts(60, "caption")])
    asked = [*["many"] * 40, *prompts(40)]
    generated = torch.cat([torch.rand(40, 2, generator=generator),
                           torch.rand(40, 2, generator=generator)])  # fmt: skip
    judged = judge(generated, asked, training, Bounds(own_factor=0.5, ratio=1e-9))
    assert sum(called(judged)[:40]) <= 4
    single = torch.cdist(generated[40:], own).quantile(OWN_QUANTILE, dim=0)
    nearest = torch.cdist(generated[:40], own).min(1)
    alone = nearest.values < 0.5 * single[nearest.indices]
    assert alone.sum() > 10  # by each image's yardstick alone
    copy = judge(torch.cat([own[:1] + 1e-4, generated[40:]]), ["many", *prompts(40)], training)
    assert called(copy)[0]


def test_another_image_of_the_caption_that_others_own_as_well_hides_no_copy(scene):
    images, captions, generated, asked = scene
    twice = TrainingImages(
        torch.cat([images, images[40:41], near(images[40:41], 0.001)]),
        [*captions, captions[0], "saved again"],
    )
    back = near(images[40:41].repeat(10, 1), 0.01, seed=11)
    judged = judge(torch.cat([generated, back]), [*asked, *["saved again"] * 10], twice)
    assert judged.verdicts[0].own_ratio < BOUNDS.own_factor


def test_captions_mixed_up_at_random_own_nothing():
    images, generated = points(100), points(200, seed=1)
    captions = prompts(100, "caption")
    judged = judge(generated, captions * 2, TrainingImages(images, captions))
    own = [v for v in judged.verdicts if v.is_own and v.own_ratio < BOUNDS.own_factor]
    assert len(own) == 0
    low, _ = clopper_pearson(sum(called(judged)), 200)
    assert low < 0.01


@pytest.mark.parametrize("spread", ["cube", "normal"])
@pytest.mark.parametrize("dimensions", [3, 8, 20])
@pytest.mark.parametrize("images", [10, 100, 1000, pytest.param(10000, marks=pytest.mark.slow)])
def test_one_in_a_hundred_is_called_a_copy_of_any_whatever_their_number(
    images,
    dimensions,
    spread,
):
    theory_alone = Bounds(own_factor=0.5, ratio=1.0)
    generator = torch.Generator().manual_seed(dimensions)
    make = torch.rand if spread == "cube" else torch.randn
    wrong = count = 0
    for _ in range(4 if images < 1000 else 2):
        training = TrainingImages(
            make(images, dimensions, generator=generator), prompts(images, "caption")
        )
        verdicts = called(
            judge(make(150, dimensions, generator=generator), prompts(150), training, theory_alone)
        )
        wrong, count = wrong + sum(verdicts), count + len(verdicts)
    low, _ = clopper_pearson(wrong, count)
    assert low <= 0.01


def test_the_nearest_alone_is_nearer_the_more_there_are():
    """The negative control of the test above: a fixed limit on distances fails with the number."""
    generated, calls = points(150, seed=1), []
    for images in (10, 1000):
        table = torch.cdist(generated, points(images, seed=2))
        limit = 0.45 * table.quantile(0.1, dim=0)
        calls.append((table < limit).any(1).double().mean().item())
    assert calls[1] > 10 * calls[0]
    assert calls[1] > 0.01


@pytest.mark.parametrize("spacings", [20, 200, 5000])
def test_the_limit_is_that_of_fisher(spacings):
    rate = 0.01 / 1.01
    expected = math.exp(-fisher.isf(rate, 2, 2 * spacings) / 6)
    assert ratio_limit(6.0, spacings, 0.01) == pytest.approx(expected, rel=1e-9)
