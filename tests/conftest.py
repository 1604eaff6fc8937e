"""Loads the checkout as `unmemorize`, whatever its folder is called."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need_package, skip_unless_ci

ROOT = Path(__file__).resolve().parent.parent

if "unmemorize" not in sys.modules:
    spec = importlib.util.spec_from_file_location("unmemorize", ROOT / "__init__.py")
    sys.modules["unmemorize"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

ALIAS = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location("unmemorize", {path!r})
sys.modules["unmemorize"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout under test."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory):
    """Keeps what tests cache out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMEMORIZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def package_env(tmp_path_factory, cache_of_tests) -> dict[str, str]:
    """Environment in which other processes import the checkout as `unmemorize`.

    Also `python -m unmemorize`; an installed copy is shadowed.
    """
    folder = tmp_path_factory.mktemp("path")
    (folder / "unmemorize").mkdir()
    alias = ALIAS.format(path=str(ROOT / "__init__.py"))
    (folder / "unmemorize" / "__init__.py").write_text(alias, encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder), "PYTHONUTF8": "1"}


@pytest.fixture(scope="session")
def run_python(package_env):
    """Function that runs `python *arguments` on the checkout and returns the finished process."""

    def run(
        *arguments: str, check: bool = True, env: dict[str, str] | None = None, **kwargs
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=package_env | (env or {}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            **kwargs,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def loaded_after(run_python):
    """Function that returns the names of all modules a fresh Python holds after running code."""

    def loaded(code: str) -> set[str]:
        done = run_python("-c", f"{code}\nimport sys; print('\\n', *sys.modules)")
        return set(done.stdout.splitlines()[-1].split())

    return loaded


@pytest.fixture(scope="session")
def chromium():
    """A real browser without a window."""
    playwright = need_package("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        reason = "needs Chromium: apt-get install chromium"
        if os.environ.get("NO_CHROMIUM"):  # .ci/run could not install it
            pytest.skip(reason)
        skip_unless_ci(reason)
    # In a container the browser is root, and its sandbox refuses that.
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()
