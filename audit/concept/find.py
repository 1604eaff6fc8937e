"""Find the images of a folder that show a concept, whatever their captions say."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...shared.files.storage import write_text
from ...shared.files.weights import ModelError, file_sha256
from ...shared.training.concept.adapter import ConceptAdapter, ConceptSwitch
from ...shared.training.concept.concept import named_words
from ...shared.training.concept.gain import gains, line_above, without_names
from ...shared.training.concept.images import captioned_images, latents_of
from ..common.job import Job, content_key, open_job
from ..common.measure import Bars, complete, silent
from ..common.result import versions
from ..common.subject import Subject
from .find_page import render_find
from .finding import LIST, Finding, FoundImage

PART = 16
"""Images that are measured and kept together."""
PAGE, RESULTS = "report.html", "results.jsonl"
"""What is written beside the list: to look at, and every image with its gain."""


def find_concept(
    subject: Subject,
    concept: Path,
    images: Path,
    *,
    controls: Path | None = None,
    output: Path,
    overwrite: bool = False,
    bars: Bars = silent,
) -> Finding:
    """Measure every image of a folder, and write page, list and results.

    Args:
        subject: The model that the concept was learnt on.
        concept: Its file.
        images: Training folder; captions are read with the concept's names left out.
        controls: Folder of images that lack the concept; None for the gains in the file.
        output: Folder to write. The same job continues there.
        overwrite: Replace another job in it.
        bars: Makes progress bars.

    Raises:
        ModelError: The file is no concept of this model.
        NotEnoughImages: There are too few controls.
    """
    adapter = ConceptAdapter.load(concept)
    numbers = adapter.account["numbers"]
    if controls is None and "other_gains" not in numbers:
        raise ModelError(
            f"{concept} lacks numbers.other_gains, the gains of images without the concept. Name "
            "such images: --controls FOLDER"
        )
    ours, theirs = captioned_images(images), captioned_images(controls) if controls else []
    identity = {
        "concept": file_sha256(concept), "model": subject.fingerprint, "dtype": subject.dtype,
        "resolution": subject.resolution, "images": _key(ours), "controls": _key(theirs),
        **{f"version of {name}": number for name, number in versions().items()},
    }  # fmt: skip
    with open_job(output, identity, overwrite=overwrite) as job:
        measured = [_measure(subject, adapter, side, job, phase, bars)
                    for phase, side in (("controls", theirs), ("images", ours))]  # fmt: skip
        kept = measured[0] if theirs else numbers["other_gains"]
        line = (
            line_above(torch.tensor(kept, dtype=torch.float64))
            if theirs else numbers["threshold"]
        )  # fmt: skip
        found = [
            FoundImage(path=path, caption=caption, gain=gain, shown=gain > line,
                       named=named_words(adapter.names, caption) is not None)
            for (path, caption), gain in zip(ours, measured[1], strict=True)
        ]  # fmt: skip
        finding = Finding(
            images=tuple(sorted(found, key=lambda image: -image.gain)), concept=adapter,
            file=concept.name, model=subject.name, line=line, controls=tuple(kept),
            own_controls=bool(theirs), folder=output,
        )  # fmt: skip
        _write(finding, images)
    return finding


def _measure(
    subject: Subject,
    adapter: ConceptAdapter,
    images: Sequence[tuple[Path, str]],
    job: Job,
    phase: str,
    bars: Bars,
) -> list[float]:
    """Return the gain of every image; what is known is not measured again."""
    parts = [tuple(images[start : start + PART]) for start in range(0, len(images), PART)]
    switch: list[ConceptSwitch] = []

    def measure(part: tuple[tuple[Path, str], ...]) -> list[float]:
        denoiser = subject.denoiser
        if not switch:
            switch.append(ConceptSwitch(denoiser.family.network, adapter))
        captions = [without_names(caption, adapter.names) for _, caption in part]
        latents = latents_of(denoiser, [path for path, _ in part])
        return gains(denoiser, switch[0].on, latents, captions).tolist()

    keys = {part: content_key(job.key, phase, i) for i, part in enumerate(parts)}
    done = complete(job.journal("gains"), keys, measure, bars=bars, phase=phase, unit="image",
                    size=len)  # fmt: skip
    return [gain for part in parts for gain in done[part]]


def _key(images: Sequence[tuple[Path, str]]) -> str:
    return content_key([(path.name, file_sha256(path), caption) for path, caption in images])


def _write(finding: Finding, images: Path) -> None:
    """Write the list that trainers take, all gains, and the page."""
    root = finding.folder
    lines = [f"# {finding.headline}, gain above {finding.line:.4f}"] if finding.shown else []
    lines += [os.path.relpath(image.path, root) for image in finding.shown]
    if finding.shown:
        write_text(root / LIST, "\n".join(lines) + "\n")
    else:  # of an earlier run
        (root / LIST).unlink(missing_ok=True)
    rows = [asdict(image) | {"path": os.path.relpath(image.path, root)} for image in finding.images]
    write_text(root / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(root / PAGE, render_find(finding, images))


def document(finding: Finding) -> dict[str, Any]:
    """Return the one JSON document of the command."""
    return {
        "schema_version": 1, "headline": finding.headline, "remarks": list(finding.remarks),
        "shown": [str(image.path) for image in finding.shown], "images": len(finding.images),
        "line": finding.line, "controls": len(finding.controls), "output": str(finding.folder),
        "list": str(finding.folder / LIST) if finding.shown else None,
    }  # fmt: skip
