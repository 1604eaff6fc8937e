"""The example workflows run as they are, and show what they say they show."""

import json

import pytest
from comfyui import newest
from workflows import EXAMPLES, as_graph

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def graph_of(text: str) -> dict:
    import nodes as comfyui_nodes

    return as_graph(
        json.loads(text), lambda kind: comfyui_nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    )


@newest
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_has_a_picture_and_needs_no_download(comfy, path):
    assert path.with_suffix(".jpg").is_file()
    assert path.stat().st_size + path.with_suffix(".jpg").stat().st_size < 300_000
    types = {entry["class_type"] for entry in comfy.call(graph_of, path.read_text()).values()}
    assert "UnmemorizeLoadDemoModel" in types
    assert "CheckpointLoaderSimple" not in types


@pytest.mark.parametrize("comfy", ["0.3.75", "0.30.0"], indirect=True)
def test_watch_and_report_tells_the_memorized_prompt_from_the_other(comfy, root):
    text = (root / "example_workflows" / "watch_and_report.json").read_text("utf-8")
    graph = comfy.call(graph_of, text)
    reports = [i for i, entry in graph.items() if entry["class_type"] == "UnmemorizeReport"]
    run = comfy.run(graph, keep={i: [i, 4] for i in reports}, extra={"extra_pnginfo": {}})
    assert [run[i] for i in reports] == [True, False]
    saved = [i for i, entry in graph.items() if entry["class_type"] == "SaveImage"]
    assert [len(run.ui[i]["images"]) for i in saved] == [3, 3]
