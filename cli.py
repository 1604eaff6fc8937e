"""The command line: audit, verify, detect, explain, mitigate, calibrate, concept, demo, doctor.

Everything heavy is imported inside the commands, so that help and usage errors come at once.
"""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from . import cli_concept, cli_lora, cli_verify
from .options import (
    Attack,
    Batch,
    CalibrationFile,
    Controls,
    Debug,
    Device,
    Dtype,
    Epochs,
    Fast,
    Force,
    HeldOut,
    Images,
    IncludeImages,
    Json,
    Lora,
    Model,
    ModelConfig,
    Processes,
    Prompts,
    Rate,
    Reserve,
    Resolution,
    Revision,
    Seeds,
    Steps,
    Texts,
    Trigger,
)
from .terminal import FAILED, answering, bar, print_json, print_table

if TYPE_CHECKING:
    from .audit.config import AuditConfig
    from .audit.subject import Subject
    from .shared.detection import DetectionConfig

NOTHING_FOUND, FOUND = 0, 3
EXIT_CODES = """
Exit codes: 0 nothing found (or nothing to find), 3 at least one prompt is above the threshold
(of a LoRA with --images: at least one training image comes back), 1 failed, 2 wrong usage,
130 interrupted. Above the threshold does not mean certain: about
rate x prompts are expected there by chance, and the summary says how many.
"""

app = typer.Typer(
    help="Find training images that a text-to-image model gives back, and the words that do it."
    + "\n\n" + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(cli_concept.app, name="concept")
app.command(epilog=cli_verify.EXIT_CODES)(cli_verify.verify)


def _detection(seeds: int, steps: int, batch_size: int | None) -> "DetectionConfig":
    from .shared.detection import DetectionConfig

    return DetectionConfig(seeds=tuple(range(seeds)), steps=steps, batch_size=batch_size)


def _subject(options: dict[str, Any]) -> "Subject":
    """Return the model that the options of a command name, which are its locals."""
    from .audit.subject import Subject

    names = ("model", "lora", "device", "dtype", "revision", "resolution")
    return Subject(config=options["model_config"], **{name: options[name] for name in names})


def _audit_config(options: dict[str, Any], **settings: Any) -> "AuditConfig":
    """Return the settings of an audit that the options of a command name, which are its locals."""
    from .audit.config import AuditConfig

    named = {field.name: options[field.name] for field in fields(AuditConfig)
             if field.name in options}  # fmt: skip
    return AuditConfig(**named | {"prompts": tuple(options["prompts"] or ())} | settings)


@app.command(epilog=EXIT_CODES)
def audit(
    model: Model = "demo",
    prompts: Prompts = None,
    lora: Lora = None,
    controls: Controls = "",
    calibration: CalibrationFile = None,
    force: Force = False,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("unmemorize-audit"),
    overwrite: Annotated[
        bool, typer.Option(help="Replace another audit in the folder; the same one continues.")
    ] = False,
    seeds: Seeds = 4,
    steps: Steps = 1,
    false_positive_rate: Rate = 0.01,
    explain: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0,
            metavar="N",
            help="Flagged prompts that are explained, highest score first; default: all.",
        ),
    ] = None,
    images_per_prompt: Annotated[
        int, typer.Option(min=0, help="Images of each flagged prompt; 0: no images at all.")
    ] = 2,
    flagged_pictured: Annotated[
        int, typer.Option(min=0, help="Flagged prompts with images, highest score first.")
    ] = 24,
    sample: Annotated[int, typer.Option(min=0, help="Other prompts with one image each.")] = 8,
    generation_steps: Annotated[int, typer.Option(min=1, help="Sampling steps of an image.")] = 30,
    fast: Fast = False,
    images: Images = None,
    held_out: HeldOut = None,
    reserve: Reserve = 0.0,
    trigger: Trigger = None,
    epochs: Epochs = None,
    attack: Attack = True,
    include_images: IncludeImages = False,
    processes: Processes = 1,
    revision: Revision = None,
    model_config: ModelConfig = None,
    resolution: Resolution = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Audit a model: detect, explain, generate, compare, and write a report folder.

    Without MODEL the bundled demo is audited. With --lora and --images a LoRA and the folder it was
    trained on: are its images given back? Interrupted at any moment, the same command continues
    where it stopped; with other settings it asks for another folder.
    """
    if cli_lora.asked_for(locals()):
        cli_lora.audit_lora(locals())
    with answering(as_json=as_json, debug=debug):
        from .audit.run import run_audit

        config = _audit_config(
            locals(), sequential=fast, detection=_detection(seeds, steps, batch_size)
        )
        result = run_audit(config, bar)
    if as_json:
        from .audit.answers import audit_document

        print_json(audit_document(result))
    else:
        from .audit.answers import audit_table, audit_verdict

        print_table(*audit_table(result))
        typer.echo(audit_verdict(result))
    raise typer.Exit(FOUND if result.flagged else NOTHING_FOUND)


@app.command(epilog=EXIT_CODES)
def detect(
    model: Model = "demo",
    prompts: Prompts = None,
    prompt: Texts = None,
    lora: Lora = None,
    calibration: CalibrationFile = None,
    force: Force = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write JSON lines there; then an interrupted run continues."),
    ] = None,
    seeds: Seeds = 4,
    steps: Steps = 1,
    fast: Fast = False,
    revision: Revision = None,
    model_config: ModelConfig = None,
    resolution: Resolution = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score prompts. A verdict needs --calibration; without one there are only numbers."""
    with answering(as_json=as_json, debug=debug):
        from .audit.parts import score_prompts

        rows = score_prompts(
            _subject(locals()), files=prompts or (), texts=prompt or (),
            config=_detection(seeds, steps, batch_size), calibration=calibration, force=force,
            sequential=fast, output=output, bars=bar,
        )  # fmt: skip
    found = any(row["memorized"] for row in rows)
    if as_json:
        print_json({"schema_version": 1, "results": rows})
    else:
        from .audit.answers import scores_table

        print_table(*scores_table(rows))
    raise typer.Exit(FOUND if found else NOTHING_FOUND)


