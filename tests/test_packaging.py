"""Wheel, editable install and plain clone carry the same package, in a folder of any name."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from unmemorize.cli.doctor import DISTRIBUTIONS
from unmemorize.shared import dependencies

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

NOT_COPIED = (".git", ".venv*", ".*_cache", ".cache", ".hypothesis", "__pycache__", "build",
              "dist", "*.egg-info", ".*.part")  # fmt: skip
DATA = {
    "audit": ("common/templates", "*/*.schema.json"),
    "demo": ("README.md", "flow", "images", "model"),
    "locales": ("*/*.json",),
    "shared": ("score/controls", "training/concept/templates.txt"),
}
ROOMS = ("audit", "cli", "demo", "nodes", "shared", "trainer_patch")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


@pytest.fixture(scope="module")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory) -> Path:
    """A copy of the tree under a name that is no Python identifier; builds may litter it."""
    target = tmp_path_factory.mktemp("any name") / "ComfyUI-Un.memorize main"
    shutil.copytree(root, target, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return target


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", str(folder), str(clone)])
    return next(folder.glob("unmemorize-*.whl"))


def run(command: list[str], **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def data_files(root: Path) -> set[str]:
    """Return what the package reads besides its code, relative to the root, as in a wheel."""
    found = set()
    for room, patterns in DATA.items():
        for pattern in patterns:
            paths = [p for top in (root / room).glob(pattern) for p in [top, *top.rglob("*")]]
            names = {p.relative_to(root).as_posix() for p in paths if p.is_file()}
            assert names, f"{room}/{pattern} is empty"
            found |= names
    return found


def code_files(root: Path, packages: list[str]) -> set[str]:
    folders = [root.joinpath(*package.split(".")[1:]) for package in packages]
    return {p.relative_to(root).as_posix() for folder in folders for p in folder.glob("*.py")}


def test_every_room_is_packaged(root, project):
    rooms = {p.parent.relative_to(root) for p in root.rglob("__init__.py")}
    rooms = {room for room in rooms if not {"tests", "build"} & set(room.parts)}
    rooms = {room for room in rooms if not any(part.startswith(".") for part in room.parts)}
    expected = {".".join(["unmemorize", *room.parts]) for room in rooms}
    assert set(project["tool"]["setuptools"]["packages"]) == expected


def test_wheel_holds_code_and_data_and_nothing_else(clone, project, wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packaged = {name.removeprefix("unmemorize/") for name in names if ".dist-info/" not in name}
    packages = project["tool"]["setuptools"]["packages"]
    assert packaged == code_files(clone, packages) | data_files(clone)
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if ".dist-info/" in name}


def make_venv(folder: Path) -> Path:
    """Return the Python of a new environment that also sees the packages of the running one.

    `system_site_packages` would show those of the Python below a running environment.
    """
    venv.create(folder, with_pip=False)
    bin_dir = "Scripts" if sys.platform == "win32" else "bin"
    python = folder / bin_dir / Path(sys.executable).name
    site = run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    ).strip()
    running = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    Path(site.strip(), "running.pth").write_text("\n".join(sorted(running)), encoding="utf-8")
    return python


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_package_runs(kind, clone, wheel, tmp_path):
    python = make_venv(tmp_path / "venv")
    what = [str(wheel)] if kind == "wheel" else ["--editable", str(clone)]
    pip = [*PIP, "--python", str(python), "install", "--ignore-installed", *OFFLINE, *what]
    run(pip, cwd=tmp_path)
    where = run([str(python), "-c", "import unmemorize; print(unmemorize.__file__)"], cwd=tmp_path)
    home = clone if kind == "editable" else tmp_path / "venv"
    assert Path(where.strip()).resolve().is_relative_to(home.resolve())
    for command in ([str(python), "-m", "unmemorize"], [str(python.with_name("unmemorize"))]):
        assert "audit" in run([*command, "--help"], cwd=tmp_path)


def test_tests_pass_in_a_clone_of_any_name(clone):
    """Also without an installed copy: the clone's tests must find the clone."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_borders.py",
    ]
    out = run([*command, "-k", "only_what_they_may or imports_nothing"], cwd=clone)
    assert "14 passed" in out


