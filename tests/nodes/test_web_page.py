"""The real web page: the pack's nodes are known, its examples open, run and draw."""

import pytest
from web_page import open_page, open_workflow, run
from workflows import EXAMPLES

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture
def page(chromium, server):
    """The page, started; errors of this pack are in its `faults`."""
    faults = []
    opened = open_page(chromium, server.url, faults)
    opened.faults = faults
    yield opened
    opened.close()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_and_every_node_is_known(page, path):
    nodes = open_workflow(page, path)
    assert all(node["known"] for node in nodes if "Note" not in node["type"])
    assert "missing" not in " ".join(page.locator("[role=dialog]").all_inner_texts()).lower()
    assert not page.faults


VERDICTS = """() => app.graph._nodes.filter(node => node.isSubgraphNode?.())
    .map(node => node.badges.at(-1).text)"""


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        (
            "Check images while they are sampled",
            {"PreviewImage": [[640]], "SaveImage": [[128] * 3] * 2},
        ),
        (
            "Is this prompt memorized",
            {"UnmemorizeCheck": [[640]], "UnmemorizePrompt": [[128, 128]], "SaveImage": [[128]]},
        ),
        ("Which words carry it", {"UnmemorizeTokenHeatmap": [[640]]}),
        (
            "Captions a LoRA memorized",
            {"UnmemorizeLoraCheck": [[640]], "PreviewImage": [[128] * 3] * 2},
        ),
        ("Before and after mitigation", {"SaveImage": [[128] * 3] * 2}),
        ("Sample again if memorized", {"PreviewImage": [[128]], "SaveImage": [[128]]}),
    ],
)
def test_an_example_draws_its_images_on_the_nodes(page, root, name, drawn):
    open_workflow(page, root / "example_workflows" / f"{name}.json")
    images = {}
    for node in run(page):
        if node["images"]:
            images.setdefault(node["type"], []).append(node["images"])
    assert images == drawn
    assert not page.faults
    if name == "Check images while they are sampled":  # one subgraph twice, two verdicts
        assert page.evaluate(VERDICTS) == ["3 of 3 memorized", "not flagged"]
