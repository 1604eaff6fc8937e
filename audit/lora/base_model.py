"""The base model of an audit, seen from outside: what a LoRA's header can be compared with."""

import hashlib
import json
import re
from pathlib import Path

from ...shared.files.weights import ModelError, read_header

ARCHITECTURES = (
    ("SDXL", r"stable-?diffusion-?xl|sdxl"),
    ("SD 3", r"stable-?diffusion-?(v-?)?3|sd3"),
    ("Flux", r"flux"),
    ("SD 2", r"stable-?diffusion-?v?-?2|sd_v2"),
    ("SD 1", r"stable-?diffusion-?v?-?1|sd_v1"),
)
"""Names, and how modelspec, kohya's scripts and diffusers' classes write them."""
KEYS = {
    "SDXL": "conditioner.embedders.1.", "SD 2": "cond_stage_model.model.",
    "SD 1": "cond_stage_model.transformer.", "SD 3": "model.diffusion_model.joint_blocks.",
    "Flux": "model.diffusion_model.double_blocks.",
}  # fmt: skip
"""What the keys of a single file begin with."""
SD_WIDTHS = {768: "SD 1", 1024: "SD 2"}
"""Of the text's embeddings, where the pipeline's class is the same."""
OLD_HASH = (0x100000, 0x10000)
"""Start and length of what the short hash of web user interfaces is taken of."""


def named_architecture(text: str | None) -> str | None:
    """Return the architecture a header names, None where the name is not known."""
    for name, pattern in ARCHITECTURES:
        if text and re.match(pattern, text.casefold()):
            return name
    return None


class BaseModel:
    """A diffusers folder or a single file; of anything else only the name is known."""

    def __init__(self, location: str | Path):
        path = Path(location).expanduser()
        self.name = path.name or str(location)
        if path.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/...
            self.name = path.parent.parent.name.rpartition("--")[2]
        self._file = path if path.is_file() else None
        self.text_width: int | None = None
        """Of the embeddings that its network reads."""
        self.architecture: str | None = None
        if self._file:
            self._read_file(self._file)
        elif path.is_dir():
            self._read_folder(path)

    def sha256(self) -> str | None:
        """Return the sha256 of a single file; reads all of it."""
        if self._file is None:
            return None
        total = hashlib.sha256()
        with self._file.open("rb") as file:
            while chunk := file.read(2**20):
                total.update(chunk)
        return total.hexdigest()

    def old_hash(self) -> str | None:
        """Return the short hash of a single file, 8 hexadecimal digits."""
        if self._file is None:
            return None
        start, length = OLD_HASH
        with self._file.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(length)).hexdigest()[:8]

    def _read_file(self, path: Path) -> None:
        try:
            header = read_header(path)
        except ModelError:
            return  # told when it is loaded
        self.architecture = next(
            (name for name, start in KEYS.items() if any(key.startswith(start) for key in header)),
            None,
        )
        widths = (shape for key, (_, shape) in header.items() if key.endswith("attn2.to_k.weight"))
        self.text_width = next((shape[1] for shape in widths if len(shape) == 2), None)

    def _read_folder(self, path: Path) -> None:
        index = _read_json(path / "model_index.json")
        width = _read_json(path / "unet" / "config.json").get("cross_attention_dim")
        self.text_width = width if isinstance(width, int) else None
        self.architecture = named_architecture(str(index.get("_class_name", "")))
        if index.get("_class_name") == "StableDiffusionPipeline":
            self.architecture = SD_WIDTHS.get(self.text_width or 0)


def _read_json(path: Path) -> dict:
    """Return a JSON file that holds a mapping, or nothing."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
