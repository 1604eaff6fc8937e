"""The command line in processes that cost their work alone: forked where everything is imported.

They are processes like any other: signals stop them, and they leave an exit code behind.
"""

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

MODULES = (
    "diffusers.loaders.peft", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "jinja2", "networkx", "PIL.Image", "scipy.stats", "transformers.models.clip.modeling_clip",
    "unmemorize.audit.model.run", "unmemorize.cli", "unmemorize.shared.models.load",
)  # fmt: skip
"""What takes an audit most of the time to import."""


def fork_server(package: str, patch: pytest.MonkeyPatch) -> ForkServerContext:
    """Return what forks processes that find the checkout in the folder `package`.

    Until `patch` is undone, both the server and this process find it there.
    """
    patch.setenv("PYTHONPATH", os.pathsep.join([package, str(Path(__file__).parent)]))
    patch.syspath_prepend(package)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *MODULES])
    return context


class Forked:
    """A process of `unmemorize *words`, as `subprocess.Popen` would start it."""

    def __init__(self, context: ForkServerContext, words: list[str], folder: Path):
        self.files = folder / "stdout", folder / "stderr"
        self.process = context.Process(target=_run, args=(words, *map(str, self.files)))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what was written to stdout and stderr."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "still running"
        out, err = (path.read_text("utf-8") for path in self.files)
        return out, err


def _run(words: list[str], *files: str) -> None:
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = ["unmemorize", *words]
    from unmemorize.cli import main

    main()
