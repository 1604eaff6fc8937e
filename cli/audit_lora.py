"""`unmemorize audit MODEL --lora FILE --images FOLDER`: a LoRA before it is published."""

from typing import TYPE_CHECKING, Any, NoReturn

import typer

from .options import detection_config
from .terminal import FAILED, FOUND, NOTHING_FOUND, answering, bar, print_json, print_table

if TYPE_CHECKING:
    from ..audit.lora.config import LoraAuditConfig

OF_LORA = {"held_out": None, "reserve": 0.0, "trigger": None, "epochs": None, "attack": True,
           "include_images": False, "processes": 1}  # fmt: skip
"""Options that mean nothing without `--images`, and their defaults."""
OF_PROMPTS = {"prompts": None, "controls": "", "calibration": None, "force": False, "fast": False,
              "explain": None, "false_positive_rate": 0.01, "flagged_pictured": 24,
              "sample": 8}  # fmt: skip
"""Options that mean nothing with it, and their defaults."""


def asked_for(options: dict[str, Any]) -> bool:
    """Return whether the options of `audit` ask about a LoRA and its training folder.

    Raises:
        typer.BadParameter: Options of both kinds of audit, or one without what it belongs to.
    """
    others = OF_PROMPTS if options["images"] else OF_LORA
    given = [name for name, default in others.items() if options[name] != default]
    if given:
        goes = "does not go with" if options["images"] else "needs"
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} {goes} --images.")
    if options["images"] and not options["lora"]:
        raise typer.BadParameter("--images needs --lora, the file that was trained on them.")
    return bool(options["images"])


def audit_lora(options: dict[str, Any]) -> NoReturn:
    """Run the audit that the options ask for, print what was found, and exit."""
    with answering(as_json=options["as_json"], debug=options["debug"]):
        from ..audit.lora.run import run_lora_audit

        audit = run_lora_audit(
            _config(options), bar, lambda sentence: typer.echo(sentence, err=True)
        )
    if options["as_json"]:
        from ..audit.lora.document import to_document

        print_json(to_document(audit) | {"output": str(audit.folder)})
    else:
        from ..audit.lora.answers import audit_table, audit_verdict

        print_table(*audit_table(audit))
        typer.echo(audit_verdict(audit))
    if not audit.positive_control.works:
        raise typer.Exit(FAILED)
    back = any(verdict.verdict == "verbatim" for verdict in audit.verdicts)
    raise typer.Exit(FOUND if back else NOTHING_FOUND)


def _config(options: dict[str, Any]) -> "LoraAuditConfig":
    """Return the settings that the options name."""
    from ..audit.lora.config import LoraAuditConfig
    from ..audit.model.config import AuditConfig

    same = (
        "lora", "images", "model", "revision", "model_config", "resolution", "held_out", "reserve",
        "trigger", "generation_steps", "processes", "include_images", "output", "overwrite",
        "device", "dtype",
    )  # fmt: skip
    named = {name: options[name] for name in same}
    if named["output"] == AuditConfig.output:  # another kind of audit, another folder
        named["output"] = LoraAuditConfig.output
    if not options["attack"]:
        named["attack_images"] = 0
    if options["batch_size"]:
        named["batch_size"] = options["batch_size"]
    return LoraAuditConfig(
        **named, images_per_prompt=max(1, options["images_per_prompt"]),
        epochs=tuple(options["epochs"] or ()),
        detection=detection_config(options["seeds"], options["steps"]),
    )  # fmt: skip