def test_extras_named_in_messages_exist(root, project):
    extras = project["project"]["optional-dependencies"]
    named = set()
    for path in root.rglob("*.py"):
        folder = path.relative_to(root).parts[0]
        if folder in ("tests", "build") or folder.startswith("."):  # environments
            continue
        source = path.read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.keyword) and node.arg == "extra":
                named |= {node.value.value} if isinstance(node.value, ast.Constant) else set()
    assert named
    assert named | set(dependencies.EXTRAS) <= set(extras)
    modules = {m for _, brought in dependencies.EXTRAS.values() for m in brought}
    assert {dependencies.extra_of(module) for module in modules} == set(dependencies.EXTRAS)
    for extra, (_, brought) in dependencies.EXTRAS.items():
        packages = {re.split(r"[^\w-]", line)[0] for line in extras[extra]}
        names = {DISTRIBUTIONS.get(module, module) for module in brought}
        assert names == packages - {dependencies.SSCD_PACKAGE}, extra


def test_the_clone_is_found_by_what_pip_noted(tmp_path, monkeypatch):
    clone = tmp_path / "my clone"
    clone.mkdir()
    noted = SimpleNamespace(read_text=lambda _: json.dumps({"url": clone.as_uri()}))
    monkeypatch.setattr(dependencies, "__file__", str(tmp_path / "lib/unmemorize/shared/d.py"))
    monkeypatch.setattr(dependencies, "distribution", lambda _: noted)
    assert dependencies.install_line("all") == f'pip install "{clone}[all]"'
    clone.rmdir()
    assert dependencies.install_line("all") == 'pip install "path/to/unmemorize[all]"'


@pytest.mark.parametrize("extra", [*dependencies.EXTRAS, "all"])
def test_what_messages_say_to_type_is_what_pip_takes(extra, root, project):
    command, *words = shlex.split(dependencies.install_line(extra))
    assert command == "pip"
    # Or pip would put a copy beside the clone that runs.
    assert words == ["install", "--editable", f"{root}[{extra}]"]
    assert extra in project["project"]["optional-dependencies"]
    run([*PIP, words[0], "--dry-run", *OFFLINE, str(root)])


def test_nobody_is_sent_to_a_registry_that_lacks_the_package(root):
    pages = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "web").rglob("*.md")]
    sources = (p for p in root.rglob("*.py") if p.relative_to(root).parts[0] in ROOMS)
    wrong = re.compile(r"pip install [^\n`]*?(?<![\w./\\-])\"?unmemorize\b")
    assert not [str(p) for p in (*pages, *sources) if wrong.search(p.read_text("utf-8"))]
    assert wrong.search('pip install "unmemorize[models]"')
    assert wrong.search("pip install unmemorize")
    assert not wrong.search('pip install "path/to/unmemorize[models]"')


def test_one_ruff_everywhere(root, project):
    pinned = project["project"]["optional-dependencies"]["lint"]
    assert all("==" in each for each in pinned)
    hooks = (root / ".pre-commit-config.yaml").read_text("utf-8")
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {each for each in pinned if "ruff" in each}


def test_install_script_says_what_is_missing(root, run_python):
    done = run_python(str(root / "install.py"))
    assert "nothing to install" in done.stdout
    blind = (
        "import importlib.util as u, runpy, sys; find = u.find_spec;"
        "u.find_spec = lambda name: None if name == 'torch' else find(name);"
        f"runpy.run_path({str(root / 'install.py')!r}, run_name='__main__')"
    )
    done = run_python("-c", blind, check=False)
    assert done.returncode == 1
    assert "pip install torch" in done.stderr
