"""ComfyUI's web page in a browser: opened, a saved workflow shown in it, and run."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from comfyui import PACK_FOLDER

START, RUN = 120_000, 300_000  # milliseconds
# `app` is there while the page still loads a workflow of its own, which would replace ours. The
# spinner turns until that is done.
READY = "() => window.app?.extensionManager?.spinner === false"
NODES = """() => app.graph._nodes.map(node => ({
    type: node.type, id: String(node.id), known: node.constructor.nodeData !== undefined,
    images: (node.imgs ?? []).map(image => image.naturalWidth),
}))"""
RUNS = "async () => Object.keys(await (await fetch('/history')).json()).length"
"""How many runs are over."""
DRAWN = """async () => {
    const runs = Object.values(await (await fetch('/history')).json());
    // Of nodes inside of subgraphs nothing is seen: their ids hold a colon.
    const outputs = Object.entries(runs.at(-1)?.outputs ?? {}).filter(
        ([id, output]) => !id.includes(':') && output.images?.length);
    const drawn = app.graph._nodes.filter(node => node.imgs?.length);
    return drawn.length >= outputs.length;
}"""


def open_page(browser: Any, url: str, faults: list[str]) -> Any:
    """Return a Playwright page that has started; what it requests from elsewhere is refused.

    Args:
        browser: Of Playwright.
        url: Of the server.
        faults: What this pack does wrong on the page is added here.
    """
    page = browser.new_page(viewport={"width": 1600, "height": 1200})
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if _is_ours(m.text, m.type) else None)
    host = urlparse(url).netloc
    page.route(lambda url: urlparse(url).netloc not in (host, ""), lambda route: route.abort())
    page.goto(url)
    page.wait_for_function(READY, timeout=START)
    return page


def _is_ours(text: str, kind: str) -> bool:
    return kind == "error" and ("nmemorize" in text or PACK_FOLDER in text)


def open_workflow(page: Any, path: Path) -> list[dict]:
    """Open a saved workflow, as its menu entry does, and return its nodes."""
    workflow = json.loads(path.read_text("utf-8"))
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    nodes = page.evaluate(NODES)
    saved = {str(node["id"]): node["type"] for node in workflow["nodes"]}
    assert {node["id"]: node["type"] for node in nodes} == saved
    return nodes


def run(page: Any) -> list[dict]:
    """Run the workflow until its images are shown, and return its nodes."""
    before = page.evaluate(RUNS)
    page.evaluate("() => app.queuePrompt(0, 1)")
    _wait_until(lambda: page.evaluate(RUNS) > before, RUN)
    _wait_until(lambda: page.evaluate(DRAWN), START)
    return page.evaluate(NODES)


def _wait_until(condition: Callable[[], bool], timeout: int) -> None:
    """Ask again and again: Playwright's own waiting takes an unfinished promise for a yes."""
    end = time.monotonic() + timeout / 1000
    while not condition():
        assert time.monotonic() < end, "the workflow did not come to its end"
        time.sleep(0.1)
