"""The file of a calibration: JSON with a digest, and the bases beside it as safetensors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ..arrays import Tensor
from ..files.schema import Count, Reader, Share, digest_of
from ..files.storage import replace_atomically
from .collapse import SecondStage
from .config import CLIP_PARTS

SCHEMA_VERSION = 7
AGAIN = "Make a new one with `unmemorize calibrate`."
DIGEST = "digest"
"""The field that holds the sha256 of all others."""
BESIDE = ("residual", "observed", *CLIP_PARTS)
"""Calibrations beside that of magnitudes."""


class CalibrationError(ValueError):
    """A calibration file that cannot be read or contradicts itself."""


READER = Reader(CalibrationError, "a calibration", AGAIN)


@dataclass(frozen=True, kw_only=True)
class StoredBasis:
    """Of a basis what stands in the JSON."""

    steps: tuple[Count, ...]
    sha256: str
    """Of the file with its tensors."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The fields of a file; see `Calibration` for their meaning."""

    model: str
    settings: dict[str, Any]
    controls: str
    controls_sha256: str
    control_scores: list[list[float]]
    false_positive_rate: Share
    threshold: float
    interval: tuple[Share, Share]
    residual: "Stored | None"
    observed: "Stored | None"
    content: "Stored | None"
    motion: "Stored | None"
    basis: StoredBasis | None
    second: SecondStage | None
    family_cosine: float | None
    schema_version: Count

    def __post_init__(self) -> None:
        if len({len(row) for row in self.control_scores}) != 1 or not self.control_scores[0]:
            raise ValueError("`control_scores` needs as many seeds of each control, at least one.")

    @property
    def parts(self) -> tuple["Stored", ...]:
        """Return this and the calibrations beside it."""
        return (self, *filter(None, (getattr(self, name) for name in BESIDE)))


def write_calibration(path: Path, values: Mapping[str, Any], bases: Mapping[str, Tensor]) -> None:
    """Write JSON, and the bases beside it if there are any; floats come back bit for bit.

    Args:
        path: Of the JSON.
        values: As `Stored` names them.
        bases: The tensors of all bases, as `bases_as_bytes` was given them.

    Raises:
        StorageError: Nothing can be written.
    """
    if bases:
        with replace_atomically(basis_path(path)) as part:
            part.write_bytes(bases_as_bytes(bases))
    sealed = {**values, DIGEST: digest_of(values, DIGEST)}
    with replace_atomically(path) as part:
        part.write_text(json.dumps(sealed, indent=1, allow_nan=False) + "\n", "utf-8")


def read_calibration(path: Path) -> tuple[Stored, dict[str, Tensor]]:
    """Return what `write_calibration` wrote: the values, and the tensors of all bases.

    Raises:
        OSError: There is no such file.
        CalibrationError: It is no calibration, of another version, damaged or edited, or the bases
            beside it are missing or others.
    """
    values = READER.parse_file(path)
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(values, dict) or version not in (1, 5, 6, SCHEMA_VERSION):
        raise CalibrationError(
            f"{path} is no calibration of this version: it has schema_version {version}, expected "
            f"{SCHEMA_VERSION}. {AGAIN}"
        )
    digest = values.pop(DIGEST, None) if version == SCHEMA_VERSION else None
    own = digest_of(values, DIGEST)
    stored = READER.check(_of_this_version(values, version), Stored, str(path))
    if version == SCHEMA_VERSION and digest != own:
        raise CalibrationError(
            f"{path} was damaged or edited: its values have the {DIGEST} {own[:16]}…, and it says "
            f"{ascii(digest)[:18]}…. Was it edited? {AGAIN}"
        )
    known = {part.basis.sha256 for part in stored.parts if part.basis}
    return stored, _read_bases(basis_path(path), known) if known else {}


def _of_this_version(values: dict[str, Any], version: Any) -> dict[str, Any]:
    """Return the values of an older file as this version names them."""
    if version == 1:  # of magnitudes alone; versions between were never released
        values |= {name: None for name in ("basis", "second", "family_cosine", *BESIDE)}
    for part in (values, *(values.get(name) for name in BESIDE)):
        if isinstance(part, dict):
            if version == 5:  # from before clips had thresholds
                part |= dict.fromkeys(CLIP_PARTS)
            part["schema_version"] = SCHEMA_VERSION
    return values


def basis_path(path: Path) -> Path:
    """Return where the bases of a calibration file lie: beside it, as safetensors."""
    return path.with_suffix(".safetensors")


def bases_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return what lies beside the JSON: a safetensors file of all bases, empty of none."""
    return save(dict(tensors)) if tensors else b""


def _read_bases(path: Path, known: set[str]) -> dict[str, Tensor]:
    """Return the tensors of the file with this one sha256."""
    if not path.is_file():
        raise CalibrationError(
            f"The basis of the residual score is missing: expected {path.name} beside the "
            f"calibration, where `unmemorize calibrate` wrote it. Put it there. {AGAIN}"
        )
    data = path.read_bytes()
    if {hashlib.sha256(data).hexdigest()} != known:
        raise CalibrationError(
            f"{path} is not the basis that the calibration was made with. {AGAIN}"
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise CalibrationError(f"{path} is damaged: {error}. {AGAIN}") from error
