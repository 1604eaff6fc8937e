"""Which generations are copies: each image by a yardstick of its own, that nothing else moves."""

import pytest
import torch
from unmemorize.audit.common.copies import OTHERS
from unmemorize.audit.lora.rule import COPY, NEAR, NONE, Roles, View, count_controls, mark
from unmemorize.shared.copies.neighbours import Bounds

BOUNDS = Bounds(own_factor=0.5, ratio=0.55)
IMAGES, SEEDS, OTHER, WIDTH = 10, 2, 8, 8
"""Images, seeds of each, generations of no words on and off, and dimensions."""


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


class Case:
    """Images at random places, each asked for from two seeds with the LoRA on and off."""

    def __init__(self, images: int = IMAGES, *, shared: bool = False, seed: int = 0):
        self.images, self.groups = points(images, seed), [frozenset([i]) for i in range(images)]
        everyone = frozenset(range(images))
        self.own = [everyone if shared else frozenset([i]) for _ in range(2) for i in range(images)
                    for _ in range(SEEDS)]  # fmt: skip
        self.on = [True] * (images * SEEDS) + [False] * (images * SEEDS)
        self.own += [frozenset()] * 2 * OTHER
        self.on += [True] * OTHER + [False] * OTHER
        self.made = points(len(self.own), seed + 1)

    def copy(self, image: int, *, lora: bool = True, error: float = 0.05) -> None:
        """Have an image come back from its first seed."""
        row = (0 if lora else len(self.images) * SEEDS) + image * SEEDS
        self.made[row] = self.images[image] + error * points(1, 7)[0]

    def marked(self):
        made, images = (torch.cdist(rows, self.images) for rows in (self.made, self.images))
        view = View(generated=made, images=images, bounds=BOUNDS, near=0.7)
        return mark([view], Roles(own=self.own, on=self.on, plain=[True] * len(self.own),
                                  groups=self.groups))  # fmt: skip

    def copied(self, *, lora: bool = True) -> set[int]:
        """Return the images that come back."""
        rows = [row for row, on in enumerate(self.on) if on is lora]
        return set((self.marked().marks[rows] == COPY).any(0).nonzero().flatten().tolist())


@pytest.mark.parametrize("images", [6, 10, 20, 100])
@pytest.mark.parametrize("shared", [False, True])
def test_copies_are_found_and_nothing_else(images, shared):
    case = Case(images, shared=shared)
    assert case.copied() == set()
    for image in (0, 4):
        case.copy(image)
    assert case.copied() == {0, 4}


def test_chance_names_hardly_any_image():
    cases = [Case(30, seed=seed) for seed in range(0, 100, 5)]
    assert sum(len(case.copied(lora=lora)) for case in cases for lora in (True, False)) <= 2


def test_an_image_that_the_base_draws_raises_nobodys_threshold():
    case = Case()
    case.copy(3)
    before = case.marked()
    for image in (1, 2):
        case.copy(image)
        case.copy(image, lora=False)
    after = case.marked()
    assert case.copied(lora=False) == {1, 2}
    assert 3 in case.copied()
    assert after.closeness[3 * SEEDS, 3] <= 1.1 * before.closeness[3 * SEEDS, 3]


def test_all_come_back_even_if_all_do():
    case = Case()
    for image in range(IMAGES):
        case.copy(image)
    assert case.copied() == set(range(IMAGES))


@pytest.mark.parametrize("images", [4, 10])
def test_one_image_that_comes_back_from_all_words_is_found(images):
    """Then others' generations are copies too, and no yardstick."""
    case = Case(images)
    for image in range(images):
        case.made[image * SEEDS] = case.images[0] + 0.05 * points(1, image)[0]
        case.made[image * SEEDS + 1] = case.images[0] + 0.05 * points(1, 50 + image)[0]
    assert case.copied() == {0}


def test_near_duplicates_are_no_controls_of_each_other():
    case = Case()
    for image in (1, 2):
        case.images[image] = case.images[0] + 0.1 * points(1, image)[0]
    case.copy(0)
    assert case.copied() == set()  # not told, each is the others' yardstick
    case.groups[:3] = [frozenset([0, 1, 2])] * 3
    assert case.copied() == {0, 1, 2}


def test_near_duplicates_do_not_make_the_yardstick_of_a_shared_caption():
    case = Case(7, shared=True)
    for image in (5, 6):
        case.images[image] = case.images[4] + 0.1 * points(1, image)[0]
    case.groups[4:] = [frozenset([4, 5, 6])] * 3
    case.copy(0, error=0.2)
    assert case.copied() == {0}


def test_one_more_image_of_the_same_subject_is_no_copy():
    """Images and generations of one tight cluster: false calls stay below .05 an image."""
    false, total = 0, 0
    for seed in range(0, 200, 10):
        for shared in (False, True):
            case = Case(20, shared=shared, seed=seed)
            on = torch.tensor(case.on)
            case.made[on] = 0.2 * case.made[on]  # off, the base draws all kinds of things
            case.images *= 0.2
            false += len(case.copied())
            total += 20
    assert false <= 0.05 * total


def test_too_few_controls_call_nothing_a_copy():
    case = Case(3)
    case.copy(0)
    case.own, case.on = case.own[: -2 * OTHER], case.on[: -2 * OTHER]
    case.made = case.made[: -2 * OTHER]
    roles = Roles(own=case.own, on=case.on, plain=[True] * len(case.own), groups=case.groups)
    assert count_controls(roles) == [2 + 2 * 2 * SEEDS] * 3
    assert count_controls(roles)[0] < OTHERS
    assert case.marked().marks.max() == NONE
    more = 12
    case.own, case.on = case.own + [frozenset()] * more, case.on + [True] * more
    case.made = torch.cat([case.made, points(more, 5)])
    assert case.copied() == {0}


def test_what_is_not_drawn_in_the_ordinary_way_is_judged_and_is_no_yardstick():
    case = Case()
    before = case.marked().closeness
    attack = case.images + 0.05 * points(IMAGES, 3)
    view = View(generated=torch.cdist(torch.cat([case.made, attack]), case.images),
                images=torch.cdist(case.images, case.images), bounds=BOUNDS, near=0.7)  # fmt: skip
    own = [*case.own, *(frozenset([i]) for i in range(IMAGES))]
    marked = mark([view], Roles(own=own, on=case.on + [True] * IMAGES, groups=case.groups,
                                plain=[True] * len(case.own) + [False] * IMAGES))  # fmt: skip
    assert (marked.marks[-IMAGES:].diagonal() == COPY).all()
    torch.testing.assert_close(marked.closeness[: len(before)], before)


def test_near_is_between():
    case = Case()
    part = case.marked().closeness[0, 0]
    towards = case.images[0] - case.made[0]
    case.made[0] += towards * float(1 - 1.2 / part)  # at 1.2 times the distance of a copy
    marked = case.marked()
    assert marked.marks[0, 0] == NEAR
    assert marked.own[0, 0]
    assert marked.closeness[0, 0] == pytest.approx(1.2, rel=1e-3)
