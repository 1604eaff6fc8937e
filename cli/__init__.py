"""The command line: audit, verify, detect, explain, mitigate, calibrate, concept, demo, doctor.

Everything heavy is imported inside the commands, so that help and usage errors come at once.
"""

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import audit as cli_audit
from . import concept as cli_concept
from . import mitigate as cli_mitigate
from . import verify as cli_verify
from .options import (
    Batch,
    CalibrationFile,
    Controls,
    Debug,
    Device,
    Dtype,
    Fast,
    Force,
    Json,
    Lora,
    Model,
    ModelConfig,
    OutputFile,
    Prompts,
    Rate,
    Resolution,
    Revision,
    Seeds,
    Steps,
    Texts,
    detection_config,
    subject_of,
)
from .terminal import FAILED, FOUND, NOTHING_FOUND, answering, bar, print_json, print_table

app = typer.Typer(
    help="Find training images that a text-to-image model gives back, and the words that do it."
    + "\n\n" + cli_audit.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(cli_concept.app, name="concept")
app.command(epilog=cli_verify.EXIT_CODES)(cli_verify.verify)
app.command(epilog=cli_audit.EXIT_CODES)(cli_audit.audit)


@app.command(epilog=cli_audit.EXIT_CODES)
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
        from ..audit.model.parts import score_prompts

        rows = score_prompts(
            subject_of(locals()), files=prompts or (), texts=prompt or (),
            config=detection_config(seeds, steps, batch_size), calibration=calibration, force=force,
            sequential=fast, output=output, bars=bar,
        )  # fmt: skip
    found = any(row["memorized"] for row in rows)
    if as_json:
        print_json({"schema_version": 1, "results": rows})
    else:
        from ..audit.model.answers import scores_table

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
        from ..audit.model.parts import explain_prompts

        rows = explain_prompts(
            subject_of(locals()), files=prompts or (), texts=prompt or (), seeds=seeds, steps=steps,
            output=output, bars=bar,
        )  # fmt: skip
    if as_json:
        print_json({"schema_version": 1, "results": rows})
        return
    from ..audit.model.answers import words_table

    for row in rows:
        print_table(*words_table(row))


# Help lists the commands in the order in which they are added.
app.command(epilog=cli_audit.EXIT_CODES)(cli_mitigate.mitigate)


@app.command()
def calibrate(
    model: Model = "demo",
    lora: Lora = None,
    controls: Controls = "",
    output: OutputFile = Path("calibration.json"),
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
        from ..audit.model.parts import make_calibration

        made = make_calibration(
            subject_of(locals()), controls=controls, rate=false_positive_rate, output=output,
            config=detection_config(seeds, steps, batch_size), bars=bar,
        )  # fmt: skip
    if as_json:
        print_json(made | {"output": str(output)})
    else:
        print_table(f"Calibration written to {output}", ["what", "value"], list(made.items()))


@app.command()
def demo(as_json: Json = False, debug: Debug = False) -> None:
    """Say where the demo model is, how large, and whether its files are the committed ones."""
    with answering(as_json=as_json, debug=debug):
        from ..demo import describe

        state = describe()
    print_json(state) if as_json else print_table("Demo model", ["what", "value"],
                                                  list(state.items()))  # fmt: skip
    raise typer.Exit(0 if state["intact"] else FAILED)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what is installed, which device there is, what is missing and what to type."""
    with answering(as_json=as_json, debug=debug):
        from ..shared.doctor import examine

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
