"""Near-duplicates: planted ones are found, unrelated pictures are not, chains are told."""

import hashlib
import io
import random

import numpy as np
import pytest
import torch
from needs import need_package, need_sscd
from PIL import Image, ImageEnhance, ImageOps
from simulated_sets import KINDS
from unmemorize import demo
from unmemorize.audit.common.sscd import Sscd
from unmemorize.audit.lora.neighbours import duplicate_threshold, find_duplicates
from unmemorize.audit.lora.overlay import COARSE, KEPT, SMALL, Shown, cut, lay_over

need_package("faiss")


def at(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def keys(*names: str) -> list[str]:
    return [hashlib.sha256(name.encode()).hexdigest() for name in names]


def slow_groups(rows, sha256, threshold) -> set[tuple[int, ...]]:
    """Merge sets until nothing changes: plainly right."""
    groups = [{index} for index in range(len(rows))]
    for a in range(len(rows)):
        for b in range(a):
            if sha256[a] == sha256[b] or rows[a].dot(rows[b]) >= threshold:
                one, other = (next(g for g in groups if i in g) for i in (a, b))
                if one is not other:
                    groups.remove(other)
                    one |= other
    return {tuple(sorted(group)) for group in groups if len(group) > 1}


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_groups_are_those_of_the_slow_way(threshold):
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator))
    content = [index // 2 if index % 20 == 1 else index for index in range(60)]
    rows, names = rows[content], map(str, content)
    sha256 = keys(*names)
    groups = find_duplicates(rows, sha256, threshold)
    assert {group.images for group in groups} == slow_groups(rows, sha256, threshold)
    assert groups


def test_a_chain_says_how_far_apart_its_ends_are():
    (group,) = find_duplicates(at(0, 20, 40, 120), keys(*"abcd"), 0.9)
    assert (group.images, group.exact) == ((0, 1, 2), False)
    assert group.similarity == pytest.approx(at(40)[0, 0].item(), abs=1e-6)


def test_equal_files_are_exact_whatever_their_rows_say():
    far, near = find_duplicates(at(0, 170, 90, 91, 91), keys(*"aabcc"), 0.99)
    assert (far.images, far.exact) == ((2, 3, 4), False)
    assert (near.images, near.exact) == ((0, 1), True)
    assert find_duplicates(at(0, 45, 90), keys(*"abc"), 0.9) == ()
    assert find_duplicates(torch.zeros(0, 2), [], 0.9) == ()


def test_a_thousand_equal_files_are_one_group():
    (group,) = find_duplicates(at(*[10] * 1000), keys(*["same"] * 1000), 0.9)
    assert len(group.images) == 1000
    assert group.exact
    assert group.similarity == pytest.approx(1)


def test_rows_and_hashes_must_match():
    with pytest.raises(ValueError, match="2 rows but 1 hashes"):
        find_duplicates(at(0, 1), keys("a"), 0.9)


def edits(image: Image.Image) -> list[Image.Image]:
    """Return copies as they come about: compressed, resized, cropped at one side, mirrored."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    width, height = image.size
    return [
        Image.open(file), image.resize((100, 90)), ImageOps.mirror(image), image.convert("L"),
        ImageEnhance.Contrast(image).enhance(1.2),
        image.crop((round(0.08 * width), 0, width, round(0.92 * height))),
    ]  # fmt: skip


def in_one_layout() -> list[Image.Image]:
    """Return drawings of the demo that share a frame and a ground, and nothing else."""
    captions = [c.text for c in demo.captions() if c.group == "template"]
    return [demo.training_image(text).convert("RGB") for text in captions if "stamp" in text]


def of_photographs() -> list[Image.Image]:
    sample = need_package("sklearn.datasets").load_sample_images().images
    boxes = [(x, y, x + 213, y + 213) for x in (0, 213, 426) for y in (0, 213)]
    return [Image.fromarray(image).crop(box) for image in sample for box in boxes]


@pytest.mark.parametrize("pictures", [in_one_layout, of_photographs])
def test_copies_are_linked_and_a_shared_layout_is_not(pictures):
    """With a cosine that links everything: what the pictures themselves say."""
    originals = pictures()
    images = [*originals, *edits(originals[0])]
    rows = torch.nn.functional.normalize(torch.ones(len(images), 2))
    (group,) = find_duplicates(rows, keys(*map(str, range(len(images)))), 0.9, images)
    assert group.images == (0, *range(len(originals), len(images)))


def test_drawings_in_one_layout_are_no_near_duplicates():
    """By SSCD three of them are: nearer than an image is to its own light edits."""
    need_sscd()
    art, encoder = in_one_layout(), Sscd()
    everything = [demo.training_image(c.text) for c in demo.captions() if c.group == "template"]
    threshold = duplicate_threshold([image.convert("RGB") for image in everything], encoder.embed)
    rows, names = encoder.embed(art), keys(*map(str, range(len(art))))
    assert find_duplicates(rows, names, threshold)
    assert find_duplicates(rows, names, threshold, art) == ()


def test_planted_duplicates_on_flat_art_are_found_and_nothing_else():
    """The literature's .5 would tie unrelated drawings together here."""
    need_sscd()
    captions = [caption.text for caption in demo.captions()]
    art = [image for text in captions[:400:10] if (image := demo.training_image(text)) is not None]
    planted = [
        art[0].resize((100, 100), Image.Resampling.BICUBIC),
        ImageEnhance.Brightness(art[1]).enhance(1.1),
        art[2].crop((3, 3, 125, 125)),
    ]
    encoder = Sscd()
    threshold = duplicate_threshold(art, encoder.embed)
    rows, names = encoder.embed([*art, *planted]), map(str, range(len(art) + 3))
    groups = find_duplicates(rows, keys(*names), threshold, [*art, *planted])
    pairs = {(0, len(art)), (1, len(art) + 1), (2, len(art) + 2)}
    assert {group.images for group in groups} == pairs
    assert len(slow_groups(rows[: len(art)], keys(*map(str, range(len(art)))), 0.5)) > 0
    assert 0.7 < threshold < 1


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def without(image, left, top, right, bottom):
    """Return an image without these shares of its sides."""
    w, h = image.size
    return image.crop(tuple(map(round, (left * w, top * h, (1 - right) * w, (1 - bottom) * h))))


EDITS = {
    "flip": ImageOps.mirror,
    "jpeg": lambda image: jpeg(image, 40),
    "half": lambda image: image.resize((64, 64)),
    "crop": lambda image: image.crop((5, 5, 123, 123)),
    "both": lambda image: jpeg(ImageOps.mirror(image), 40),
    "corner": lambda image: without(image, 0.25, 0, 0, 0.25),
    "centre": lambda image: without(image, 0.125, 0.125, 0.125, 0.125),
    "one side": lambda image: without(image, 0, 0, 0.25, 0),
    "all": lambda image: jpeg(ImageOps.mirror(without(image, 0.11, 0.03, 0.06, 0.17)), 40),
}


@pytest.mark.parametrize("kind", ["drawings", *KINDS])
def test_edited_copies_are_grouped_and_a_subject_in_one_pose_is_not(kind):
    """By SSCD alone images of one character lie nearer to each other than to their own JPEG."""
    need_sscd()
    rng = random.Random(3)
    images = (
        [demo.training_image(c.text) for c in demo.captions() if c.group == "verbatim"][:10]
        if kind == "drawings" else [KINDS[kind](rng) for _ in range(10)]
    )  # fmt: skip
    every = [*images, *(edit(image) for image in images[:3] for edit in EDITS.values())]
    encoder = Sscd()
    groups = find_duplicates(
        encoder.embed(every), keys(*map(str, range(len(every)))),
        duplicate_threshold(images, encoder.embed), every,
    )  # fmt: skip
    count = len(EDITS)
    assert {group.images for group in groups} == {
        (place, *range(10 + place * count, 10 + (place + 1) * count)) for place in range(3)
    }


def drawings(group: str) -> list[Image.Image]:
    """Return the art of both demos, whose autoencoder and captions are one."""
    every = (demo.training_image(c.text) for c in demo.captions() if c.group == group)
    return [image.convert("RGB") for image in every if image is not None]


SETS = {
    "verbatim": lambda: drawings("verbatim"), "template": lambda: drawings("template"),
    **{kind: lambda kind=kind: [KINDS[kind](random.Random(n)) for n in range(16)] for kind in KINDS}
}  # fmt: skip


@pytest.mark.parametrize("kind", SETS)
def test_pixels_alone_tell_copies_from_images_of_one_kind(kind):
    """Copies that lost up to a quarter of each side, mirrored, at JPEG's quality 40."""
    images, rng = SETS[kind]()[:16], random.Random(0)
    shown = [Shown(image) for image in images]
    for one, image in zip(shown, images, strict=True):
        lost = [(share := rng.uniform(0, 0.25)) * (part := rng.random()), share * (1 - part)]
        across, down = lost, [rng.uniform(0, 0.12), rng.uniform(0, 0.12)]
        left, right, top, bottom = (*across, *down)
        copy = jpeg(ImageOps.mirror(without(image, left, top, right, bottom)), 40)
        found = lay_over(one, Shown(copy))
        assert found is not None
        assert found.same_everywhere
        assert found.agrees
    others = [lay_over(a, b) for place, a in enumerate(shown) for b in shown[place + 1 :: 3]]
    assert not [one for one in others if one is not None and one.same_everywhere]


def test_a_part_is_the_mean_over_its_area():
    """Edges of views lie on quarters of a pixel: of an image four times as large, on pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (SMALL, SMALL, 3), dtype=np.uint8)
    side = Shown(Image.fromarray(noise)).sides[0]
    large = side.repeat(4, axis=1).repeat(4, axis=2)
    for (top, bottom), (left, right) in zip(KEPT, reversed(KEPT), strict=True):
        part = large[:, int(4 * top) : int(4 * bottom), int(4 * left) : int(4 * right)]
        blocks = part.reshape(3, COARSE, part.shape[1] // COARSE, COARSE, -1)
        found = cut(side, (top, bottom), (left, right))
        np.testing.assert_allclose(found, blocks.mean((2, 4)), rtol=0, atol=1e-5)
