"""Audits of folders of which is known what comes back: everything but the drawing is real."""

import io
import random
from dataclasses import replace

import pytest
from known_sets import Judge, Trained, saved
from needs import need_package, need_sscd
from PIL import Image, ImageOps
from simulated_sets import Simulated, copy_of

need_package("faiss")


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    need_sscd()
    return Judge(tmp_path_factory.mktemp("features"))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("kind", "count"), [("character", 10), ("style", 6)])
def test_copies_in_one_subject_and_pose_are_named_and_nothing_else(
    judge, tmp_path, kind, count, shared
):
    for copies in (0, 1, 3):
        simulated = Simulated(kind=kind, count=count, seed=1, copies=copies, shared=shared)
        said = judge.judge(*simulated.write(tmp_path / str(copies)))
        assert said.named == set(range(copies))
        assert not (said.clean and copies)
        if copies:
            assert said.headline.text.startswith(f"{copies} of {count} training images came back")


def test_images_that_the_base_draws_change_nothing_for_the_others(judge, tmp_path):
    trained, made = Simulated(kind="style", count=10, seed=2, copies=10).write(tmp_path)
    drawn = {trained[0].caption, trained[1].caption}
    on = {(m.prompt, m.seed): m.path for m in made if m.lora}
    base = [replace(m, path=on[m.prompt, m.seed]) if m.prompt in drawn else m for m in made]
    said = judge.judge(trained, base)
    assert [v.verdict for v in said.verdicts] == ["base"] * 2 + ["verbatim"] * 8
    assert "2 more are drawn by the base model" in said.headline.text


def test_near_duplicates_of_three_images_that_come_back(judge, tmp_path):
    """Flips, crops and JPEGs of quality 40 in the folder; each is a copy of what comes back."""

    def edits(image: Image.Image) -> list[Image.Image]:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=40)
        jpeg = Image.open(file).convert("RGB")
        return [ImageOps.mirror(image), image.crop((5, 5, 123, 123)), jpeg, ImageOps.mirror(jpeg)]

    trained, made = Simulated(kind="style", count=3, seed=3, copies=3).write(tmp_path)
    more = [
        Trained(path=saved(edited, path := tmp_path / f"{place}-{number}.png"), caption=t.caption,
                trip=saved(edited, path.with_name(f"trip-{path.name}")))
        for place, t in enumerate(trained)
        for number, edited in enumerate(edits(Image.open(t.path).convert("RGB")))
    ]  # fmt: skip
    said = judge.judge([*trained, *more], made)
    assert {0, 1, 2} <= said.named
    assert len(said.named) >= 12  # a far crop of an image may be none of what came back
    assert said.headline.given


def test_a_mirrored_copy_is_a_copy(judge, tmp_path):
    trained, made = Simulated(kind="character", count=10, seed=4).write(tmp_path)
    image = ImageOps.mirror(Image.open(trained[0].path).convert("RGB"))
    first = next(m for m in made if m.lora and m.prompt == trained[0].caption)
    back = saved(copy_of(image, random.Random(1)), tmp_path / "mirrored.png")
    said = judge.judge(trained, [replace(m, path=back) if m is first else m for m in made])
    assert said.named == {0}
