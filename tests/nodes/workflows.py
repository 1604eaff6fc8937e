"""Saved workflows of the web page, as the graphs that it posts."""

from collections.abc import Callable, Iterator
from pathlib import Path

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))


INPUT = -10
"""Id of the node that stands for a subgraph's inputs, inside of it."""


def as_graph(workflow: dict, inputs_of: Callable[[str], dict]) -> dict:
    """Return the graph that the web page would post for a saved workflow.

    Args:
        workflow: As the page saves it; subgraphs hold no further ones.
        inputs_of: Returns a node type's inputs: ComfyUI's ``INPUT_TYPES()``.
    """
    subgraphs = {one["id"]: one for one in workflow.get("definitions", {}).get("subgraphs", ())}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    graph = {}

    def add(nodes: list[dict], links: dict, prefix: str, given: list) -> None:
        """Add nodes; `given` is what comes in at a subgraph's inputs."""
        types = {saved["id"]: saved["type"] for saved in nodes}

        def source(link: int) -> object:
            origin, slot = links[link]
            if origin == INPUT:
                return given[slot]
            name = f"{prefix}{origin}"
            if inside := subgraphs.get(types[origin]):
                (came,) = inside["outputs"][slot]["linkIds"]
                origin, slot = _links(inside)[came]
                name = f"{name}:{origin}"
            return [name, slot]

        for saved in nodes:
            if saved["type"] in ("MarkdownNote", "Note"):
                continue
            values = list(saved.get("widgets_values") or ())
            linked = {
                socket["name"]: source(socket["link"])
                for socket in saved.get("inputs", ())
                if socket.get("link") is not None
            }
            if inside := subgraphs.get(saved["type"]):
                sockets = [(one["name"], "widget" in one) for one in saved["inputs"]]
                assert [name for name, _ in sockets] == [one["name"] for one in inside["inputs"]]
                come = [
                    values.pop(0) if widget and name not in linked else linked.get(name)
                    for name, widget in sockets
                ]
                add(inside["nodes"], _links(inside), f"{prefix}{saved['id']}:", come)
            else:
                inputs = {name: value for name, value in linked.items() if value is not None}
                for name in widgets(inputs_of(saved["type"])):
                    inputs.setdefault(name, values.pop(0))
                    if name in ("seed", "noise_seed"):
                        assert values.pop(0) == "fixed", "the example would change with each run"
                graph[f"{prefix}{saved['id']}"] = {"class_type": saved["type"], "inputs": inputs}
            assert not values, f"{saved['type']} has no widgets for {values}"

    add(workflow["nodes"], links, "", [])
    return graph


def _links(subgraph: dict) -> dict[int, tuple[int, int]]:
    return {link["id"]: (link["origin_id"], link["origin_slot"]) for link in subgraph["links"]}


def widgets(inputs: dict) -> Iterator[str]:
    """Yield the inputs that a node shows as widgets, in its order."""
    for group in ("required", "optional"):
        for name, (kind, *details) in inputs.get(group, {}).items():
            socket = any(entry.get("forceInput") for entry in details)
            if (isinstance(kind, list) or kind in WIDGETS) and not socket:
                yield name
