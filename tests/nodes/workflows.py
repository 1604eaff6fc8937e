"""Saved workflows of the web page, as the graphs that it posts."""

from collections.abc import Callable, Iterator
from pathlib import Path

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))


def as_graph(workflow: dict, inputs_of: Callable[[str], dict]) -> dict:
    """Return the graph that the web page would post for a saved workflow.

    Args:
        workflow: As the page saves it.
        inputs_of: Returns a node type's inputs: ComfyUI's ``INPUT_TYPES()``.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for saved in workflow["nodes"]:
        if saved["type"] in ("MarkdownNote", "Note"):
            continue
        inputs = {
            socket["name"]: sources[socket["link"]]
            for socket in saved.get("inputs", ())
            if socket.get("link") is not None
        }
        values = list(saved.get("widgets_values") or ())
        for name in widgets(inputs_of(saved["type"])):
            inputs.setdefault(name, values.pop(0))
            if name in ("seed", "noise_seed"):
                assert values.pop(0) == "fixed", "the example would change from run to run"
        assert not values, f"{saved['type']} has no widgets for {values}"
        graph[str(saved["id"])] = {"class_type": saved["type"], "inputs": inputs}
    return graph


def widgets(inputs: dict) -> Iterator[str]:
    """Yield the inputs that a node shows as widgets, in its order."""
    for group in ("required", "optional"):
        for name, (kind, *details) in inputs.get(group, {}).items():
            socket = any(entry.get("forceInput") for entry in details)
            if (isinstance(kind, list) or kind in WIDGETS) and not socket:
                yield name
