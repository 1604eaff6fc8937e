"""Memorization Guard on the real web page: only the chosen method's parameters are there."""

import pytest
from test_node_guard import METHODS
from web_page import open_page

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
OTHERS = {"gate", "method", "force"}
PARAMETERS = {
    "delayed guidance": {"start_percent", "scale_before"},
    "static delay": {"start_percent", "scale_before"},
    "opposite guidance": {"opposite_scale", "opposite_until"},
    "attention": {"alpha", "tau", "repulsion", "fade", "blocks"},
    "initial noise": {
        "iterations", "learning_rate", "target_from", "target_quantile", "target_norm"
    },
}  # fmt: skip
CHOOSE = """methods => {
    const node = LiteGraph.createNode('UnmemorizeGuard');
    app.graph.add(node);
    const shown = {};
    for (const method of methods) {
        node.widgets.find(widget => widget.name === 'method').value = method;
        shown[method] = node.widgets.map(widget => widget.name);
    }
    return shown;
}"""


def test_only_the_chosen_method_shows_its_parameters(chromium, server):
    faults = []
    page = open_page(chromium, server.url, faults)
    shown = page.evaluate(CHOOSE, METHODS)
    page.close()
    for method, widgets in shown.items():
        expected = {f"method.{name}" for name in PARAMETERS[method]}
        assert set(widgets) == OTHERS | expected, method
    assert not faults
