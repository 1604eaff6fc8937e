"""Takes the screenshots beside the example workflows: runs each on the web page and looks at it.

    python tests/nodes/take_screenshots.py [NAME ...]

with the Python of `make test-comfyui` and Chromium, all examples unless named. A screenshot shows
the part of the workflow that has images in it; docs/comfyui.jpg shows the page of
`Before and after mitigation`.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from comfyui import make_base, missing
from comfyui_server import Server
from comfyui_trees import NEWEST, tree
from cpu_torch import tolerate_cpu_torch
from playwright.sync_api import sync_playwright
from web_page import open_page, open_workflow, run
from workflows import EXAMPLES

WHOLE = "Before and after mitigation"
WHOLE_SCREENSHOT = Path(__file__).resolve().parents[2] / "docs" / "comfyui.jpg"
WIDTH, HEIGHT = 800, 900
"""Pixels of a screenshot, at most."""
CORNER = 100
"""Where on the page the screenshot begins, away from its menus."""
SHOW = """([width, height, corner]) => {
    const drawn = node => node.imgs?.length || node.isSubgraphNode?.()
        || node.widgets?.some(widget => widget.name === 'unmemorize');
    const seen = app.graph._nodes.filter(drawn).map(node => node.getBounding());
    const left = Math.min(...seen.map(box => box[0])) - 15;
    const top = Math.min(...seen.map(box => box[1])) - 25;
    const right = Math.max(...seen.map(box => box[0] + box[2])) + 15;
    const bottom = Math.max(...seen.map(box => box[1] + box[3])) + 15;
    const view = app.canvas.ds;
    view.scale = Math.min(1, width / (right - left), height / (bottom - top));
    view.offset = [corner / view.scale - left, corner / view.scale - top];
    app.graph.setDirtyCanvas(true, true);
    return [(right - left) * view.scale, (bottom - top) * view.scale];
}"""


def take(page: Any, workflow: Path) -> None:
    """Write the screenshot of one workflow beside it."""
    open_workflow(page, workflow)
    run(page)
    page.wait_for_timeout(2000)  # images load and fade in
    width, height = page.evaluate(SHOW, [WIDTH, HEIGHT, CORNER])
    page.wait_for_timeout(1000)
    page.screenshot(
        path=workflow.with_suffix(".jpg"),
        type="jpeg",
        quality=85,
        clip={"x": CORNER, "y": CORNER, "width": width, "height": height},
    )


def main(*names: str) -> None:
    """Take the screenshots of the workflows named, or of all."""
    if reason := missing(NEWEST):
        raise SystemExit(reason)
    tolerate_cpu_torch()
    with tempfile.TemporaryDirectory() as base, sync_playwright() as driver:
        pack = make_base(Path(base))
        pack.rename(pack.with_name("unmemorize"))  # shown on the nodes
        server = Server(tree(NEWEST), Path(base))
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            server.post("/settings/Comfy.TutorialCompleted", True)  # no dialog over the page
            for workflow in EXAMPLES:
                if not names or workflow.stem in names:
                    page = open_page(browser, server.url, [])
                    take(page, workflow)
                    if workflow.stem == WHOLE:
                        page.screenshot(path=WHOLE_SCREENSHOT, type="jpeg", quality=85)
                    page.close()
        finally:
            browser.close()
            server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
