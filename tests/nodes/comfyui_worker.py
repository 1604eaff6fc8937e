"""Runs inside a process of its own: a real ComfyUI with this checkout as a custom node.

``python comfyui_worker.py TREE BASE PACK DESCRIPTOR`` answers what the test process asks through an
inherited socket; see `comfyui.ComfyUI` for what can be asked.
"""

import asyncio
import importlib.util
import inspect
import logging
import os
import re
import sys
import time
import traceback
import types
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEEP = "UnmemorizeTestKeep"


def start(tree: str, base: str, pack: str) -> "types.ModuleType":
    """Import ComfyUI, load its nodes and the pack, and return ComfyUI's `nodes`."""
    from cpu_torch import tolerate_cpu_torch

    tolerate_cpu_torch()
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    sys.path[0] = tree  # in place of this folder, whose modules are no business of ComfyUI's
    os.chdir(tree)
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.install_util  # noqa: F401  two of ComfyUI's files of nodes need it imported first

    sys.path.append(str(HERE))
    from nodes import init_builtin_extra_nodes, load_custom_node

    check_types(pack)

    async def load() -> bool:
        await init_builtin_extra_nodes()
        return await load_custom_node(pack, module_parent="custom_nodes")

    if not asyncio.run(load()):
        raise RuntimeError("ComfyUI did not load the pack; its log says why.")
    # What test files import at their top, for the other process; here the pack has another name.
    spec = importlib.util.spec_from_file_location("unmemorize", Path(pack) / "__init__.py")
    sys.modules["unmemorize"] = importlib.util.module_from_spec(spec)
    import nodes

    nodes.NODE_CLASS_MAPPINGS[KEEP] = Keep
    return nodes


def check_types(pack: str) -> None:
    """Check shapes and turn warnings into errors in the pack, as the other tests do."""
    from jaxtyping import install_import_hook

    name = pack.replace(".", "_x_")  # as ComfyUI names the module
    install_import_hook(name, "beartype.beartype")
    warnings.filterwarnings("error", module=re.escape(name))


class Keep:
    """Output node that keeps whatever is connected to it for the test."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"value": ("*", {}), "name": ("STRING", {"default": ""})}}
    )
    VALIDATE_INPUTS = classmethod(lambda cls, input_types: True)  # accepts every type of socket
    IS_CHANGED = classmethod(lambda cls, **inputs: float("nan"))  # is never cached
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "keep"
    CATEGORY = "test"
    values: dict[str, Any] = {}  # noqa: RUF012

    def keep(self, value: Any, name: str) -> tuple:
        """Remember a value."""
        self.values[name] = value
        return ()


class Server:
    """What the executor tells a web server."""

    client_id = "test"
    last_node_id = last_prompt_id = None
    sockets_metadata: dict = {}  # noqa: RUF012

    def __init__(self):
        self.events: list[tuple[str, Any]] = []

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        """Remember an event; images of previews are remembered as such."""
        self.events.append((str(event), data if isinstance(data, dict) else "preview"))

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        """Remember what a node told while it ran."""
        self.events.append(("progress_text", {"node": node_id, "text": text}))

    def queue_updated(self) -> None:
        """Nobody looks at the queue."""


class Worker:
    """Answers requests."""

    def __init__(self):
        import server

        self.server = Server()
        server.PromptServer.instance = self.server
        self.prompts = 0
        self.renew()

    def renew(self) -> None:
        """Make an executor with an empty cache."""
        import execution

        arguments = {}
        if "cache_args" in inspect.signature(execution.PromptExecutor.__init__).parameters:
            kind = execution.CacheType.CLASSIC
            sizes = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
            arguments = {"cache_type": kind, "cache_args": sizes}
        self.executor = execution.PromptExecutor(self.server, **arguments)

    def run(self, graph: dict, keep: dict, fresh: bool, extra: dict) -> dict:
        """Run an API graph; see `comfyui.ComfyUI.run`."""
        import execution

        if fresh:
            self.renew()
        graph = dict(graph)
        for name, link in keep.items():
            graph[f"keep {name}"] = {"class_type": KEEP, "inputs": {"value": link, "name": name}}
        self.prompts += 1
        self.server.events.clear()
        began = time.perf_counter()
        prompt_id = f"prompt{self.prompts}"
        valid, error, outputs, node_errors = asyncio.run(
            execution.validate_prompt(prompt_id, graph, None)
        )
        if not valid:
            return {"error": f"{error} {node_errors}", "seconds": 0.0}
        self.executor.execute(graph, prompt_id, {"client_id": "test"} | extra, outputs)
        faults = [d for kind, d in self.executor.status_messages if kind == "execution_error"]
        told = "; ".join(f"{d['exception_type']}: {d['exception_message']}" for d in faults)
        return {
            "kept": {name: plain(Keep.values.get(name)) for name in keep},
            "ui": plain(self.executor.history_result["outputs"]) if not faults else {},
            "ran": [
                d["node"] for kind, d in self.server.events
                if kind == "executing" and d.get("node") and not d["node"].startswith("keep ")
            ],
            "events": [(kind, plain(data)) for kind, data in self.server.events],
            "error": told,
            "interrupted": any(k == "execution_interrupted" for k, _ in
                               self.executor.status_messages),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip

    def call(self, file: str, function: str, arguments: tuple, keywords: dict) -> Any:
        """Call a function of a test file here."""
        module = self.modules.get(file)
        if module is None:
            spec = importlib.util.spec_from_file_location(f"inside_{Path(file).stem}", file)
            self.modules[file] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return plain(getattr(module, function)(*arguments, **keywords))

    modules: dict[str, types.ModuleType] = {}  # noqa: RUF012


def plain(value: Any) -> Any:
    """Return `value` with tensors as arrays and foreign objects as text, fit for sending."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else repr(value)
    if value is None or isinstance(value, bool | int | float | str | bytes | np.ndarray):
        return value
    return repr(value)


def serve(connection: Connection) -> None:
    """Answer requests until the other side hangs up."""
    worker = Worker()
    connection.send(("ok", None))
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("ok", getattr(worker, method)(*arguments))
        except BaseException:
            answer = ("error", traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    *places, descriptor = sys.argv[1:]
    start(*places)
    with Connection(int(descriptor)) as line:
        serve(line)
