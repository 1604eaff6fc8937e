"""The rooms import only what they may: shown by reading every import, and by importing."""

import ast
import sys
from pathlib import Path

import pytest

ROOMS = ("audit", "demo", "nodes", "shared", "trainer_patch")
HOSTS = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
TRAINERS = {"kohya_ss", "library", "lycoris", "networks", "toolkit", "train_network"}
HEAVY = {
    "accelerate", "diffusers", "faiss", "jinja2", "matplotlib", "onnxruntime", "pandas", "peft",
    "PIL", "pyarrow", "scipy", "sklearn", "transformers",
}  # fmt: skip
PATCHED = ("ai_toolkit", "diffusers", "kohya", "onetrainer")
"""Trainers, by which the files of `trainer_patch` are named; those without serve all."""
BASE = ["numpy", "safetensors.torch", "torch", "tqdm.auto"]

MAY_IMPORT = {  # room: the other rooms, and the outsiders that stay forbidden even in functions
    "shared": (set(), HOSTS | TRAINERS),
    "nodes": ({"shared"}, TRAINERS),
    "trainer_patch": ({"shared"}, HOSTS),
    "audit": ({"shared", "demo"}, HOSTS | TRAINERS),
    "demo": ({"shared", "audit"}, HOSTS | TRAINERS),
}


def imports_of(source: str, package: str) -> set[str]:
    """Return the absolute names a file of `package` imports, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def violations(source: str, room: str, package: str) -> set[str]:
    """Return the imports that cross a border of `room`."""
    rooms, outsiders = MAY_IMPORT[room]
    found = set()
    for name in imports_of(source, package):
        top, *below = name.split(".")
        inside = top == "unmemorize" and below
        if (inside and below[0] not in rooms | {room}) or (top in outsiders):
            found.add(name)
    return found


def files(root: Path, room: str) -> list[Path]:
    found = sorted((root / room).rglob("*.py"))
    assert found, f"the room {room} is empty"
    return found


def package_of(root: Path, path: Path) -> str:
    return ".".join(["unmemorize", *path.parent.relative_to(root).parts])


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(root, room):
    found = {
        str(path.relative_to(root)): names
        for path in files(root, room)
        if (names := violations(path.read_text("utf-8"), room, package_of(root, path)))
    }
    assert not found


def of_trainer(name: str) -> str:
    """Return the trainer that a module of `trainer_patch` is for; empty for one that serves all."""
    module = name.removeprefix("unmemorize.trainer_patch.").partition(".")[0]
    return next((trainer for trainer in PATCHED if module.startswith(trainer)), "")


def other_trainers(source: str, own: str) -> set[str]:
    """Return the imports of a file of `trainer_patch` that belong to another trainer's files."""
    names = imports_of(source, "unmemorize.trainer_patch")
    inside = {name for name in names if name.startswith("unmemorize.trainer_patch.")}
    return {name for name in inside if of_trainer(name) not in ("", own)}


def test_the_files_of_a_trainer_serve_that_trainer_alone(root):
    found = {}
    for path in files(root, "trainer_patch"):
        own = of_trainer(path.stem)
        if names := other_trainers(path.read_text("utf-8"), own):
            found[path.name] = names
    assert not found
    assert {of_trainer(path.stem) for path in files(root, "trainer_patch")} == {"", *PATCHED}


def test_the_check_of_trainers_can_fail():
    source = "from .diffusers_text import text_path\nfrom .options import NAMES\nimport diffusers"
    found = {"unmemorize.trainer_patch.diffusers_text",
             "unmemorize.trainer_patch.diffusers_text.text_path"}  # fmt: skip
    assert other_trainers(source, "kohya") == other_trainers(source, "") == found
    assert not other_trainers(source, "diffusers")


def test_imports_inside_the_repository_are_relative(root):
    paths = [*root.glob("*.py"), *(path for room in ROOMS for path in files(root, room))]
    absolute = {
        f"{path.relative_to(root)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        if name.split(".")[0] == "unmemorize"
    }  # fmt: skip
    assert not absolute


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..audit import run", {"unmemorize.audit", "unmemorize.audit.run"}),
        ("from .. import audit", {"unmemorize.audit"}),
        ("def f():\n    from ..audit.run import x",
         {"unmemorize.audit.run", "unmemorize.audit.run.x"}),
        ("import unmemorize.trainer_patch as t", {"unmemorize.trainer_patch"}),
        ("import library.train_util", {"library.train_util"}),
        ("import comfy.sd\nfrom ..shared import audit\nfrom .library import x", set()),
    ],
)  # fmt: skip
def test_the_reading_check_can_fail(source, expected):
    assert violations(source, "nodes", "unmemorize.nodes") == expected


@pytest.fixture(scope="module")
def base(loaded_after):
    """Top-level names that the base dependencies load by themselves."""
    return tops(loaded_after("import " + ", ".join(BASE)))


def tops(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def import_all(root: Path, room: str) -> str:
    names = [
        f"{package_of(root, path)}.{path.stem}".removesuffix(".__init__")
        for path in files(root, room)
        if path.stem != "__main__"
    ]
    # Users have no jaxtyping: what it would load must not hide here, nor be needed.
    return "import sys; sys.modules['jaxtyping'] = None\nimport " + ", ".join(names)


def test_shared_needs_nothing_but_the_base_packages(root, base, loaded_after):
    loaded = loaded_after(import_all(root, "shared"))
    assert "unmemorize.shared.denoiser" in loaded
    assert not {name for name in loaded if name.startswith("unmemorize.") and ".shared" not in name}
    extra = tops(loaded) - base - set(sys.stdlib_module_names) - {"unmemorize", "jaxtyping"}
    assert not extra


def test_the_command_line_loads_heavy_packages_only_when_used(base, loaded_after):
    loaded = loaded_after("import unmemorize.cli")
    assert "unmemorize.cli" in loaded
    assert not tops(loaded) & HEAVY - base


def test_the_entry_point_imports_nothing(loaded_after):
    before = loaded_after("import importlib.util")
    after = loaded_after("import unmemorize; unmemorize.comfy_entrypoint")
    assert {name for name in after - before if not name.startswith("_")} == {"unmemorize"}


def test_the_loading_check_can_fail(base, loaded_after):
    assert "json.tool" in loaded_after("import json.tool")
    assert "PIL" in tops(loaded_after("import PIL")) - base
