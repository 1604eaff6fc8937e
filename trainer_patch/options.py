"""The options that every trainer gets: on the command line, in TOML, and as `key=value` strings."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..shared.training.concept.concept import parse_concepts
from ..shared.training.filter.filter import Action
from ..shared.training.settings import (
    FilterSettings,
    ProjectionSettings,
    ProtectionSettings,
    SubtractedConcept,
    SubtractionSettings,
)

PREFIXES = ("subtract_", "project_", "mem_")
"""How all of the names begin."""
ALONE = ("project_layers", "project_regions", "mem_warn", "mem_stop")
SWITCHES = ("project_regions", "project_force", "mem_warn", "mem_stop")
"""What goes without the concept's names, and without a threshold."""
NEEDED = (("subtract_concepts",), ("project_concepts",), ("mem_filter", "mem_warn", "mem_stop"))
"""By prefix, the options of which one is needed for the others."""
CHOSEN = ("named", "all")
"""Values of --subtract_samples that are no file."""
FILES = (".safetensors", ".txt")
"""How a value of --project_concepts ends that is a file's name."""
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class OptionError(ValueError):
    """An option cannot be understood; the message says what to type."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, called `--name` on the command line and `name` elsewhere."""

    name: str
    help: str
    metavar: str | None = None
    """None for a switch."""


