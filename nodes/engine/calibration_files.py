"""Calibrations in ComfyUI's folder of models, by name."""

import re
from pathlib import Path

import folder_paths

from ...shared.score.calibration import Calibration

KIND = "unmemorize"
"""Name of the folder below ``models``, and of its entry in extra_model_paths.yaml."""


def add_folder() -> None:
    """Tell ComfyUI where calibrations are kept; folders its user has added stay."""
    folder_paths.add_model_folder_path(KIND, str(Path(folder_paths.models_dir) / KIND))
    folder_paths.folder_names_and_paths[KIND][1].add(".json")


def names() -> list[str]:
    """Return the calibrations there are, as a combo shows them."""
    return folder_paths.get_filename_list(KIND)


def path_of(name: str) -> Path:
    """Return the file of an existing calibration.

    Raises:
        FileNotFoundError: There is none of this name.
    """
    return Path(folder_paths.get_full_path_or_raise(KIND, name))


def save(calibration: Calibration, name: str) -> Path:
    """Write a calibration under a name and return its file; one of the same name is replaced.

    Raises:
        ValueError: The name is not the plain name of a file.
    """
    path = Path(folder_paths.get_folder_paths(KIND)[0]) / f"{checked_name(name)}.json"
    calibration.save(path)
    return path


def checked_name(name: str) -> str:
    """Return a name that can be that of a file on every system.

    Raises:
        ValueError: It cannot.
    """
    if not re.fullmatch(r"\w[\w .-]{0,98}\w|\w", name):
        raise ValueError(
            f"`name` must be letters, digits, spaces, dots and hyphens, at most 100, got {name!r}."
        )
    return name
