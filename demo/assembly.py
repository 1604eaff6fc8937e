"""The folder of demo-flow, made in the user's cache of its own files and of those of the demo.

Whatever takes a model takes a diffusers folder, and the repository holds no file twice.
"""

import atexit
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ..shared.files.storage import cache_folder, replace_atomically
from ..shared.files.weights import ModelError

logger = logging.getLogger(__name__)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
"""Of the text encoder: the demo's weights, and the projection that Stable Diffusion 3 asks for."""


def complete(own: Path, demo: Path) -> Path:
    """Return a diffusers folder with everything that a flow model's pipeline reads.

    It is named for its content, and every file is compared before it is trusted: other weights make
    another folder, and what is missing or damaged is written again. Where nothing can be written it
    is a temporary folder of this process.

    Args:
        own: What `train_flow` wrote.
        demo: Diffusers folder of the demo; its text encoder and tokenizer are read twice.

    Raises:
        ModelError: A file of either is missing.
    """
    try:
        contents = {name: path.read_bytes() for name, path in sorted(_sources(own, demo).items())}
    except FileNotFoundError as error:
        raise ModelError(
            f"demo-flow is not whole: there is no {error.filename}. It comes with the repository: "
            "clone it whole, with its folder `demo`."
        ) from error
    total = hashlib.sha256()
    for name, content in contents.items():
        total.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    place = Path("models", total.hexdigest()[:32], "demo-flow")
    try:
        return _fill(cache_folder() / place, contents)
    except OSError as error:
        logger.warning("demo-flow is put together again next time: %s", error)
        return _fill(_temporary_folder() / place, contents)


def _sources(own: Path, demo: Path) -> dict[str, Path]:
    """Return by its name in the complete folder where each file comes from."""
    files = {
        path.relative_to(own).as_posix(): path
        for path in (own / "model_index.json", *own.glob("*/*"))
    }
    files |= {f"tokenizer/{path.name}": path for path in (demo / "tokenizer").iterdir()}
    files[f"text_encoder/{SHARDS[0]}"] = demo / "text_encoder" / "model.safetensors"
    weights = "vae/diffusion_pytorch_model.safetensors"
    files[weights] = demo / weights
    for name, path in list(files.items()):
        part, _, rest = name.partition("/")
        if part in ("text_encoder", "tokenizer"):
            files[f"{part}_2/{rest}"] = path
    return files


def _fill(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """Write the files of a folder that are missing or differ, each whole or not at all."""
    for name, content in contents.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            with replace_atomically(path) as part:
                part.write_bytes(content)
    return folder


@cache
def _temporary_folder() -> Path:
    """Return a folder that goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="unmemorize-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
