"""The real web page: the pack's nodes are known, its example opens, runs and draws."""

import json
from urllib.parse import urlparse

import pytest
from comfyui import PACK_FOLDER
from workflows import EXAMPLES

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
START, RUN = 120_000, 300_000  # milliseconds
READY = """() => window.app?.graph && window.LiteGraph
    && Object.keys(LiteGraph.registered_node_types).length > 50"""
RESULT = """() => app.graph._nodes.map(node => ({
    type: node.type, id: node.id, known: node.constructor.nodeData !== undefined,
    images: (node.imgs ?? []).map(image => image.naturalWidth),
}))"""
IDLE = """async () => {
    const queue = await (await fetch('/queue')).json();
    return queue.queue_running.length + queue.queue_pending.length === 0;
}"""


@pytest.fixture
def page(chromium, server):
    """The page, opened; what it requests from elsewhere is refused."""
    opened = chromium.new_page(viewport={"width": 1600, "height": 1000})
    host = urlparse(server.url).netloc
    opened.route(lambda url: urlparse(url).netloc not in (host, ""), lambda route: route.abort())
    opened.faults = []
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.on(
        "console", lambda m: opened.faults.append(m.text) if _is_ours(m.text, m.type) else None
    )
    opened.goto(server.url)
    opened.wait_for_function(READY, timeout=START)
    yield opened
    opened.close()


def _is_ours(text: str, kind: str) -> bool:
    return kind == "error" and ("nmemorize" in text or PACK_FOLDER in text)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_and_every_node_is_known(page, path):
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads(path.read_text("utf-8")))
    page.wait_for_function("() => app.graph._nodes.length > 3")
    assert all(node["known"] for node in page.evaluate(RESULT) if "Note" not in node["type"])
    assert "missing" not in " ".join(page.locator("[role=dialog]").all_inner_texts()).lower()
    assert not page.faults


def test_watch_and_report_draws_its_charts_on_the_nodes(page, root):
    workflow = json.loads((root / "example_workflows/watch_and_report.json").read_text("utf-8"))
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function("() => app.graph._nodes.length > 3")
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function(IDLE, timeout=RUN)
    drawn = "() => app.graph._nodes.filter(n => n.imgs?.length).length >= 4"
    page.wait_for_function(drawn, timeout=START)
    images = {
        node["id"]: node["images"] for node in page.evaluate(RESULT)
        if node["type"] == "UnmemorizeReport"
    }  # fmt: skip
    assert list(images.values()) == [[640], [640]]
    assert not page.faults
