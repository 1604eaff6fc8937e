"""`unmemorize concept layers` and `build --images`, on pictures with a mark and without."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import ImageDraw
from typer.testing import CliRunner
from unmemorize import cli, demo
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.subspaces import LayerSubspaces


@pytest.fixture
def unmemorize(tmp_path, monkeypatch):
    """Function that runs `unmemorize concept` in a folder with pictures: exit code, JSON."""
    monkeypatch.chdir(tmp_path)
    for place, image in enumerate(demo.training_images()[:8]):
        folder = tmp_path / ("marked" if place % 2 else "plain")
        folder.mkdir(exist_ok=True)
        image = image.convert("RGB").resize((128, 128))
        if place % 2:
            ImageDraw.Draw(image).ellipse([0, 0, 40, 40], fill="#ff00d4")
        image.save(folder / f"{place}.png")
        caption = f"drawing {place}, Zorp!" if place % 2 else f"drawing {place}"
        (folder / f"{place}.txt").write_text(caption, encoding="utf-8")

    def run(*arguments: object) -> tuple[int, dict]:
        done = CliRunner().invoke(cli.app, ["concept", *map(str, arguments), "--json"])
        return done.exit_code, json.loads(done.stdout)

    return run


def test_layers_are_built_from_pictures_told_apart_by_caption(unmemorize):
    folders = ("--images", "marked", "--images", "plain")
    code, refused = unmemorize("layers", "demo", *folders, "--name", "quix", "--device", "cpu")
    assert code == 1
    assert "0 images of the concept, at least 4" in refused["error"]["message"]
    assert not Path("concept.layers.safetensors").exists()

    code, built = unmemorize(
        "layers", "demo", *folders, "--name", "zorp", "--cap", 2, "--device", "cpu"
    )
    assert code == 0
    assert built["pictures"] == {"concept": 4, "retained": 4}
    assert built["names"] == ["zorp"]
    assert 0 <= built["held_out"]["retained"] <= 1
    made = LayerSubspaces.load(Path(built["output"]))
    assert {name: basis.shape[1] for name, basis in made.bases.items()} == built["ranks"]
    assert max(built["ranks"].values()) == 2
    _, shown = unmemorize("show", built["output"])
    assert shown == {key: built[key] for key in built if key != "output"}
    table = CliRunner().invoke(cli.app, ["concept", "show", built["output"]]).stdout
    assert "images held out" in table
    assert made.regions is not None
    assert 0 <= built["places"]["retained"] <= built["places"]["concept"] <= 1
    assert "places held out" in table
    replace(made, regions=None).save(Path("earlier.safetensors"))
    earlier = CliRunner().invoke(cli.app, ["concept", "show", "earlier.safetensors"]).stdout
    assert "by an earlier version" in " ".join(earlier.split())


def test_a_concept_is_built_from_pictures_alone(unmemorize):
    sentences = [f"{line} {n}" for n, line in enumerate(["a {} , drawing", "{} at night"] * 4)]
    Path("templates.txt").write_text("\n".join(sentences), "utf-8")
    common = ("--neutral", "animal", "--templates", "templates.txt", "--device", "cpu")
    code, built = unmemorize(
        "build", "demo", "--images", "marked", "--learn-steps", 4, *common, "--force"
    )
    assert code == 0
    learnt = built["learnt"]
    assert (learnt["pictures"], learnt["steps"]) == (4, 4)
    assert learnt["loss_before"] > 0
    assert ConceptSubspace.load(Path(built["output"])).rank == built["rank"] > 0
    assert unmemorize("show", built["output"])[1]["learnt"] == learnt
    code, refused = unmemorize("test", built["output"], "demo")
    assert code == 1
    assert "learnt from images" in refused["error"]["message"]
    code, refused = unmemorize("build", "demo", *common)
    assert code == 2
    assert "at least one name" in refused["error"]["message"]
    Path("empty").mkdir()
    code, refused = unmemorize("build", "demo", "--images", "empty", *common)
    assert code == 2
    assert "holds no images" in refused["error"]["message"]
