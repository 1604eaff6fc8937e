"""A real ComfyUI in a process of its own, for tests of the nodes.

Use the fixture `comfy` (every version) or mark a test with ``@newest`` (the newest alone):

    pytestmark = pytest.mark.comfy

    def test_something(comfy):
        graph = {"1": node("UnmemorizeLoadDemoModel"), ...}
        run = comfy.run(graph, keep={"image": ["7", 0]})      # a graph, as POST /prompt takes it
        assert run["image"].shape == (1, 128, 128, 3)
        assert comfy.call(inside, 3) == 4                     # a function, run inside ComfyUI

    def inside(number):                                        # a top-level function of the file
        import comfy.samplers
        return number + 1

The checkout is loaded as ComfyUI loads a custom node: by path, from a folder of another name.
"""

import importlib
import inspect
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from comfyui_trees import NEWEST, ROOT, tree

WORKER = Path(__file__).with_name("comfyui_worker.py")
NEEDED = ("aiohttp", "alembic", "av", "einops", "sentencepiece", "torchaudio", "torchsde")
PACK_FOLDER = "Unmemorize-main"  # a name that no import could spell
TIMEOUT = 300  # seconds that one request may take
newest = pytest.mark.parametrize("comfy", [NEWEST], indirect=True)


def node(class_type: str, **inputs: Any) -> dict:
    """Return a node of an API graph; a link is ``[node id, output index]``."""
    return {"class_type": class_type, "inputs": inputs}


def make_base(base: Path) -> Path:
    """Make ComfyUI's folders, with this checkout among the custom nodes, whose path is returned."""
    for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    pack = base / "custom_nodes" / PACK_FOLDER
    pack.symlink_to(ROOT, target_is_directory=True)
    return pack


def missing(version: str) -> str:
    """Return why this ComfyUI cannot be run here and what to type, empty when it can."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent or not (tree(version) / "main.py").is_file():
        what = f"packages {', '.join(absent)}" if absent else f"the tree of ComfyUI {version}"
        return f"{what} not there; type: make test-comfyui"
    return ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of a graph did."""

    kept: dict[str, Any]
    """Values of the outputs asked for by `keep`; tensors as numpy arrays."""
    ui: dict[str, dict]
    """By node id, what output nodes show."""
    ran: list[str]
    """Ids of the nodes that ran, in order; those found in the cache are absent."""
    events: list[tuple[str, Any]] = field(repr=False)
    """What was sent to the browser, in order: (kind, data)."""
    seconds: float
    interrupted: bool = False
    error: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.kept[name]


class ComfyUI:
    """A running ComfyUI; `base` holds its models, input, output, temp and user folders."""

    def __init__(self, version: str, base: Path):
        self.version, self.base = version, base
        self.pack = make_base(base)
        self.log = base / "log.txt"
        ours, theirs = socket.socketpair()
        with self.log.open("w") as log, theirs:
            self.process = subprocess.Popen(
                [sys.executable, WORKER, tree(version), base, self.pack, str(theirs.fileno())],
                stdout=log, stderr=subprocess.STDOUT, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self.line = Connection(ours.detach())
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def run(
        self,
        graph: Mapping[str, dict],
        *,
        keep: Mapping[str, list] | None = None,
        fresh: bool = False,
        check: bool = True,
        extra: dict | None = None,
    ) -> Run:
        """Run an API graph.

        Args:
            graph: Node id to `node(...)`, as ``POST /prompt`` takes it.
            keep: Name to link ``[node id, output index]``: values to bring back, of any type;
                objects that are no tensors, numbers, texts, lists or dicts come back as text.
            fresh: Forget what earlier runs left in ComfyUI's cache.
            check: Raise AssertionError when the graph is refused or a node fails; otherwise the
                message is in `Run.error`.
            extra: ComfyUI's extra_data, e.g. ``{"extra_pnginfo": {...}}``.
        """
        done = self._ask("run", dict(graph), dict(keep or {}), fresh, dict(extra or {}))
        assert not (check and done["error"]), done["error"]
        return Run(**{"kept": {}, "ui": {}, "ran": [], "events": []} | done)

    def call(self, function: Callable, *arguments: Any, **keywords: Any) -> Any:
        """Call a top-level function of a test file inside ComfyUI and return its result.

        The file is imported there, so what it imports at its top must exist there; ComfyUI's own
        modules and the pack (`pack()` below) are imported inside the function. Arguments and
        results: numbers, texts, lists, dicts, numpy arrays (tensors come back as these).
        """
        file = inspect.getsourcefile(function)
        return self._ask("call", file, function.__name__, arguments, keywords)

    def close(self) -> None:
        """End the process."""
        self.line.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask(self, method: str, *arguments: Any) -> Any:
        self.line.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self.line.poll(TIMEOUT):
                self.process.kill()
            kind, value = self.line.recv()
        except (EOFError, OSError) as error:
            tail = self.log.read_text("utf-8")[-4000:]
            raise RuntimeError(f"ComfyUI {self.version} has ended:\n{tail}") from error
        if kind == "error":
            raise AssertionError(f"inside ComfyUI {self.version}:\n{value}")
        return value


def pack(module: str) -> Any:
    """Return a module of the pack inside ComfyUI, by its dotted name: ``pack("nodes.watch")``."""
    name = next(name for name in sys.modules if name.endswith(PACK_FOLDER))
    return importlib.import_module(f"{name}.{module}")
