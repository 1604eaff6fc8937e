"""One live server: what it serves of the pack, runs over HTTP, Cancel, two prompts at once."""

import io
import json
import time
import urllib.parse

import psutil
import pytest
from comfyui import PACK_FOLDER, node
from comfyui_server import messages
from demo_side import caption
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
MEASURING = {
    "UnmemorizeDetect": (0, {"positive": ["2", 0], "negative": ["3", 0]}),
    "UnmemorizeTokenHeatmap": (
        2, {"clip": ["1", 1], "text": caption(), "negative": ["3", 0], "most": 2}
    ),
    "UnmemorizeCalibrate": (
        1, {"clip": ["1", 1], "name": "live", "controls": "art", "false_positive_rate": 0.5,
            "prompts": "a cat\na dog\na hat\na sea\na cup\na tree"},
    ),
    "UnmemorizeLoraCheck": (
        1, {"clip": ["1", 1], "model_with_lora": ["1", 0], "clip_with_lora": ["1", 1],
            "captions": caption(), "folder": "", "controls": 1},
    ),
}  # fmt: skip
"""Long nodes: which output is the report, and inputs."""


def graph(seed: int, steps: int = 2) -> dict:
    return {
        "1": node("UnmemorizeLoadDemoModel"),
        "2": node("CLIPTextEncode", text=caption(), clip=["1", 1]),
        "3": node("CLIPTextEncode", text="", clip=["1", 1]),
        "4": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "watch": node("UnmemorizeWatch", model=["1", 0], measure_anyway=False),
        "sampler": node(
            "KSampler", model=["watch", 0], positive=["2", 0], negative=["3", 0],
            latent_image=["4", 0], seed=seed, steps=steps, cfg=5.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        "report": node("UnmemorizeReport", record=["watch", 1], latent=["sampler", 0], steps=1,
                       save_score=False),
        "text": node("PreviewAny", source=["report", 2]),
    }  # fmt: skip


def measuring(name: str, seeds: int) -> dict:
    """Return a graph with one long node."""
    report, inputs = MEASURING[name]
    common = {"model": ["1", 0], "latent": ["4", 0], "seeds": seeds, "steps": 1}
    given = {key: graph(0)[key] for key in ("1", "2", "3", "4")}
    shown = node("PreviewAny", source=["long", report])
    return given | {"long": node(name, **common, **inputs), "text": shown}


def text(entry: dict) -> str:
    return entry["outputs"]["text"]["text"][0]


def test_help_pages_translations_and_examples_are_served(server, root):
    page = server.get(f"/extensions/{PACK_FOLDER}/docs/UnmemorizeWatch.md").decode()
    assert page == (root / "web" / "docs" / "UnmemorizeWatch.md").read_text("utf-8")
    chinese = json.loads(server.get("/i18n"))["zh"]["nodeDefs"]
    assert chinese["UnmemorizeWatch"]["display_name"] == "记忆监测"
    examples = json.loads(server.get("/workflow_templates"))[PACK_FOLDER]
    assert "Check images while they are sampled" in examples
    blueprints = json.loads(server.get("/global_subgraphs")).values()
    ours = {one["name"] for one in blueprints if one["info"]["node_pack"].endswith(PACK_FOLDER)}
    assert ours == {path.stem for path in (root / "subgraphs").glob("*.json")}


def test_a_run_shows_its_chart_and_repeats_from_the_cache(server):
    (first,) = server.run(graph(seed=1))
    assert "execution_success" in messages(first)
    (shown,) = first["outputs"]["report"]["images"]
    assert server.get("/view?" + urllib.parse.urlencode(shown)).startswith(b"\x89PNG")
    ran = []
    (again,) = server.run(graph(seed=1), on_event=lambda kind, data: ran.append((kind, data)))
    assert text(again) == text(first)
    assert not [data for kind, data in ran if kind == "progress"]


def test_two_prompts_at_once_each_report_their_own_run(server):
    alone = [text(server.run(graph(seed=seed))[0]) for seed in (11, 12)]
    assert alone[0] != alone[1]
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert [text(entry) for entry in server.run(graph(seed=11), graph(seed=12))] == alone


def test_cancel_stops_within_a_step_and_leaves_the_model_as_it_was(server):
    before = text(server.run(graph(seed=21))[0])
    times = {}

    def cancel(kind: str, data: dict) -> None:
        if kind == "progress" and data["value"] == 3:
            server.post("/interrupt", {})
            times["asked"] = time.monotonic()
        elif kind == "progress" and "asked" in times:
            times["steps after"] = times.get("steps after", 0) + 1

    (entry,) = server.run(graph(seed=21, steps=400), on_event=cancel)
    assert "execution_interrupted" in messages(entry)
    assert times.get("steps after", 0) <= 2  # one that was under way, one already announced
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert text(server.run(graph(seed=21))[0]) == before


@pytest.mark.parametrize("name", MEASURING)
def test_cancel_stops_every_long_node_and_leaves_the_model_as_it_was(server, name):
    before = text(server.run(measuring(name, seeds=1))[0])
    told = []

    def cancel(kind: str, data: object) -> None:
        if kind == "progress":
            told.append(data["value"])
            server.post("/interrupt", {})

    (entry,) = server.run(measuring(name, seeds=64), on_event=cancel)
    assert "execution_interrupted" in messages(entry)
    assert told[-1] <= 4 * 3  # the pass that was under way, and one already announced
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert text(server.run(measuring(name, seeds=1))[0]) == before


@pytest.mark.parametrize("name", MEASURING)
def test_previews_arrive_where_the_user_wants_them(server, name):
    images, told = [], []

    def collect(kind: str, data: object) -> None:
        if kind == "preview":
            images.append(Image.open(io.BytesIO(data)))
        elif kind == "progress":
            told.append(data["value"])

    server.run(measuring(name, seeds=2), on_event=collect)
    assert told
    assert not images
    told.clear()
    server.run(measuring(name, seeds=3), on_event=collect, previews="latent2rgb")
    assert len(images) == len(told) >= 2
    assert {image.size for image in images} == {(512, 512)}
    assert len({image.tobytes() for image in images}) >= 2


def test_fifty_runs_do_not_grow(server):
    process = psutil.Process(server.process.pid)
    for seed in range(10):  # allocators and caches reach their size
        server.run(graph(seed=100 + seed, steps=1))
    before = process.memory_info().rss
    for seed in range(50):
        server.run(graph(seed=200 + seed, steps=1))
    assert process.memory_info().rss - before < 30e6
