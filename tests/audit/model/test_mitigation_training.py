"""A folder of training images: read by captions, encoded, kept away from, compared with."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from unmemorize import demo
from unmemorize.audit.common.measure import silent
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.inputs import Inputs
from unmemorize.audit.model.mitigation import run_mitigation
from unmemorize.audit.model.mitigation_result import MitigationConfig
from unmemorize.audit.model.mitigation_training import (
    has_training_images,
    keep_away,
    known_training,
    read_training,
)
from unmemorize.shared.files.prompts import PromptSet

NOBODY = PromptSet(prompts=("a",), sources=((),), images=((),), read=1, empty=0)


class Encoder:
    """Stands for a pipeline: an image's latents are its mean colour."""

    def __init__(self):
        self.batches = []

    def encode_images(self, images):
        self.batches.append(len(images))
        return torch.stack([torch.tensor(i.getpixel((0, 0))).float().view(3, 1, 1) for i in images])


@pytest.fixture
def folder(tmp_path):
    for number in range(18):
        (tmp_path / "sub").mkdir(exist_ok=True)
        path = tmp_path / "sub" / f"{number:02d}.png"
        Image.new("RGB", (20, 10), (10 * number, 0, 0)).save(path)
        if number != 5:
            path.with_suffix(".txt").write_text("twice" if number < 2 else f"image {number}")
    return tmp_path


def test_images_with_and_without_captions_are_all_kept_away_from(folder):
    config = MitigationConfig(audit=AuditConfig(model="mine"), training=folder)
    known, encoder = known_training(config, NOBODY, silent), Encoder()
    method = keep_away(known, encoder)
    assert encoder.batches == [16, 2]
    by_caption = dict(zip(method.captions, method.latents[:, 0, 0, 0].tolist(), strict=True))
    assert len(method.captions) == 18
    assert by_caption[""] == 50
    assert by_caption["image 17"] == 170
    assert method.captions.count("twice") == 2


def test_a_table_of_captions(folder):
    rows = ["file_name,text", "sub/03.png,three", "sub/04.png,four"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    read = read_training(folder)
    assert dict(zip(read.prompts, read.images, strict=True)) == {
        "three": (folder / "sub/03.png",), "four": (folder / "sub/04.png",),
    }  # fmt: skip


def test_what_is_no_folder_of_images(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        read_training(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no images"):
        read_training(tmp_path)


def test_whether_training_images_are_named():
    inputs = Inputs(prompts=NOBODY, groups=(None,), controls_name="", controls=())
    mine = MitigationConfig(audit=AuditConfig(model="mine"))
    assert not has_training_images(mine, inputs)
    assert has_training_images(dataclasses.replace(mine, training=Path("folder")), inputs)
    assert has_training_images(MitigationConfig(audit=AuditConfig(model=demo.NAME)), inputs)


def test_images_are_compared_with_the_folder_and_leave_it(config, captions, tmp_path):
    chosen = captions["verbatim"][:9]
    (tmp_path / "training").mkdir()
    for number, caption in enumerate(chosen):
        path = tmp_path / "training" / f"{number}.png"
        demo.training_image(caption).save(path)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    result = run_mitigation(
        MitigationConfig(
            audit=dataclasses.replace(
                config, prompts=(), output=tmp_path / "out", generation_steps=4
            ),
            texts=(chosen[0],), methods=("neighbour",), images=1, gate="always", advise=False,
            training=tmp_path / "training",
        )
    )  # fmt: skip
    assert result.summary["training_images"] == 9
    plain, acted = result.entries[0].trials
    assert acted.acted
    nearest = plain.images[0].nearest
    assert nearest.caption in chosen
    before, after = (
        Image.open(result.folder / trial.images[0].path).convert("RGB") for trial in (plain, acted)
    )
    assert ImageChops.difference(before, after).getbbox()


def test_a_probe_with_one_training_image_is_refused_at_once(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
    audit = AuditConfig(model="mine", output=tmp_path / "out")
    config = MitigationConfig(
        audit=audit, texts=("a cat",), probe=True, training=tmp_path / "one"
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"needs two, and knows one. Give --training"):
        run_mitigation(config)
    assert not (tmp_path / "out").exists()


def test_a_probe_without_training_images_and_an_unknown_gate_are_refused_at_once(tmp_path):
    audit = AuditConfig(model="mine", output=tmp_path / "out")
    with pytest.raises(ValueError, match="none are known: give their folder with --training"):
        run_mitigation(MitigationConfig(audit=audit, texts=("a cat",), probe=True))
    with pytest.raises(ValueError, match="`gate` must be one of calibrated, always, never"):
        MitigationConfig(audit=audit, gate="sometimes")
