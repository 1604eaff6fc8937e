"""What nodes show on themselves in the real page, drawn on the canvas and as Nodes 2.0."""

import os

import pytest
from comfyui import node
from demo_side import caption
from web_page import open_page, run

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
SAMPLER = {
    "model": ["demo", 0], "negative": ["empty", 0], "latent_image": ["latent", 0], "steps": 2,
    "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 7,
}  # fmt: skip
MEASURED = {"model": ["demo", 0], "negative": ["empty", 0], "latent": ["latent", 0]}
GRAPH = {
    "demo": node("UnmemorizeLoadDemoModel"),
    "text": node("CLIPTextEncode", clip=["demo", 1], text=caption()),
    "empty": node("CLIPTextEncode", clip=["demo", 1], text=""),
    "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    "sampled": node("KSampler", **SAMPLER, positive=["text", 0]),
    "image": node("VAEDecode", samples=["sampled", 0], vae=["demo", 2]),
    "detect": node("UnmemorizeDetect", **MEASURED, positive=["text", 0], seeds=1, steps=1),
    "heatmap": node(
        "UnmemorizeTokenHeatmap", **MEASURED, clip=["demo", 1], text=caption(), seeds=1, steps=1,
        most=2, shown_image=["image", 0],
    ),
    "mitigate": node(
        "UnmemorizeMitigate", **MEASURED, positive=["text", 0], seed=7, gate="always",
        target_from="norm", target_quantile=0.8, target_norm=0.1, learning_rate=0.1, iterations=1,
        vae=["demo", 2],
    ),
    "again": node("KSampler", **SAMPLER, positive=["mitigate", 0]),
    "yes": node("PrimitiveBoolean", value=True),
    "switch": node(
        "UnmemorizeSwitch", memorized=["yes", 0], ordinary=["sampled", 0], mitigated=["again", 0],
        vae=["demo", 2],
    ),
    "shown": node("VAEDecode", samples=["switch", 0], vae=["demo", 2]),
    "preview": node("PreviewImage", images=["shown", 0]),
}  # fmt: skip
NUMBERS = {name: str(number) for number, name in enumerate(GRAPH, 1)}
GRAPH = {  # as the page names nodes
    NUMBERS[name]: node(
        one["class_type"],
        **{
            key: [NUMBERS[value[0]], value[1]] if isinstance(value, list) else value
            for key, value in one["inputs"].items()
        },
    )
    for name, one in GRAPH.items()
}
NAMES = {"UnmemorizeDetect", "UnmemorizeTokenHeatmap", "UnmemorizeMitigate", "UnmemorizeSwitch"}
LOAD = """graph => {
    window.told = [];
    app.api.addEventListener('progress_text', event => told.push(event.detail));
    app.loadApiJson(graph, 'panels');
}"""
SHOW = """() => {
    // A node draws its images, and Nodes 2.0 exists at all, only where it is seen.
    const nodes = app.graph._nodes;
    const ours = nodes.filter(n => n.type.startsWith('Unm') || n.type === 'PreviewImage');
    nodes.forEach((n, i) => { n.pos = [-1200, 200 * i]; });
    ours.forEach((n, i) => { n.pos = [i * 430, 0]; });
    app.canvas.ds.scale = 0.58;
    app.canvas.ds.offset = [120, 150];
    app.graph.setDirtyCanvas(true, true);
}"""
PANELS = """() => Object.fromEntries(app.graph._nodes.map(n => {
    const panel = n.widgets?.find(w => w.name === 'unmemorize')?.element;
    const box = panel?.getBoundingClientRect();
    return [n.type, panel && {
        color: n.color,
        badge: n.badges.at(-1).text,
        text: panel.innerText,
        seen: box.width > 0 && box.height > 0,
        cut: panel.scrollHeight - panel.clientHeight,
        loaded: [...panel.querySelectorAll('img')].map(i => i.complete && i.naturalWidth),
        words: [...panel.querySelectorAll('.words span')].map(
            s => [s.innerText, s.style.background]),
    }];
}))"""
SAVED = """app.graph.serialize().nodes.map(
    n => [n.type, n.color ?? null, n.widgets_values?.length ?? 0]).sort()"""


HEADERS = """() => [...document.querySelectorAll('[data-node-id] *')].map(
    element => element.style.backgroundColor)"""
SLIDE = """() => {
    const clip = () => document.querySelector('.unmemorize-panel .pair img + img').style.clipPath;
    const slider = document.querySelector('.unmemorize-panel .pair + label input');
    const before = clip();
    slider.value = 90;
    slider.dispatchEvent(new Event('input'));
    return [before, clip()];
}"""


@pytest.fixture(params=["canvas", "Nodes 2.0"])
def page(request, chromium, server):
    """The page in one rendering; errors of this pack are in its `faults`."""
    server.post("/settings/Comfy.TutorialCompleted", True)  # no dialog over the page
    server.post("/settings/Comfy.VueNodes.Enabled", request.param == "Nodes 2.0")
    faults = []
    opened = open_page(chromium, server.url, faults)
    opened.faults, opened.vue = faults, request.param == "Nodes 2.0"
    yield opened
    opened.close()
    server.post("/settings/Comfy.VueNodes.Enabled", False)


def test_a_run_is_shown_on_the_nodes(page, server):
    server.post("/free", {"free_memory": True})  # nothing in the cache: every node shows its run
    page.evaluate(LOAD, GRAPH)
    page.wait_for_timeout(1000)  # the page moves the view when it has loaded a workflow
    page.evaluate(SHOW)
    before = page.evaluate(SAVED)
    run(page)
    page.evaluate(SHOW)
    page.wait_for_timeout(1500)
    if folder := os.environ.get("UNMEMORIZE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/panels_{'vue' if page.vue else 'canvas'}.png")
    panels = page.evaluate(PANELS)
    assert {name for name, panel in panels.items() if panel} == NAMES
    for name in NAMES:
        assert panels[name]["seen"], name
        assert panels[name]["cut"] <= 1, name
        assert panels[name]["text"].startswith(panels[name]["badge"])
    badges = {name: panel["badge"] for name, panel in panels.items() if panel}
    assert badges["UnmemorizeDetect"] == "no verdict"
    assert badges["UnmemorizeMitigate"] == "changed"
    assert badges["UnmemorizeSwitch"] == "mitigated"
    assert panels["UnmemorizeDetect"]["color"] != panels["UnmemorizeSwitch"]["color"]
    words = panels["UnmemorizeTokenHeatmap"]["words"]
    assert [word for word, _ in words] == caption().split()
    assert len({color for _, color in words}) > 1
    drawn = {name: panels[name]["loaded"] for name in NAMES}
    assert drawn == {
        "UnmemorizeDetect": [],
        "UnmemorizeTokenHeatmap": [128] * 2,
        "UnmemorizeMitigate": [128] * 2,
        "UnmemorizeSwitch": [128] * 2,
    }
    if page.vue:  # headers of its own, not the canvas
        assert {"rgb(107, 84, 32)", "rgb(91, 63, 138)"} <= set(page.evaluate(HEADERS))
    told = page.evaluate("told")
    assert {one["text"].split(",")[0] for one in told} >= {
        "1 of 2 predictions",
        "2 of 2 predictions",
    }
    assert page.evaluate(SAVED) == before  # no verdict is saved with the workflow
    assert page.evaluate(SLIDE) == ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 10%)"]
    assert not page.faults
