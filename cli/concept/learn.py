"""`unmemorize concept learn`: an adapter that draws a concept, from images or a published LoRA."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..common.options import OutputFile, takes_options
from ..common.terminal import answering, bar, print_json, print_table
from .answers import adapter_document, adapter_lines
from .options import ConceptOptions, retained_captions

if TYPE_CHECKING:
    from ...shared.models.adapter import PipelineDenoiser
    from ...shared.training.concept.images import CaptionedLatents
    from ...shared.training.concept.learning import ConceptImages

DRAWN, DRAWN_AT_ONCE = 32, 4
"""Images that the model draws itself where none without the concept are named."""


@dataclass(frozen=True, kw_only=True)
class LearnOptions(ConceptOptions):
    """Of `unmemorize concept learn`."""

    images: Annotated[
        Path,
        typer.Option(
            help="Folder of 8 or more images that have only the concept in common, 16 are good, "
            "with captions if there are any. Not those of the training it is to be kept out of."
        ),
    ]
    name: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--name", help="What captions call the concept; repeatable, any will do."),
    ] = None
    others: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of 16 or more images that resemble them and lack the concept, on which "
            "the adapter learns to do nothing. Default: the model draws 32 ordinary ones."
        ),
    ] = None
    from_lora: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Published LoRA of the concept: taken instead of teaching, and measured "
                     "on --images."),
    ] = None  # fmt: skip
    steps: Annotated[int, typer.Option(min=1, help="Steps in which the adapter is taught.")] = 60
    output: OutputFile = Path("concept.safetensors")


@takes_options
def learn(options: LearnOptions) -> None:
    """Learn a concept as a small adapter, for --subtract_concepts, `concept find` and `audit`.

    A quarter of the images, and half of the others, are held out: the numbers in the file say what
    the adapter does on them. Where it learnt nothing, no file is written.
    """
    with answering(options):
        from ...shared.training.concept.learning import concept_of_lora, learn_concept

        denoiser = options.denoiser
        images = _images(options, denoiser)
        if options.from_lora:
            made, left = concept_of_lora(denoiser, images, options.from_lora)
        else:
            left = ()
            with closing(bar("adapter", options.steps, 0, "step")) as progress:
                made = learn_concept(
                    denoiser, images, steps=options.steps, progress=progress.update
                )
        made.save(options.output)
    if options.as_json:
        print_json(adapter_document(made) | {"output": str(options.output), "left_out": list(left)})
    else:
        rows = adapter_lines(made)
        if left:
            rows.append(("left out", f"{len(left)} of text encoders and embeddings, {left[0]}"))
        print_table(f"Concept written to {options.output}", ["what", "value"], rows)


def _images(options: LearnOptions, denoiser: "PipelineDenoiser") -> "ConceptImages":
    from ...shared.training.concept.images import CaptionedLatents, captioned_images, latents_of
    from ...shared.training.concept.learning import ConceptImages

    def read(folder: Path) -> CaptionedLatents:
        found = captioned_images(folder)
        with closing(bar(folder.name, len(found), 0, "image")) as progress:
            latents = latents_of(denoiser, [path for path, _ in found], progress.update)
        return CaptionedLatents(latents=latents, captions=tuple(text for _, text in found))

    concept = read(options.images)
    return ConceptImages(
        concept=concept,
        others=read(options.others) if options.others else _drawn(options, denoiser),
        names=tuple(options.name or ()),
    )


def _drawn(options: LearnOptions, denoiser: "PipelineDenoiser") -> "CaptionedLatents":
    """Return what the model draws for ordinary prompts, as images without the concept."""
    import torch

    from ...shared.training.concept.gain import without_names
    from ...shared.training.concept.images import CaptionedLatents

    texts = [text for text in retained_captions(options.model, None)
             if without_names(text, options.name or ()) == text]  # fmt: skip
    texts, latents = texts[:: max(1, len(texts) // DRAWN)][:DRAWN], []
    with closing(bar("ordinary images", len(texts), 0, "image")) as progress:
        for start in range(0, len(texts), DRAWN_AT_ONCE):
            some = texts[start : start + DRAWN_AT_ONCE]
            drawn = denoiser.generate(some, range(start, start + len(some)), steps=20, cond_scale=5)
            latents.append(denoiser.encode_images(drawn))
            progress.update(len(some))
    return CaptionedLatents(latents=torch.cat(latents), captions=tuple(texts))
