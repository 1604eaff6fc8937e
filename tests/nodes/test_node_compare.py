"""Compare References: copies of a folder's images, the nearest of them, and no verdict of few."""

import numpy as np
import pytest
from comfyui import newest, node
from PIL import Image, ImageOps
from unmemorize import demo

pytestmark = [pytest.mark.comfy, newest]
OUTPUTS = {"verdict": ["compare", 0], "copied": ["compare", 1], "nearest": ["compare", 2],
           "similarity": ["compare", 3]}  # fmt: skip


def graph(name: str, folder: str) -> dict:
    return {
        "image": node("LoadImage", image=name),
        "compare": node("UnmemorizeCompare", images=["image", 0], folder=folder),
    }


def test_a_copy_is_named_and_the_nearest_image_shown(comfy):
    folder = comfy.base / "input" / "held"
    folder.mkdir()
    for number, image in enumerate(demo.training_images()[::100]):
        image.save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    copy = ImageOps.mirror(demo.training_images()[500])
    copy.resize((100, 100)).save(comfy.base / "input" / "copy.png")
    demo.control_images()[0].save(comfy.base / "input" / "other.png")

    run = comfy.run(graph("copy.png", "held"), keep=OUTPUTS)
    assert run["copied"] is True
    assert "copy of 5.png" in run["verdict"]
    assert "left out: broken.png" in run["verdict"]
    shown = (run["nearest"][0] * 255).round().astype(np.uint8)
    assert np.array_equal(shown, np.asarray(Image.open(folder / "5.png").convert("RGB")))
    assert run["similarity"] > 0.95
    assert comfy.run(graph("copy.png", "held"), keep=OUTPUTS).ran == []
    other = comfy.run(graph("other.png", str(folder)), keep=OUTPUTS)
    assert other["copied"] is False
    assert other["verdict"].startswith("No copy found")

    for path in sorted(folder.glob("[0-9]*.png"))[7:]:
        path.unlink()
    few = comfy.run(graph("copy.png", "held"), keep=OUTPUTS)
    assert few["copied"] is False
    assert few["verdict"].startswith("No verdict")
    refused = comfy.run(graph("copy.png", "nowhere"), check=False)
    assert "There is no folder 'nowhere'" in refused.error
