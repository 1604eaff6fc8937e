"""The rooms import only what they may: shown by reading every import, and by importing."""

import ast
import sys
from pathlib import Path

import pytest

ROOMS = ("audit", "cli", "demo", "nodes", "shared", "trainer_patch")
HOSTS = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
TRAINERS = {"kohya_ss", "library", "lycoris", "networks", "toolkit", "train_network"}
HEAVY = {
    "accelerate", "diffusers", "faiss", "jinja2", "matplotlib", "onnxruntime", "pandas", "peft",
    "PIL", "pyarrow", "scipy", "sklearn", "transformers",
}  # fmt: skip
BASE = ["numpy", "safetensors.torch", "torch", "tqdm.auto"]

MAY_IMPORT = {  # room: the other rooms, and the outsiders that stay forbidden even in functions
    "shared": (set(), HOSTS | TRAINERS),
    "nodes": ({"shared"}, TRAINERS),
    "trainer_patch": ({"shared"}, HOSTS),
    "demo": ({"shared"}, HOSTS | TRAINERS),
    "audit": ({"shared", "demo"}, HOSTS | TRAINERS),
    "cli": ({"shared", "demo", "audit"}, HOSTS | TRAINERS),
}
MAY_IMPORT_INSIDE = {  # folder: the folders of the same room; every other folder imports freely
    "shared/score": {"shared", "shared/files", "shared/score"},
    "shared/mitigation": {
        "shared", "shared/files", "shared/score", "shared/words", "shared/mitigation",
    },
    "audit/common": {"audit/common"},
    "audit/concept": {"audit/common", "audit/concept"},
    "audit/model": {"audit/common", "audit/model"},
    "audit/lora": {"audit/common", "audit/lora"},
    "nodes/engine": {"nodes/engine"},
}  # fmt: skip
TRAINER_FOLDERS = ("ai_toolkit", "diffusers", "kohya", "onetrainer")


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


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the product by its name inside the package."""
    paths = [*root.glob("*.py"), *(path for room in ROOMS for path in files(root, room))]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


def imported_modules(root: Path) -> dict[str, set[str]]:
    """Return, for every module of the product, those that it imports, inside functions too."""
    named = modules(root)
    found = {}
    for name, path in named.items():
        names = imports_of(path.read_text("utf-8"), package_of(root, path))
        # A bare `nodes` is ComfyUI's.
        inside = {o.removeprefix("unmemorize.") for o in names if o.startswith("unmemorize.")}
        # `from .a import b` names a module a.b where there is one, else a name in the module a.
        parents = {other.rpartition(".")[0] for other in inside if other in named}
        found[name] = {other for other in inside & named.keys() if other not in parents} - {name}
    return found


def folder_of(root: Path, path: Path) -> str:
    return path.parent.relative_to(root).as_posix()


def imported_folders(root: Path) -> dict[str, set[str]]:
    """Return, for every folder of the product, those whose modules its own modules import."""
    named, found = modules(root), {}
    for name, others in imported_modules(root).items():
        folder = folder_of(root, named[name])
        found.setdefault(folder, set()).update(folder_of(root, named[other]) for other in others)
        found[folder].discard(folder)
    return found


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Return the names that lead back to themselves."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for other in imports.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    return sorted(name for name in imports if name in reached(name))


def test_no_modules_import_each_other_in_a_circle(root):
    assert not circles(imported_modules(root))


def test_no_folders_import_each_other_in_a_circle(root):
    assert not circles(imported_folders(root))


def test_the_check_of_circles_can_fail():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert not circles({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize("folder", MAY_IMPORT_INSIDE)
def test_folders_import_only_what_they_may(root, folder):
    room = folder.partition("/")[0]
    others = {other for other in imported_folders(root)[folder] if other.startswith(room)}
    assert others <= MAY_IMPORT_INSIDE[folder]


def of_trainer(name: str) -> str:
    """Return the trainer whose folder a module lies in; empty for one that serves all."""
    room, *below = name.split(".")
    own = room == "trainer_patch" and below and below[0] in TRAINER_FOLDERS
    return below[0] if own else ""


def test_the_files_of_a_trainer_serve_that_trainer_alone(root):
    crossings = {
        (name, other)
        for name, others in imported_modules(root).items()
        for other in others
        # The root names what is public, for type checkers alone: `protect` is a trainer's.
        if name != "__init__" and of_trainer(other) not in ("", of_trainer(name))
    }
    assert not crossings
    assert {of_trainer(name) for name in modules(root)} == {"", *TRAINER_FOLDERS}


def test_what_belongs_to_a_trainer_is_told_by_its_folder():
    assert of_trainer("trainer_patch.kohya.text") == of_trainer("trainer_patch.kohya") == "kohya"
    assert of_trainer("trainer_patch.options") == of_trainer("shared.diffusers") == ""


def test_the_root_holds_the_doors_and_nothing_else(root):
    names = {path.name for path in root.glob("*.py")}
    assert names == {"__init__.py", "__main__.py", "install.py"}


def test_few_modules_lie_flat_in_shared(root):
    assert len([path for path in (root / "shared").glob("*.py") if path.stem != "__init__"]) <= 4


def test_imports_inside_the_repository_are_relative(root):
    absolute = {
        f"{path.relative_to(root)}:{node.lineno}"
        for path in modules(root).values()
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
    assert "unmemorize.shared.score.denoiser" in loaded
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
