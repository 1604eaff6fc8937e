"""`unmemorize concept show` and `test`: a finished file looked at again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..common.options import AnswerOptions, Prompts, Texts, takes_options
from ..common.terminal import answering, print_json, print_table
from .answers import (
    adapter_document,
    adapter_lines,
    document,
    findings,
    layer_document,
    layer_lines,
    lines,
    tables,
)
from .options import Captions, ConceptOptions, File, prompts_in, retained_captions

OUTSIDE = 3
EXIT_CODES = """
Exit codes: 0 within the limits, 3 outside, 1 failed, 2 wrong usage, 130 interrupted.
"""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(AnswerOptions):
    """Of `unmemorize concept show`."""

    file: File


@takes_options
def show(options: ShowOptions) -> None:
    """Show what a concept's file was made from, its size, and how it did in its test."""
    with answering(options):
        from ...shared.training.concept.adapter import ConceptAdapter, holds_adapter
        from ...shared.training.concept.subspace import ConceptSubspace
        from ...shared.training.layers.subspaces import LayerSubspaces, holds_layers

        if holds_adapter(options.file):
            adapter = ConceptAdapter.load(options.file)
            content, rows = adapter_document(adapter), adapter_lines(adapter)
        elif holds_layers(options.file):
            layers = LayerSubspaces.load(options.file)
            content, rows = layer_document(layers), layer_lines(layers)
        else:
            subspace = ConceptSubspace.load(options.file)
            content, rows = document(subspace), lines(subspace)
    if options.as_json:
        print_json(content)
    else:
        print_table(f"Concept in {options.file}", ["what", "value"], rows)


@dataclass(frozen=True, kw_only=True)
class TestOptions(ConceptOptions):
    """Of `unmemorize concept test`."""

    file: File
    model: Annotated[
        str,
        typer.Argument(
            help="As for `build`; left out where FILE holds subspaces of layers.",
            show_default=False,
        ),
    ] = ""
    prompts: Prompts = None
    prompt: Texts = None
    captions: Captions = None
    lora: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A trained LoRA: does it read anything inside the subspace?"),
    ] = None


@takes_options
def test(options: TestOptions) -> None:
    """Measure a subspace again: with this model, on your prompts, in a trained LoRA.

    Prompts that name the concept are compared with their neutral twins. Subspaces of layers are
    looked for in the LoRA alone. This is the algebra of projection: it cannot judge concept
    subtraction, nor whether a LoRA draws the concept. For that: unmemorize audit --concept.
    """
    with answering(options):
        from ...shared.training.concept.adapter import holds_adapter
        from ...shared.training.layers.subspaces import LayerSubspaces, holds_layers

        if holds_adapter(options.file):
            raise ValueError(
                f"{options.file} holds a concept's adapter, for concept subtraction, which no "
                "algebra can judge: what a LoRA draws has to be looked at. Type: unmemorize audit "
                f"MODEL --lora LORA --concept {options.file}"
            )
        of_layers = holds_layers(options.file)
    texts = (options.model, options.prompts, options.prompt, options.captions)
    if of_layers and (not options.lora or any(texts)):
        raise typer.BadParameter(
            f"{options.file} holds subspaces of layers, which are looked for in a LoRA alone: "
            "unmemorize concept test FILE --lora LORA"
        )
    if not of_layers and not options.model:
        raise typer.BadParameter(f"{options.file} is measured in the text of a model: name MODEL.")
    with answering(options):
        from ...shared.training.concept.subspace import ConceptSubspace
        from ...shared.training.concept.text_states import pipeline_text_path
        from ...shared.training.examination import examine, shares_read

        examination = None
        subspace: LayerSubspaces | ConceptSubspace
        if of_layers:
            subspace = LayerSubspaces.load(options.file)
        else:
            path = pipeline_text_path(options.denoiser)
            concept = ConceptSubspace.load(options.file, width=path([""]).states.shape[-1])
            prompts = [*(options.prompt or ()), *prompts_in(options.prompts or ())]
            retained = retained_captions(options.model, options.captions)
            subspace, examination = concept, examine(path, concept, retained, prompts)
        read = shares_read(options.lora, subspace) if options.lora else {}
    if options.as_json:
        print_json(findings(examination, read))
    else:
        for table in tables(examination, read):
            print_table(*table)
    within = (examination is None or examination.within) and all(
        layer.within for layer in read.values()
    )
    raise typer.Exit(0 if within else OUTSIDE)
