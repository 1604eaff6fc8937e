"""`unmemorize concept layers`: subspaces of the layers that read no text, from images."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..common.options import OutputFile, takes_options
from ..common.terminal import answering, bar, print_json, print_table
from .answers import layer_document, layer_lines
from .options import ConceptOptions, Energy


@dataclass(frozen=True, kw_only=True)
class LayersOptions(ConceptOptions):
    """Of `unmemorize concept layers`."""

    images: Annotated[
        list[Path],
        typer.Option(
            help="Training folder with captions: images whose captions name the concept, and "
            "others, which must stay learnable; repeatable."
        ),
    ]
    name: Annotated[
        list[str],
        typer.Option("--name", help="What captions call the concept; repeatable, any will do."),
    ]
    output: OutputFile = Path("concept.layers.safetensors")
    energy: Energy = 0.95
    cap: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most dimensions of a layer. Default: 24."),
    ] = None


@takes_options
def layers(options: LayersOptions) -> None:
    """Build subspaces for the layers that read no text, from images, for --project_layers.

    The base model is run on noisy versions of all images. The subspace of a layer are the
    directions of its input that images of the concept hold more of than the others.
    """
    with answering(options):
        from ...shared.files.prompts import clean, read_prompts
        from ...shared.training.concept.concept import named_words
        from ...shared.training.concept.images import latents_of
        from ...shared.training.layers.fitting import CAP, CaptionedLatents, fit_layer_subspaces

        read = clean(each for folder in options.images for each in read_prompts(folder))
        sides: tuple[list, list] = ([], [])  # images that show the concept, and the others
        for caption, paths in zip(read.prompts, read.images, strict=True):
            side = sides[named_words(options.name, caption) is None]
            side += [(caption, path) for path in paths]
        denoiser = options.denoiser
        total = sum(map(len, sides))
        with closing(bar("images", total, 0, "image")) as progress:
            made = fit_layer_subspaces(
                denoiser, denoiser.family.network,
                *(CaptionedLatents(latents=latents_of(denoiser, [path for _, path in side]),
                                   captions=tuple(caption for caption, _ in side))
                  for side in sides),
                names=options.name, energy=options.energy, cap=options.cap or CAP,
                progress=progress.update,
            )  # fmt: skip
        made.save(options.output)
    if options.as_json:
        print_json(layer_document(made) | {"output": str(options.output)})
    else:
        print_table(f"Layers written to {options.output}", ["what", "value"], layer_lines(made))
