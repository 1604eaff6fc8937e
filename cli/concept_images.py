"""What `unmemorize concept` makes of pictures: subspaces of layers, a word that has no name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from . import concept_answers as answers
from .options import Debug, Device, Dtype, Energy, Json, Model, ModelConfig, OutputFile, Revision
from .terminal import answering, bar, print_json, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from ..shared.models.adapter import PipelineDenoiser
    from ..shared.training.concept.concept import Concept
    from ..shared.training.layers.fitting import CaptionedLatents

AT_ONCE = 8
"""Pictures that the autoencoder reads at once."""


def layers(
    model: Model,
    images: Annotated[
        list[Path],
        typer.Option(
            help="Training folder with captions: pictures whose captions name the "
            "concept, and others, which must stay learnable; repeatable."
        ),
    ],
    name: Annotated[
        list[str],
        typer.Option("--name", help="What captions call the concept; repeatable, any will do."),
    ],
    output: OutputFile = Path("concept.layers.safetensors"),
    energy: Energy = 0.95,
    cap: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most dimensions of a layer. Default: 24."),
    ] = None,
    revision: Revision = None,
    model_config: ModelConfig = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Build subspaces for the layers that read no text, from pictures, for --project_layers.

    The base model is run on noisy versions of all pictures. A layer's subspace are the directions
    of its input that the concept's pictures hold more of than the others.
    """
    with answering(as_json=as_json, debug=debug):
        from ..audit.common.subject import Subject
        from ..shared.training.layers.fitting import CAP, fit_layer_subspaces

        subject = Subject(model, revision=revision, config=model_config, device=device, dtype=dtype)
        pairs = _captioned(images)
        sides = _sides(pairs, name)
        denoiser = subject.denoiser
        shown = bar("pictures", len(pairs), 0, "picture")
        try:
            made = fit_layer_subspaces(
                denoiser, denoiser.family.network,
                *(_pictures(denoiser, side) for side in sides),
                names=name, energy=energy, cap=cap or CAP, progress=shown.update,
            )  # fmt: skip
        finally:
            shown.close()
        made.save(output)
    if as_json:
        print_json(answers.layer_document(made) | {"output": str(output)})
    else:
        print_table(f"Layers written to {output}", ["what", "value"], answers.layer_lines(made))


@contextmanager
def knowing_pictures(
    denoiser: "PipelineDenoiser", folder: Path | None, concept: "Concept", steps: int
) -> Iterator[dict[str, Any]]:
    """Learn a word for a folder's pictures, which the model reads for as long as the block lasts.

    Yields:
        What a file tells of it, plain data; empty without a folder.
    """
    if folder is None:
        yield {}
        return
    from ..shared.training.concept.learnt_word import knowing, learn

    paths = _files_in(folder)
    latents = _latents_of(denoiser, paths)
    with knowing(denoiser.pipeline, concept.neutral) as vectors:
        shown = bar("word", steps, 0, "step")
        try:
            before, after = learn(
                denoiser, vectors, latents, concept.templates, steps=steps, progress=shown.update
            )
        finally:
            shown.close()
        told = {"pictures": len(paths), "steps": steps}
        yield {"learnt": told | {"loss_before": before, "loss_after": after}}


def _sides(
    pairs: Sequence[tuple[str, Path]], names: Sequence[str]
) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """Return the pictures whose captions name the concept, and the others."""
    from ..shared.training.concept.concept import named_words

    sides: tuple[list, list] = ([], [])
    for caption, path in pairs:
        sides[named_words(names, caption) is None].append((caption, path))
    return sides


def _pictures(
    denoiser: "PipelineDenoiser", pairs: Sequence[tuple[str, Path]]
) -> "CaptionedLatents":
    """Return pictures as the network is trained on them."""
    from ..shared.training.layers.fitting import CaptionedLatents

    return CaptionedLatents(
        latents=_latents_of(denoiser, [path for _, path in pairs]),
        captions=tuple(caption for caption, _ in pairs),
    )


def _files_in(folder: Path) -> list[Path]:
    """Return the pictures in a folder, those of its folders too.

    Raises:
        ValueError: There is none.
    """
    from ..shared.files.prompts import IMAGE_SUFFIXES

    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no pictures.")
    return found


def _captioned(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return every picture of training folders with its caption."""
    from ..shared.files.prompts import clean, read_prompts

    found = clean(each for folder in folders for each in read_prompts(folder))
    return [
        (text, path)
        for text, paths in zip(found.prompts, found.images, strict=True)
        for path in paths
    ]


def _latents_of(denoiser: "PipelineDenoiser", paths: Sequence[Path]) -> "Tensor":
    """Return clean latents [picture *latent], in the scale that the network reads.

    Raises:
        ValueError: A file is not a picture.
    """
    import torch

    from ..shared.files.images import read_image

    parts = [
        denoiser.encode_images([read_image(path) for path in paths[start : start + AT_ONCE]])
        for start in range(0, len(paths), AT_ONCE)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, *denoiser.latent_shape)
