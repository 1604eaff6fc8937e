"""`unmemorize concept build`: a concept's subspace, from its names or images."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..common.options import Model, OutputFile, takes_options
from ..common.terminal import answering, bar, print_json, print_table
from .answers import document, lines
from .options import Captions, ConceptOptions, Energy, prompts_in, retained_captions

if TYPE_CHECKING:
    from ...shared.models.adapter import PipelineDenoiser
    from ...shared.training.concept.concept import Concept


@dataclass(frozen=True, kw_only=True)
class BuildOptions(ConceptOptions):
    """Of `unmemorize concept build`."""

    model: Model  # named here, so that it comes before the other argument
    concepts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            help="As --project_concepts of the trainers takes them, in place of --name, --synonym "
            'and --neutral: "mickey mouse, mickey -> a character"; several joined by a semicolon.',
            show_default=False,
        ),
    ] = None
    neutral: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Word for any such thing, as `a character`; the closer the better."),
    ] = None
    name: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--name", help="What the concept is called."),
    ] = None
    synonym: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--synonym", help="Another name or spelling; repeatable, 5 to 20 are good."),
    ] = None
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of images of the concept: a word for them is learnt on the model, beside "
            "the names or in place of them. Needs a GPU or patience."
        ),
    ] = None
    learn_steps: Annotated[int, typer.Option(min=1, help="Steps in which the word is learnt.")] = (
        500
    )
    also: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--also", metavar="FILE", help="Join the concepts of this file; repeatable."),
    ] = None
    templates: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Sentences with one {} each, one a line. Default: 48 bundled ones."),
    ] = None
    captions: Captions = None
    output: OutputFile = Path("concept.safetensors")
    energy: Energy = 0.95
    cap: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most dimensions per concept. Default: 16, wide models 32."),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Write it although it fails its test; it says so.")
    ] = False


@takes_options
def build(options: BuildOptions) -> None:
    """Build the subspace of a concept from its names or images, test it, and write it.

    It is tested on sentences that it was not built from, and refused when too much of the concept
    lies outside of it or too much of other text inside.
    """
    with answering(options):
        from ...shared.training.concept.fitting import fit_subspace
        from ...shared.training.concept.subspace import ConceptSubspace
        from ...shared.training.concept.text_states import pipeline_text_path
        from ...shared.training.examination import concepts_of

        first, *joined = _named(options)
        joined += [
            concept
            for path in options.also or ()
            for concept in concepts_of(ConceptSubspace.load(path).provenance)
        ]
        retained = retained_captions(options.model, options.captions)
        denoiser = options.denoiser
        with _learnt_word(denoiser, options, first) as provenance:
            subspace = fit_subspace(
                pipeline_text_path(denoiser), [first, *joined], retained,
                energy=options.energy, cap=options.cap, force=options.force,
            )  # fmt: skip
        subspace = replace(subspace, provenance={**subspace.provenance, **provenance})
        subspace.save(options.output)
    if options.as_json:
        print_json(document(subspace) | {"output": str(options.output)})
    else:
        print_table(f"Concept written to {options.output}", ["what", "value"], lines(subspace))


def _named(options: BuildOptions) -> "list[Concept]":
    """Return the concepts that were named; with images the first has the learnt word as well."""
    from ...shared.training.concept.concept import Concept, load_templates, parse_concepts
    from ...shared.training.concept.learnt_word import WORD

    templates = prompts_in([options.templates]) if options.templates else load_templates()
    names, neutral, others = [*(options.name or ()), *(options.synonym or ())], options.neutral, []
    if options.concepts:
        if names or neutral:
            raise ValueError("Name concepts in one text, or by --name and --neutral, not both.")
        if not (parsed := parse_concepts(options.concepts, templates)):
            raise ValueError('No concept is named. Type: "mickey mouse -> a character"')
        first, *others = parsed
        names, neutral = [*first.names], first.neutral
    if options.images:
        names.append(WORD)
    return [Concept(names=tuple(names), neutral=neutral or "", templates=tuple(templates)), *others]


@contextmanager
def _learnt_word(
    denoiser: "PipelineDenoiser", options: BuildOptions, concept: "Concept"
) -> Iterator[dict[str, Any]]:
    """Learn a word for a folder's images, which the model reads for as long as the block lasts.

    Yields:
        The file's provenance of it, plain data; empty without a folder.
    """
    if options.images is None:
        yield {}
        return
    from ...shared.files.prompts import image_files
    from ...shared.training.concept.images import latents_of
    from ...shared.training.concept.learnt_word import knowing, learn

    paths = image_files(options.images)
    if not paths:
        raise ValueError(f"{options.images} holds no images.")
    latents, steps = latents_of(denoiser, paths), options.learn_steps
    with knowing(denoiser.pipeline, concept.neutral) as vectors:
        with closing(bar("word", steps, 0, "step")) as progress:
            before, after = learn(
                denoiser, vectors, latents, concept.templates, steps=steps, progress=progress.update
            )
        yield {"learnt": {"pictures": len(paths), "steps": steps,
                          "loss_before": before, "loss_after": after}}  # fmt: skip