@app.command()
def explain(
    model: Model = "demo",
    prompts: Prompts = None,
    prompt: Texts = None,
    lora: Lora = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the coloured prompts, PNG and HTML."),
    ] = None,
    seeds: Seeds = 1,
    steps: Steps = 1,
    revision: Revision = None,
    model_config: ModelConfig = None,
    resolution: Resolution = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which words of a prompt carry its score, and what happens without them."""
    with answering(as_json=as_json, debug=debug):
        from .audit.parts import explain_prompts

        rows = explain_prompts(
            _subject(locals()), files=prompts or (), texts=prompt or (), seeds=seeds, steps=steps,
            output=output, bars=bar,
        )  # fmt: skip
    if as_json:
        print_json({"schema_version": 1, "results": rows})
        return
    from .audit.answers import words_table

    for row in rows:
        print_table(*words_table(row))


@app.command(epilog=EXIT_CODES)
def mitigate(
    model: Model = "demo",
    prompts: Prompts = None,
    prompt: Texts = None,
    lora: Lora = None,
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="embedding, delayed_guidance, …; repeatable; `all` compares all. "
            "Default: embedding."
        ),
    ] = None,
    gate: Annotated[
        str, typer.Option(help="calibrated (acts above the threshold only), always, never.")
    ] = "calibrated",
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt and method.")] = 4,
    advice: Annotated[bool, typer.Option(help="Also search for a better wording.")] = True,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also seek known training images of prompts above the threshold with optimised "
            "embeddings: are they still in the model?",
        ),
    ] = False,
    controls: Controls = "",
    calibration: CalibrationFile = None,
    force: Force = False,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("unmemorize-mitigation"),
    overwrite: Annotated[bool, typer.Option(help="Replace another job in the folder.")] = False,
    false_positive_rate: Rate = 0.01,
    generation_steps: Annotated[int, typer.Option(min=1, help="Sampling steps of an image.")] = 30,
    revision: Revision = None,
    model_config: ModelConfig = None,
    resolution: Resolution = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sample prompts as they are and mitigated, from the same seeds, and write a page of both.

    Without prompts, a few captions of the demo. Interrupted, the same command continues.
    """
    with answering(as_json=as_json, debug=debug):
        from .audit.mitigation import run_mitigation
        from .audit.trials import MitigationConfig

        config = MitigationConfig(
            audit=_audit_config(locals()), texts=tuple(prompt or ()), methods=tuple(method or ()),
            gate=gate, images=images, advise=advice, probe=probe,
        )  # fmt: skip
        result = run_mitigation(config, bar)
    if as_json:
        print_json(result.summary | {"output": str(output)})
    else:
        from .audit.mitigation_page import method_rows

        columns = ["method", "acted on", "copies", "time per image"]
        print_table("Same seeds, with and without", columns, method_rows(result))
        typer.echo(f"The page: {output / 'mitigation.html'}")
    raise typer.Exit(FOUND if result.summary["memorized"] else NOTHING_FOUND)


@app.command()
def calibrate(
    model: Model = "demo",
    lora: Lora = None,
    controls: Controls = "",
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("calibration.json"),
    false_positive_rate: Rate = 0.01,
    seeds: Seeds = 4,
    steps: Steps = 1,
    revision: Revision = None,
    model_config: ModelConfig = None,
    resolution: Resolution = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score ordinary prompts on a model and keep the threshold that follows from them."""
    with answering(as_json=as_json, debug=debug):
        from .audit.parts import make_calibration

        made = make_calibration(
            _subject(locals()), controls=controls, config=_detection(seeds, steps, batch_size),
            rate=false_positive_rate, output=output, bars=bar,
        )  # fmt: skip
    if as_json:
        print_json(made | {"output": str(output)})
    else:
        print_table(f"Calibration written to {output}", ["what", "value"], list(made.items()))


@app.command()
def demo(as_json: Json = False, debug: Debug = False) -> None:
    """Say where the demo model is, how large, and whether its files are the committed ones."""
    with answering(as_json=as_json, debug=debug):
        from .audit.parts import check_demo

        state = check_demo()
    print_json(state) if as_json else print_table("Demo model", ["what", "value"],
                                                  list(state.items()))  # fmt: skip
    raise typer.Exit(0 if state["intact"] else FAILED)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what is installed, which device there is, what is missing and what to type."""
    with answering(as_json=as_json, debug=debug):
        from .shared.doctor import examine

        state = examine()
    if as_json:
        print_json(state)
    else:
        for title in ("machine", "packages"):
            print_table(title.capitalize(), ["what", "found"], list(state[title].items()))
        for missing in state["missing"]:
            typer.echo(f"Missing for {missing['purpose']}:\n    {missing['type']}")
    raise typer.Exit(0 if state["can_audit"] else FAILED)


def main() -> None:
    """Run the command line; also where Ctrl-C comes before a command has started."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
