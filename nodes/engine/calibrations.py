"""Calibrations of a MODEL: made from control prompts, kept in ComfyUI's folder of models."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...shared.files.storage import Journal
from ...shared.files.tensors import TensorFolder
from ...shared.score.calibration import Calibration, CalibrationError
from ...shared.score.config import DetectionConfig
from ...shared.score.rates import controls_needed
from .comfy_denoiser import Prompt, noise_levels
from .measuring import control_differences_of, encoded, scores
from .model_identity import digest, weights_sha256

LONGEST = 200
"""Bytes of a name: endings follow it."""
FOLDER = "unmemorize"
"""Name of the folder below ``models``, and of its entry in extra_model_paths.yaml."""


def add_folder() -> None:
    """Tell ComfyUI where calibrations are kept; folders its user has added stay."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".json")


def names() -> list[str]:
    """Return the calibrations there are, as a combo shows them."""
    return folder_paths.get_filename_list(FOLDER)


def path_of(name: str) -> Path:
    """Return the file of an existing calibration.

    Raises:
        FileNotFoundError: There is none of this name.
    """
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def load(name: str) -> Calibration:
    """Return an existing calibration.

    Raises:
        FileNotFoundError: There is none of this name.
        ValueError: The file holds none.
    """
    try:
        return Calibration.load(path_of(name))
    except CalibrationError as error:
        raise ValueError(f"{error} In ComfyUI: run the node Calibrate.") from error


def new_path(name: str) -> Path:
    """Return the file that a calibration is saved in under a name; an older one is replaced.

    Raises:
        ValueError: The name is not the plain name of a file.
    """
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{checked_name(name)}.json"


def calibrate(
    model: ModelPatcher,
    clip: Any,
    prompts: Sequence[str],
    negative: list | None,
    latent: Mapping[str, Any],
    config: DetectionConfig,
    *,
    controls: str,
    false_positive_rate: float,
    path: Path,
) -> Calibration:
    """Score control prompts, and save the calibration.

    An interrupted run leaves its scores in ComfyUI's temporary folder, and the next one goes on.

    Args:
        model: MODEL.
        clip: CLIP that encodes the prompts.
        prompts: The controls.
        negative: CONDITIONING that scores are measured against; None takes the empty text.
        latent: LATENT of the size to measure at.
        config: What to measure.
        controls: Name of the list of prompts, for reports.
        false_positive_rate: Share of ordinary prompts that may be flagged.
        path: Where to save it, as JSON with what belongs to it beside it.

    Raises:
        ValueError: The prompts are too few.
    """
    if len(prompts) < controls_needed(false_positive_rate):
        raise ValueError(
            f"{len(prompts)} control prompts cannot support a false-positive rate of "
            f"{false_positive_rate}: it takes {controls_needed(false_positive_rate)}. Add "
            "prompts or raise `false_positive_rate`."
        )
    sha256 = weights_sha256(model)
    negative = encoded(clip, "") if negative is None else negative
    named = {text: Prompt(entries=encoded(clip, text)) for text in prompts}
    levels = noise_levels(model.get_model_object("model_sampling"), config.schedule_steps)
    read = [entries[0][0] for entries in (negative, *(p.entries for p in named.values()))]
    size, seeds = latent["samples"].shape[2:], len(config.seeds)
    key = digest([sha256, seeds, levels[: config.steps], size, read])[:16]
    # ComfyUI empties this folder when it starts.
    journal = Journal(Path(folder_paths.get_temp_directory()) / f"unmemorize-{key}.jsonl")
    first, told = (TensorFolder(journal.path.with_suffix(end)) for end in (".first", ".controls"))
    images = config.steps == 1 and len(config.seeds) > 1  # have a residual of their own
    kept = first.numbers() if images else range(len(prompts))
    traces = {index: journal.get(str(index)) for index in kept}
    known = {
        index: torch.tensor(trace, dtype=torch.float64)
        for index, trace in traces.items()
        if trace is not None
    }
    detection, settings = scores(
        model, named, negative, latent, config, known=known,
        on_result=lambda index, trace: journal.put(str(index), trace.tolist()),
        on_difference=first.put if images else None,
    )  # fmt: skip
    calibration = Calibration.from_controls(
        detection, model=sha256, settings=settings, name=controls,
        false_positive_rate=false_positive_rate,
    )  # fmt: skip
    if images:
        differences = torch.stack([*first.known().values()], dim=1)
        calibration = calibration.with_observed(differences)
    if config.steps == 1:
        differences, settings = control_differences_of(
            model, named, negative, latent, config, known=told.known(), on_result=told.put
        )
        calibration = calibration.with_residual(differences, settings)
    calibration.save(path)
    journal.path.unlink(missing_ok=True)
    first.remove()
    told.remove()
    return calibration


def checked_name(name: str) -> str:
    """Return a name that can be that of a file on every system.

    Raises:
        ValueError: It cannot.
    """
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)
    long = len(name.encode()) > LONGEST
    if reserved or long or not re.fullmatch(r"\w[\w .-]{0,98}\w|\w", name):
        raise ValueError(
            "`name` must be letters, digits, spaces, dots and hyphens, at most 100 and in at most "
            f"{LONGEST} bytes, and none that Windows keeps for itself (CON, NUL, …), got {name!r}."
        )
    return name
