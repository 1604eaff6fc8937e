"""Repositories of the hub: fetched in the variant that they have, refusals explained."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..files.weights import ModelError
from .calls.quiet import quiet

VARIANTS = ("fp16", "bf16")
"""Copies in half precision, one of which may be all that a repository has."""
NOT_THERE = ("`safetensors` weights", "modeling files")
"""What diffusers says when a repository has no safetensors of the variant that was asked for."""


def download(hub_id: str, revision: str | None) -> Path:
    """Return the cached copy of a hub repository, without pickles and without code.

    Raises:
        ModelError: It could not be fetched; says why, and what to do about it.
    """
    # Read when the client is imported: no more is sent than is needed to fetch the files.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from diffusers import DiffusionPipeline

    first: Exception | None = None
    for variant in ({}, *({"variant": name} for name in VARIANTS)):
        try:
            with quiet():
                return Path(
                    DiffusionPipeline.download(
                        hub_id, revision=revision, use_safetensors=True, **variant
                    )
                )
        except Exception as error:  # the hub's client raises a dozen unrelated classes
            first = first or error
            if not any(text in str(error) for text in NOT_THERE):
                break
    assert first is not None
    raise ModelError(_reason(hub_id, first)) from first


def _reason(hub_id: str, error: Exception) -> str:
    """Return why a repository could not be fetched."""
    names = {type(each).__name__ for each in _causes(error)}
    if "GatedRepoError" in names:
        return (
            f"{hub_id} is gated: its files are given to those who accept its licence. Accept it "
            f"on https://huggingface.co/{hub_id}, then log in by typing: hf auth login"
        )
    where = f"There is no folder {hub_id} here, and as a hub id it could not be fetched"
    if "RepositoryNotFoundError" in names:
        return (
            f"{where}: the hub shows no such repository to this machine. Is the name right? For a "
            "private one, log in by typing: hf auth login"
        )
    first_line = str(error).splitlines()[0] if str(error) else ""
    return f"{where}: {type(error).__name__}: {first_line}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
