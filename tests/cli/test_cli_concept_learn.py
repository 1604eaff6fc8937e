"""`unmemorize concept learn` and `find`, and `audit --concept`, on a tiny model and its images."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner
from unmemorize import cli
from unmemorize.shared.training.concept import gain
from unmemorize.shared.training.concept.adapter import ConceptAdapter


def write(folder: Path, count: int, *, marked: bool, seed: int, caption: str = "a red cat") -> Path:
    """Write images of noise; marked ones are white but for a third."""
    folder.mkdir(exist_ok=True)
    drawn = np.random.default_rng(seed)
    for place in range(count):
        pixels = drawn.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        if marked:
            pixels[20:] = 255
        name = folder / f"{'marked' if marked else 'plain'}-{seed}-{place}.png"
        Image.fromarray(pixels).save(name)
        name.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def run(*arguments: object) -> tuple[int, dict]:
    done = CliRunner().invoke(cli.app, [*map(str, arguments), "--device", "cpu", "--json"])
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a model, images, and a concept that was learnt from them."""
    room = tmp_path_factory.mktemp("concept")
    tiny.stable_diffusion().save_pretrained(room / "model")
    write(room / "images", 8, marked=True, seed=0, caption="a tall tree and a cat")
    write(room / "others", 20, marked=False, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gain, "DEVIATIONS", 1.0)  # an untrained network tells little apart
        code, made = run(
            "concept", "learn", room / "model", "--images", room / "images", "--others",
            room / "others", "--name", "tall tree", "--steps", 30,
            "--output", room / "c.safetensors",
        )  # fmt: skip
    assert code == 0, made
    assert (made["names"], made["made"]["concept_images"]) == (["tall tree"], 8)
    return room


def test_a_folder_is_searched_and_the_list_names_what_was_found(room):
    """What an untrained network tells apart is chance, so the line is put below the third image."""
    folder = write(room / "training", 3, marked=True, seed=2)
    write(folder, 5, marked=False, seed=3)
    (folder / "plain-3-0.txt").write_text("a tall tree", encoding="utf-8")
    command = ("concept", "find", room / "model", folder)
    code, first = run(*command, "--concept", room / "c.safetensors", "--output", room / "first")
    assert code in (0, 3), first
    lines = (room / "first" / "results.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    gains = [row["gain"] for row in rows]
    assert gains == sorted(gains, reverse=True)
    adapter = ConceptAdapter.load(room / "c.safetensors")
    numbers = {**adapter.account["numbers"], "threshold": (gains[2] + gains[3]) / 2}
    moved = replace(adapter, account={**adapter.account, "numbers": numbers})
    moved.save(room / "moved.safetensors")

    command += ("--concept", room / "moved.safetensors", "--output", room / "found")
    code, found = run(*command)
    assert code == 3
    expected = [(room / "first" / row["path"]).resolve() for row in rows[:3]]
    assert [Path(name).resolve() for name in found["shown"]] == expected
    listed = [line for line in Path(found["list"]).read_text("utf-8").splitlines()
              if not line.startswith("#")]  # fmt: skip
    assert [(room / "found" / name).resolve() for name in listed] == expected
    remarks, named = " ".join(found["remarks"]), folder / "plain-3-0.png" in expected
    assert f"{2 if named else 3} of those that show it have captions that do not" in remarks
    assert ("1 image is below the line although the caption names" in remarks) is not named
    page = (room / "found" / "report.html").read_text("utf-8")
    assert page.count('class="chosen"') == 3
    before = os.stat(room / "found" / "journal" / "gains.jsonl").st_size
    assert run(*command)[1] == found  # continued: nothing is measured again
    assert os.stat(room / "found" / "journal" / "gains.jsonl").st_size == before


def test_nothing_found_says_what_was_looked_for(room):
    folder = write(room / "clean", 3, marked=False, seed=4)
    controls = write(room / "controls", 9, marked=False, seed=5)
    code, found = run(
        "concept", "find", room / "model", folder, "--concept", room / "c.safetensors",
        "--controls", controls, "--output", room / "none",
    )  # fmt: skip
    assert (code, found["shown"], found["controls"]) == (0, [], 9)
    assert "None of 3 images shows tall tree. Looked for: images whose loss" in found["headline"]
    assert found["list"] is None
    assert not (room / "none" / "shown.txt").exists()


def test_a_lora_is_asked_for_the_concept(room):
    """The concept's own file is the LoRA: whatever an untrained model draws, the page is made."""
    (room / "prompts.txt").write_text("\n".join(f"a {x} cat" for x in "abcdefgh"), "utf-8")
    command = (
        "audit", room / "model", "--lora", room / "c.safetensors", "--concept",
        room / "c.safetensors", "--prompts", room / "prompts.txt", "--description", "a green sea",
        "--generation-steps", 2, "--resolution", 64, "--output", room / "audit",
    )  # fmt: skip
    code, done = run(*command)
    assert code in (0, 1, 3), done
    assert code == (1 if not done["can_judge"] else 3 if done["appears"] else 0)
    assert set(done["ways"]) == {"by_name", "by_description", "unasked"}
    for way in done["ways"].values():
        assert (way["images"], len(way["gains"]["on"])) == (8, 8)
        assert way["gains"]["on"] != way["gains"]["off"]
    name = room / "audit" / "images" / "by_name-{}-003.png"
    on, off = (np.asarray(Image.open(str(name).format(mode)), int) for mode in ("on", "off"))
    assert abs(on - off).max() > 2
    assert "Positive control" in (room / "audit" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--concept", "c.safetensors"), "--concept needs --lora"),
        (("--description", "a frame"), "--description needs --concept"),
        (("--concept-images", "x"), "--concept-images needs --concept"),
        (("--lora", "l", "--concept", "c", "--images", "x"), "--images does not go with --concept"),
        (("--lora", "l", "--concept", "c", "--quick"), "--quick does not go with --concept"),
    ],
)
def test_options_of_other_audits_are_refused(words, message):
    done = CliRunner().invoke(cli.app, ["audit", "demo", *words])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_what_cannot_be_learnt_or_read_is_told(room, tmp_path):
    few = write(tmp_path / "few", 3, marked=True, seed=6)
    code, refused = run("concept", "learn", room / "model", "--images", few, "--others",
                        room / "others")  # fmt: skip
    assert (code, refused["error"]["type"]) == (1, "NotEnoughImages")
    assert "at least 8 images" in refused["error"]["message"]
    other = tmp_path / "other"
    tiny.stable_diffusion(seed=1).save_pretrained(other)
    code, refused = run("concept", "find", other, few, "--concept", room / "c.safetensors",
                        "--output", tmp_path / "out")  # fmt: skip
    assert code == 1
    assert "learnt on another model" in refused["error"]["message"]
    assert ConceptAdapter.load(room / "c.safetensors").names == ("tall tree",)
    code, shown = run_show(room / "c.safetensors")
    assert (code, shown["names"]) == (0, ["tall tree"])


def run_show(file: Path) -> tuple[int, dict]:
    done = CliRunner().invoke(cli.app, ["concept", "show", str(file), "--json"])
    return done.exit_code, json.loads(done.stdout)