OPTIONS = (
    Option(
        name="subtract_concepts",
        metavar="FILE[,FILE]",
        help="teach everything of an image but these concepts: for samples that show one, the "
        "training's target loses what the concept's adapter adds to the base model's prediction. "
        "The .safetensors files that `unmemorize concept learn` made with the model that is "
        "trained. For LoRA of any kind and full fine-tuning; up to two more forward passes without "
        "gradient for such samples.",
    ),
    Option(
        name="subtract_samples",
        metavar="named|all|FILE",
        help="which samples show the concept: those whose captions name it, all, or the images in "
        "the list that `unmemorize concept find` writes (named). One for all concepts, or one for "
        "each, joined by commas.",
    ),
    Option(
        name="subtract_gain",
        metavar="GAIN",
        help="how many times what the adapter adds is subtracted (1); in long trainings 1.3 "
        "leaves less of the concept and a little less of the rest",
    ),
    Option(
        name="project_concepts",
        metavar="CONCEPTS",
        help="keep the LoRA's text side off these concepts, exactly. Names and synonyms, an arrow, "
        'and a neutral word for the same kind of thing: "mickey mouse, mickey -> a character"; '
        "several concepts are joined by a semicolon. Or a .txt file with one concept a line, or "
        "the .safetensors file of a saved subspace. Other layers can still learn the look, and "
        "what the base model knows stays.",
    ),
    Option(
        name="project_layers",
        metavar="FILE",
        help="keep the LoRA's layers that read no text off the concept, each by a subspace of its "
        "own input: the .safetensors file that `unmemorize concept layers` measured on images with "
        "the model that is trained. Alone, or beside --project_concepts, which the layers that "
        "read text need.",
    ),
    Option(
        name="project_regions",
        help="where training images show the concept and their captions name it, teach what the "
        "model does without the LoRA. Else a LoRA can draw the concept although no prompt names "
        "it. Needs --project_layers; up to two more forward passes without gradient for such "
        "images.",
    ),
    Option(
        name="project_energy",
        metavar="SHARE",
        help="share of each concept's energy that its subspace covers, 0 to 1 (0.95)",
    ),
    Option(
        name="project_cap",
        metavar="N",
        help="most dimensions per concept (16; 32 for text states of width 2048 and more)",
    ),
    Option(
        name="project_force",
        help="train although the subspace fails its test on held-out sentences",
    ),
    Option(
        name="mem_filter",
        metavar="THRESHOLD",
        help="leave samples out of the loss while they are being memorized. x1.5: those whose "
        "captions move the prediction 1.5 times as far as the median caption, over several visits; "
        "q0.95: the highest 5 of 100 visits in each range of timesteps; 0.05: from this RMS "
        "magnitude on; inf only records. One more forward pass without gradient in each step.",
    ),
    Option(
        name="mem_filter_action",
        metavar="|".join(get_args(Action)),
        help="what happens to such a sample: left out of the loss, weighed down to threshold / "
        "score, or only logged (drop)",
    ),
    Option(
        name="mem_filter_recall",
        metavar="N",
        help="cheaper filter: measure a sample on one of N visits at least, on the others only "
        "where the decision is open, and expect its score from earlier visits elsewhere (every "
        "visit is measured); 16 is a good number. Some decisions will differ.",
    ),
    Option(
        name="mem_filter_report",
        metavar="FILE",
        help="ranked list of the most memorized samples, .json (next to the LoRA); a .txt to read "
        "and every decision as .jsonl stand beside it",
    ),
    Option(
        name="mem_warn",
        help="say in the progress bar and the log from when on which images are being memorized, "
        "and write the ranked list at every saving. Against what the model does with the same "
        "images without the LoRA: two more forward passes without gradient on the first 6 visits "
        "of each image. Alone it only records. Needs captions that differ.",
    ),
    Option(
        name="mem_stop",
        help="--mem_warn, and end the training at the first saved file with more memorized images "
        "than chance explains; the log names the last one before it. Save every epoch.",
    ),
)
NAMES = tuple(option.name for option in OPTIONS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a trainer's parser; `settings_from(vars(args))` reads them."""
    group = parser.add_argument_group("unmemorize")
    for option in OPTIONS:
        form = {"action": "store_true"} if option.metavar is None else {"metavar": option.metavar}
        # Strings: the same text means the same on the command line, in TOML and as key=value.
        group.add_argument(f"--{option.name}", help=option.help, **form)


def settings_from(values: Mapping[str, Any]) -> ProtectionSettings:
    """Return what the options request.

    Args:
        values: By name; other names are ignored. Strings, or what TOML has: numbers and booleans.
            None, an empty string and False are not given.

    Raises:
        OptionError: A value cannot be understood, or options do not go together.
    """
    texts = {
        name: str(values[name]).strip()
        for name in NAMES
        if values.get(name) is not None and values[name] is not False
    }
    given = {name: text for name, text in texts.items() if text}
    off = [name for name in SWITCHES if name in given and not _switch(given, name)]
    given = {name: text for name, text in given.items() if name not in off}
    for prefix, needed in zip(PREFIXES, NEEDED, strict=True):
        idle = [name for name in given if name.startswith(prefix) and name not in ALONE]
        if idle and not given.keys() & set(needed):
            raise OptionError(f"--{idle[0]} does nothing without --{needed[0]}.")
    if _switch(given, "project_regions") and "project_layers" not in given:
        raise OptionError(
            "--project_regions needs --project_layers: the file says where images show the concept."
        )
    try:
        return ProtectionSettings(
            projection=_projection(given), filter=_filter(given), subtraction=_subtraction(given)
        )
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(f"{error} (from {', '.join(f'--{name}' for name in given)})") from error


def _projection(given: Mapping[str, str]) -> ProjectionSettings | None:
    text, layers = given.get("project_concepts", ""), given.get("project_layers")
    if not text and layers is None:
        return None
    saved = text.endswith(".safetensors")
    for name in ("project_concepts",) * text.endswith(FILES) + ("project_layers",) * bool(layers):
        if not Path(given[name]).is_file():
            raise OptionError(f"--{name}: there is no file {given[name]}.")
    if text.endswith(".txt"):
        text = "; ".join(Path(text).read_text("utf-8").splitlines())
    if saved and (idle := {"project_energy", "project_cap", "project_force"} & given.keys()):
        raise OptionError(f"--{min(idle)} does nothing to a subspace that is already built.")
    return ProjectionSettings(
        concepts=() if saved else parse_concepts(text),
        file=Path(text) if saved else None,
        layers=Path(layers) if layers is not None else None,
        regions=_switch(given, "project_regions"),
        energy=_number(given, "project_energy", float, ProjectionSettings.energy),
        cap=_number(given, "project_cap", int, None),
        force=_switch(given, "project_force"),
    )


def _subtraction(given: Mapping[str, str]) -> SubtractionSettings | None:
    if "subtract_concepts" not in given:
        return None
    files = [Path(name.strip()) for name in given["subtract_concepts"].split(",")]
    samples = [each.strip() for each in given.get("subtract_samples", CHOSEN[0]).split(",")]
    if len(samples) not in (1, len(files)):
        raise OptionError(
            f"--subtract_samples holds {len(samples)} choices for {len(files)} concepts: give one "
            "for all, or one for each, joined by commas."
        )
    return SubtractionSettings(
        concepts=tuple(map(_subtracted, files, samples * (len(files) // len(samples)))),
        gain=_number(given, "subtract_gain", float, SubtractionSettings.gain),
    )


def _subtracted(file: Path, samples: str) -> SubtractedConcept:
    if not file.is_file():
        raise OptionError(
            f"--subtract_concepts: there is no file {file}. Make one with: unmemorize concept learn"
        )
    if samples in CHOSEN:
        return SubtractedConcept(file=file, samples=samples)
    if not Path(samples).is_file():
        raise OptionError(
            f"--subtract_samples is {', '.join(CHOSEN)} or a list's file, and there is no file "
            f"{samples}."
        )
    return SubtractedConcept(file=file, samples=samples, listed=_listed(Path(samples)))


def _listed(path: Path) -> frozenset[str]:
    """Return the absolute names of the images in a list of one a line."""
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise OptionError(f"--subtract_samples: {path} lists no image.")
    return frozenset(str((path.parent / name).resolve()) for name in names)


def _filter(given: Mapping[str, str]) -> FilterSettings | None:
    warn, stop = (_switch(given, name) for name in ("mem_warn", "mem_stop"))
    text = given.get("mem_filter", "inf" if warn or stop else "off")
    if text.lower() in OFF and text != "0":
        if warn or stop:
            name = "mem_stop" if stop else "mem_warn"
            raise OptionError(f"--{name} does nothing with mem_filter {text}: leave that out.")
        return None
    unit = {"q": "quantile", "x": "ratio"}.get(text[0].lower())
    try:
        number = float(text[1:] if unit else text)
    except ValueError as error:
        raise OptionError(f"--mem_filter cannot be {text!r}: see --help.") from error
    action = given.get("mem_filter_action", FilterSettings.action)
    if action not in get_args(Action):
        raise OptionError(f"--mem_filter_action is one of {get_args(Action)}, got {action!r}.")
    report = given.get("mem_filter_report")
    return FilterSettings(
        **{unit or "limit": number},
        action=action,
        recall=_number(given, "mem_filter_recall", int, None),
        warn=warn,
        stop=stop,
        report=Path(f"{report.removesuffix('.json')}.json") if report else None,
    )


def _number(
    given: Mapping[str, str], name: str, parse: Callable[[str], Any], default: float | None
) -> Any:
    """Return the number of an option."""
    try:
        return parse(given[name]) if name in given else default
    except ValueError as error:
        raise OptionError(f"--{name} cannot be {given[name]!r}: see --help.") from error


def _switch(given: Mapping[str, str], name: str) -> bool:
    """Return whether a switch is on."""
    text = given.get(name, "off").lower()
    if text not in ON + OFF:
        raise OptionError(f"--{name} must be true or false, got {given[name]!r}.")
    return text in ON
