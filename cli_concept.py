"""`unmemorize concept`: a concept's subspace built, shown and tested before a training uses it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from . import concept_answers as answers
from .options import Debug, Device, Dtype, Json, Model, ModelConfig, Prompts, Revision, Texts
from .terminal import answering, print_json, print_table

if TYPE_CHECKING:
    from .shared.training.subspace import ConceptSubspace
    from .shared.training.text_states import TextPath

OUTSIDE = 3
EXIT_CODES = """
Exit codes: 0 within the limits, 3 outside, 1 failed, 2 wrong usage, 130 interrupted.
"""

app = typer.Typer(
    help="A concept's subspace, which a LoRA can be kept off while it trains.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(help="Made by `unmemorize concept build`.")]
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
    name: Annotated[list[str], typer.Option("--name", help="What the concept is called.")],
    neutral: Annotated[
        str, typer.Option(help="Word for any such thing, as `a character`; close is better.")
    ],
    synonym: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--synonym", help="Another name or spelling; repeatable, 5 to 20 are good."),
    ] = None,
    also: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--also", metavar="FILE", help="Join the concepts of this file; repeatable."),
    ] = None,
    templates: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Sentences with one {} each, one a line. Default: 48 bundled ones."),
    ] = None,
    captions: Captions = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("concept.safetensors"),
    energy: Annotated[float, typer.Option(help="Share of the concept at which to stop.")] = 0.95,
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
    """Build the subspace of a concept from its names, test it, and write it.

    It is tested on sentences that it was not built from, and refused when too much of the concept
    lies outside of it or too much of other text inside.
    """
    with answering(as_json=as_json, debug=debug):
        from .shared.training.concept import Concept, load_templates
        from .shared.training.examination import concepts_of
        from .shared.training.fitting import fit_subspace
        from .shared.training.subspace import ConceptSubspace

        sentences = tuple(_texts([templates])) if templates else load_templates()
        made = Concept(names=(*name, *(synonym or ())), neutral=neutral, templates=sentences)
        joined = [
            c for path in also or () for c in concepts_of(ConceptSubspace.load(path).provenance)
        ]
        kept = _captions(model, captions)
        text_path = _text_path(model, revision, model_config, device, dtype)
        subspace = fit_subspace(
            text_path, [made, *joined], kept, energy=energy, cap=cap, force=force
        )
        subspace.save(output)
    if as_json:
        print_json(answers.document(subspace) | {"output": str(output)})
    else:
        print_table(f"Concept written to {output}", ["what", "value"], answers.lines(subspace))


@app.command()
def show(file: File, as_json: Json = False, debug: Debug = False) -> None:
    """Show what a subspace was built from, its size, and how it did in its test."""
    with answering(as_json=as_json, debug=debug):
        from .shared.training.subspace import ConceptSubspace

        subspace = ConceptSubspace.load(file)
    if as_json:
        print_json(answers.document(subspace))
    else:
        print_table(f"Concept in {file}", ["what", "value"], answers.lines(subspace))


@app.command("test", epilog=EXIT_CODES)
def examine_file(
    file: File,
    model: Model,
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

    Prompts that name the concept are compared with their neutral twins.
    """
    with answering(as_json=as_json, debug=debug):
        from .shared.training.examination import examine
        from .shared.training.subspace import ConceptSubspace

        text_path = _text_path(model, revision, model_config, device, dtype)
        subspace = ConceptSubspace.load(file, width=text_path([""]).states.shape[-1])
        asked = [*(prompt or ()), *_texts(prompts or ())]
        found = examine(text_path, subspace, _captions(model, captions), asked)
        read = _read_by(lora, subspace) if lora else {}
    if as_json:
        print_json(answers.findings(found, read))
    else:
        for table in answers.tables(found, read):
            print_table(*table)
    exact = all(layer["within"] for layer in read.values())
    raise typer.Exit(0 if found.within and exact else OUTSIDE)


def _texts(files: Sequence[Path]) -> list[str]:
    """Return the distinct prompts of files."""
    from .shared.prompts import clean, read_prompts

    return list(clean(each for path in files for each in read_prompts(path)).prompts)


def _captions(model: str, files: list[Path] | None) -> list[str]:
    """Return what must stay: the named captions, else ordinary ones."""
    if files:
        return _texts(files)
    if model == "demo":
        from . import demo

        return [caption.text for caption in demo.captions()]
    from .shared.controls import CONTROLS, load_controls

    return load_controls(CONTROLS[0])


def _text_path(
    model: str, revision: str | None, config: Path | None, device: str | None, dtype: str | None
) -> "TextPath":
    """Return how a model reads prompts."""
    from .audit.subject import Subject
    from .shared.training.text_states import encoders_of, text_path_of

    subject = Subject(model, revision=revision, config=config, device=device, dtype=dtype)
    return text_path_of(subject.denoiser, encoders_of(subject.denoiser.pipeline))


def _read_by(lora: Path, subspace: "ConceptSubspace") -> dict[str, dict[str, Any]]:
    """Return by layer |A V| / |A| of a saved LoRA, and whether rounding explains it."""
    from .shared.training.lora_factors import saved_factors
    from .shared.training.projection import TOLERANCES, residuals

    factors = saved_factors(lora)
    return {
        layer: {"share": share, "within": share <= TOLERANCES[factors[layer].dtype]}
        for layer, share in residuals(factors, [subspace]).items()
    }
