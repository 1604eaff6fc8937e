"""The example workflows run as they are, and show what they say they show."""

import json

import numpy as np
import pytest
from comfyui import newest
from comfyui_trees import NEWEST, OLDEST
from PIL import Image
from workflows import EXAMPLES, as_graph

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def graph_of(text: str) -> dict:
    import nodes as comfyui_nodes

    return as_graph(
        json.loads(text), lambda kind: comfyui_nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    )


@newest
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_has_a_screenshot_and_needs_no_download(comfy, path):
    assert path.with_suffix(".jpg").is_file()
    assert path.stat().st_size + path.with_suffix(".jpg").stat().st_size < 300_000
    types = {entry["class_type"] for entry in comfy.call(graph_of, path.read_text()).values()}
    assert "UnmemorizeLoadDemoModel" in types
    assert "CheckpointLoaderSimple" not in types
    assert len(json.loads(path.read_text("utf-8"))["nodes"]) <= 12
    assert not comfy.call(deprecated, sorted(types))


def deprecated(types: list[str]) -> list[str]:
    """Return those that ComfyUI would like to be rid of."""
    import nodes as comfyui_nodes

    return [
        name
        for name in types
        if getattr(comfyui_nodes.NODE_CLASS_MAPPINGS[name], "DEPRECATED", False)
    ]


OLDEST_AND_NEWEST = pytest.mark.parametrize("comfy", [OLDEST, NEWEST], indirect=True)


def load(comfy, root, name: str) -> dict:
    """Return the graph of an example."""
    text = (root / "example_workflows" / f"{name}.json").read_text("utf-8")
    return comfy.call(graph_of, text)


def of_type(graph: dict, kind: str) -> list[str]:
    return [i for i, entry in graph.items() if entry["class_type"] == kind]


@OLDEST_AND_NEWEST
def test_watch_and_report_tells_the_memorized_prompt_from_the_other(comfy, root):
    graph = load(comfy, root, "Check images while they are sampled")
    reports = of_type(graph, "UnmemorizeReport")
    run = comfy.run(graph, keep={i: [i, 4] for i in reports}, extra={"extra_pnginfo": {}})
    assert [run[i] for i in reports] == [True, False]
    saved = of_type(graph, "SaveImage")
    assert [len(run.ui[i]["images"]) for i in saved] == [3, 3]


@OLDEST_AND_NEWEST
def test_heatmap_lights_the_image_where_the_prompt_dictates(comfy, root):
    graph = load(comfy, root, "Which words carry it")
    (heatmap,), (shown,) = of_type(graph, "UnmemorizeTokenHeatmap"), of_type(graph, "VAEDecode")
    links = {"where": [heatmap, 1], "data": [heatmap, 3], "image": [shown, 0]}
    run = comfy.run(graph, keep=links)
    where = run["where"][0, ..., None]
    (panel,) = run.ui[heatmap]["unmemorize"]
    (image,) = panel["images"]
    expected = np.repeat(where, 3, -1)
    for saved, drawn in ((image, run["image"][0]), (panel["mask"], expected)):
        file = comfy.base / "temp" / saved["subfolder"] / saved["filename"]
        np.testing.assert_allclose(np.asarray(Image.open(file)) / 255, drawn, atol=1 / 255 + 1e-6)
    assert where.min() < 0.2
    assert where.max() > 0.9
    data = json.loads(run["data"])
    assert max(word["significance"] for word in data["words"]) > 0
    before, after = (data["left_out"][0][f"score_{when}"] for when in ("before", "after"))
    assert after < 0.8 * before


@OLDEST_AND_NEWEST
def test_lora_check_finds_the_captions_that_were_memorized(comfy, root):
    graph = load(comfy, root, "Captions a LoRA memorized")
    (check,), images = of_type(graph, "UnmemorizeLoraCheck"), of_type(graph, "VAEDecode")
    run = comfy.run(graph, keep={"data": [check, 2]} | {i: [i, 0] for i in images})
    data = json.loads(run["data"])
    greatest = max(control["increase"] for control in data["controls"])
    assert len(data["captions"]) == 3
    assert data["mean_increase"] > greatest
    # With the LoRA, whatever the seed, the same image.
    spread = [run[i].std(0).mean() for i in images]
    assert spread[1] < 0.5 * spread[0]
