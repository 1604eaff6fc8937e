"""One process of real ComfyUI per version and test module."""

import pytest
from comfyui import ComfyUI, make_base, missing
from comfyui_server import Server
from comfyui_trees import NEWEST, VERSIONS, tree
from cpu_torch import tolerate_cpu_torch

tolerate_cpu_torch()


@pytest.fixture(scope="module", params=VERSIONS)
def comfy(request, tmp_path_factory):
    """A ComfyUI with this checkout as a custom node; skips where it cannot be run."""
    if reason := missing(request.param):
        pytest.skip(reason)
    running = ComfyUI(request.param, tmp_path_factory.mktemp("comfyui"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The newest ComfyUI's web server with this checkout as a custom node."""
    if reason := missing(NEWEST):
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("server")
    make_base(base)
    running = Server(tree(NEWEST), base)
    yield running
    running.close()
