"""What ComfyUI's registry and ComfyUI-Manager ask of a pack."""

import ast
import re
import struct
import sys
from hashlib import sha256
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"subprocess", "socket", "urllib", "requests", "httpx", "pip", "ctypes"}


@pytest.fixture(scope="module")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def test_names_and_versions_are_as_the_registry_wants_them(root, project):
    name, comfy = project["project"]["name"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", name)
    assert len(name) < 100
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert "Operating System :: OS Independent" in project["project"]["classifiers"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    sources = (root / "tests" / "nodes" / "comfyui_trees.py").read_text("utf-8")
    oldest = re.search(r'SOURCES = \{.*?"([\d.]+)": Source', sources, re.DOTALL)[1]
    assert comfy["requires-comfyui"] == f">={oldest}"


def size_of(png: Path) -> tuple[int, int]:
    """Return width and height, which stand at a fixed place in a PNG."""
    head = png.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


def test_icon_and_banner_have_the_sizes_asked_for(root, project):
    icon, banner = root / "docs" / "icon.png", root / "docs" / "banner.png"
    assert size_of(icon) == (400, 400)  # at most
    width, height = size_of(banner)
    assert 9 * width == 21 * height
    assert icon.stat().st_size + banner.stat().st_size < 100_000


def test_nothing_is_left_out_that_the_pack_needs(root):
    lines = (root / ".comfyignore").read_text("utf-8").splitlines()
    left_out = {line.strip("/") for line in lines if not line.startswith("#")}
    assert all((root / name).exists() for name in left_out)
    needed = {"__init__.py", "install.py", "nodes", "shared", "demo", "web", "locales", "docs",
              "example_workflows", "subgraphs", "LICENSE", "NOTICE", "README.md",
              "pyproject.toml"}  # fmt: skip
    assert not left_out & needed
    assert "tests" in left_out
    packed = [path for name in needed for path in (root / name, *(root / name).rglob("*"))]
    files = {path for path in packed if path.is_file() and path.suffix != ".pyc"}
    assert sum(path.stat().st_size for path in files) < 25_000_000
    large = [path for path in files if path.stat().st_size > 1_000_000]
    assert len({sha256(path.read_bytes()).digest() for path in large}) == len(large)  # no copies


def test_the_manager_installs_no_package(root):
    """It installs what requirements.txt lists, with pip; ComfyUI's own packages are enough."""
    assert not (root / "requirements.txt").exists()


def faults(source: str) -> set[str]:
    """Return what the registry forbids, or what would reach for the network or other programs."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            found |= {name} & FORBIDDEN_CALLS
            if ast.unparse(node.func) in ("os.system", "os.popen", "torch.load"):
                found.add(ast.unparse(node.func))
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module.split(".")[0]} & FORBIDDEN_MODULES
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    ends = {(node.end_lineno, node.end_col_offset) for node in statements}
    lines = source.encode().splitlines()
    if any(lines[line - 1][column:].lstrip().startswith(b";") for line, column in ends):
        found.add(";")
    return found


def test_the_nodes_do_nothing_that_is_forbidden(root):
    """Of the rest, only what the nodes call runs inside ComfyUI: the core, and no downloads."""
    paths = [root / "__init__.py", root / "install.py", *(root / "nodes").rglob("*.py")]
    paths += (root / "shared").rglob("*.py")
    found = {path.relative_to(root).as_posix(): faults(path.read_text("utf-8")) for path in paths}
    assert {name: fault for name, fault in found.items() if fault} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("eval(text)", {"eval"}),
        ("import subprocess", {"subprocess"}),
        ("from urllib.request import urlopen", {"urllib"}),
        ("os.system(command)", {"os.system"}),
        ("x = 1; y = 2", {";"}),
        ("model.eval()\ntext = 'a; b'", set()),
    ],
)
def test_the_check_can_fail(source, expected):
    assert faults(source) == expected
