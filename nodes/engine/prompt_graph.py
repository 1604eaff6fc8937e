"""What stands upstream of a node in the graph that ComfyUI runs."""

from collections import deque
from typing import Any

from comfy_execution.graph_utils import is_link

import nodes


def source_of(dynprompt: Any, node_id: str, name: str, kind: str) -> list | None:
    """Return the link of the nearest output of a type that an input was made from.

    Args:
        dynprompt: The hidden input of this name.
        node_id: A node.
        name: One of its inputs.
        kind: Type of socket, e.g. "CLIP".

    Returns:
        [node id, output index], or None where no such output leads there.
    """
    link = dynprompt.get_node(node_id)["inputs"].get(name)
    waiting, seen = deque([link] if is_link(link) else []), set()
    while waiting:
        source = waiting.popleft()
        own = dynprompt.get_node(source[0])
        types = nodes.NODE_CLASS_MAPPINGS[own["class_type"]].RETURN_TYPES
        if source[1] < len(types) and types[source[1]] == kind:
            return source
        if source[0] not in seen:
            seen.add(source[0])
            waiting += [value for value in own["inputs"].values() if is_link(value)]
    return None
