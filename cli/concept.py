"""`unmemorize concept`: a concept's subspace built, shown and tested before a training uses it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from . import concept_answers as answers
from .concept_images import knowing_pictures, layers
from .options import (
    Debug,
    Device,
    Dtype,
    Energy,
    Json,
    Model,
    ModelConfig,
    OutputFile,
    Prompts,
    Revision,
    Texts,
)
from .terminal import answering, print_json, print_table

if TYPE_CHECKING:
    from ..shared.models.adapter import PipelineDenoiser
    from ..shared.training.concept.text_states import TextPath

OUTSIDE = 3
EXIT_CODES = """
Exit codes: 0 within the limits, 3 outside, 1 failed, 2 wrong usage, 130 interrupted.
"""

app = typer.Typer(
    help="A concept's subspace, which a LoRA can be kept off while it trains.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command()(layers)

File = Annotated[Path, typer.Argument(help="Made by `unmemorize concept build` or `layers`.")]
Captions = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(
        "--captions",
        help="What must stay: the training captions, as a file or training folder; repeatable. "
        "Default: ordinary photographs, and the demo's own for the demo model.",
    ),
]


@app.command()
def build(
    model: Model,
    neutral: Annotated[
        str, typer.Option(help="Word for any such thing, as `a character`; close is better.")
    ],
    name: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--name", help="What the concept is called."),
    ] = None,
    synonym: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--synonym", help="Another name or spelling; repeatable, 5 to 20 are good."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of the concept's pictures: a word for them is learnt on the "
            "model, beside the names or in place of them. Needs a GPU or patience."
        ),
    ] = None,
    learn_steps: Annotated[
        int, typer.Option(min=1, help="Steps in which the word is learnt.")
    ] = 500,
    also: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--also", metavar="FILE", help="Join the concepts of this file; repeatable."),
    ] = None,
    templates: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Sentences with one {} each, one a line. Default: 48 bundled ones."),
    ] = None,
    captions: Captions = None,
    output: OutputFile = Path("concept.safetensors"),
    energy: Energy = 0.95,
    cap: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most dimensions per concept. Default: 16, wide models 32."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write it although it fails its test; it says so.")
    ] = False,
    revision: Revision = None,
    model_config: ModelConfig = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Build the subspace of a concept from its names or pictures, test it, and write it.

    It is tested on sentences that it was not built from, and refused when too much of the concept
    lies outside of it or too much of other text inside.
    """
    with answering(as_json=as_json, debug=debug):
        from ..shared.training.concept.concept import Concept, load_templates
        from ..shared.training.concept.fitting import fit_subspace
        from ..shared.training.concept.learnt_word import WORD
        from ..shared.training.concept.subspace import ConceptSubspace
        from ..shared.training.examination import concepts_of

        sentences = tuple(_texts([templates])) if templates else load_templates()
        names = (*(name or ()), *(synonym or ()), *((WORD,) if images else ()))
        made = Concept(names=names, neutral=neutral, templates=sentences)
        joined = [
            c for path in also or () for c in concepts_of(ConceptSubspace.load(path).provenance)
        ]
        kept = _captions(model, captions)
        denoiser = _denoiser(model, revision, model_config, device, dtype)
        with knowing_pictures(denoiser, images, made, learn_steps) as told:
            subspace = fit_subspace(
                _text_path(denoiser), [made, *joined], kept, energy=energy, cap=cap, force=force
            )
        subspace = replace(subspace, provenance={**subspace.provenance, **told})
        subspace.save(output)
    if as_json:
        print_json(answers.document(subspace) | {"output": str(output)})
    else:
        print_table(f"Concept written to {output}", ["what", "value"], answers.lines(subspace))


@app.command()
def show(file: File, as_json: Json = False, debug: Debug = False) -> None:
    """Show what subspaces were built from, their size, and how they did in their test."""
    with answering(as_json=as_json, debug=debug):
        from ..shared.training.concept.subspace import ConceptSubspace
        from ..shared.training.layers.subspaces import LayerSubspaces, holds_layers

        if holds_layers(file):
            layers = LayerSubspaces.load(file)
            document, lines = answers.layer_document(layers), answers.layer_lines(layers)
        else:
            concept = ConceptSubspace.load(file)
            document, lines = answers.document(concept), answers.lines(concept)
    if as_json:
        print_json(document)
    else:
        print_table(f"Concept in {file}", ["what", "value"], lines)


@app.command("test", epilog=EXIT_CODES)
def examine_file(
    file: File,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="As for `build`; left out where FILE holds subspaces of layers."),
    ] = None,
    prompts: Prompts = None,
    prompt: Texts = None,
    captions: Captions = None,
    lora: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A trained LoRA: does it read anything inside the subspace?"),
    ] = None,
    revision: Revision = None,
    model_config: ModelConfig = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a subspace again: with this model, on your prompts, in a trained LoRA.

    Prompts that name the concept are compared with their neutral twins. Subspaces of layers are
    looked for in the LoRA alone.
    """
    with answering(as_json=as_json, debug=debug):
        from ..shared.training.layers.subspaces import LayerSubspaces, holds_layers

        of_layers = holds_layers(file)
    if of_layers and (not lora or model or prompts or prompt or captions):
        raise typer.BadParameter(
            f"{file} holds subspaces of layers, which are looked for in a LoRA alone: "
            "unmemorize concept test FILE --lora LORA"
        )
    if not of_layers and not model:
        raise typer.BadParameter(f"{file} is measured in the text of a model: name MODEL.")
    with answering(as_json=as_json, debug=debug):
        from ..shared.training.concept.subspace import ConceptSubspace
        from ..shared.training.examination import examine, shares_read

        found = None
        subspace: LayerSubspaces | ConceptSubspace
        if not model:  # only subspaces of layers go without one
            subspace = LayerSubspaces.load(file)
        else:
            text_path = _text_path(_denoiser(model, revision, model_config, device, dtype))
            subspace = concept = ConceptSubspace.load(file, width=text_path([""]).states.shape[-1])
            asked = [*(prompt or ()), *_texts(prompts or ())]
            found = examine(text_path, concept, _captions(model, captions), asked)
        read = shares_read(lora, subspace) if lora else {}
    if as_json:
        print_json(answers.findings(found, read))
    else:
        for table in answers.tables(found, read):
            print_table(*table)
    within = (found is None or found.within) and all(layer.within for layer in read.values())
    raise typer.Exit(0 if within else OUTSIDE)


def _texts(files: Sequence[Path]) -> list[str]:
    """Return the distinct prompts of files."""
    from ..shared.files.prompts import clean, read_prompts

    return list(clean(each for path in files for each in read_prompts(path)).prompts)


def _captions(model: str, files: list[Path] | None) -> list[str]:
    """Return what must stay: the named captions, else ordinary ones."""
    if files:
        return _texts(files)
    if model == "demo":
        from .. import demo

        return [caption.text for caption in demo.captions()]
    from ..shared.score.controls import CONTROLS, load_controls

    return load_controls(CONTROLS[0])


def _denoiser(
    model: str, revision: str | None, config: Path | None, device: str | None, dtype: str | None
) -> "PipelineDenoiser":
    from ..audit.common.subject import Subject

    subject = Subject(model, revision=revision, config=config, device=device, dtype=dtype)
    return subject.denoiser


def _text_path(denoiser: "PipelineDenoiser") -> "TextPath":
    """Return how a model reads prompts."""
    from ..shared.training.concept.text_states import encoders_of, text_path_of

    return text_path_of(denoiser, encoders_of(denoiser.pipeline))
