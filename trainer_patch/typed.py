"""What a user typed for a trainer: commands, and keys that no option has."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .options import NAMES, PREFIXES, OptionError, add_options

NEAR = 0.85
"""From which likeness on (2 x common letters / all letters) a name is taken for an option's."""


def read_command(
    arguments: Sequence[str], *, start: str, host: str, scripts: str, known_by: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return our options of a launcher's command, and the script's own command.

    The folder of the script is importable afterwards, as Python makes it for a script.

    Args:
        arguments: As typed behind the launcher's module.
        start: What is typed in front of the script, the module included.
        host: Name of the trainer, whose folder is the current one.
        scripts: Which scripts can be run.
        known_by: A file in the trainer's folder.
    """
    parser = argparse.ArgumentParser(
        prog=start,
        usage="%(prog)s SCRIPT <the script's arguments> [options]",
        description=f"Run {scripts} of {host}, as it is, with these options added. To be typed in "
        f"the folder of {host}. The options may also stand in the configuration file.",
        epilog="SCRIPT --help shows the script's own arguments.",
        allow_abbrev=False,
        add_help=list(arguments[:1]) in ([], ["-h"], ["--help"]),
    )
    add_options(parser)
    options, rest = parser.parse_known_args(arguments)
    refuse_unknown(flags_of(rest), prefixes=())
    script = Path(rest[0]) if rest else None
    if script is None or not script.is_file() or not Path(known_by or script).is_file():
        parser.error(
            f"{Path.cwd()} is not the folder of {host}, or has no script {script or ''} in it. "
            f"Type: cd {host}, then the same again with {scripts} behind the module."
        )
    sys.path.insert(0, str(script.resolve().parent))
    return {name: value for name, value in vars(options).items() if value}, rest


def flags_of(arguments: Iterable[str]) -> list[str]:
    """Return the names of the options in a command."""
    return [each[2:].partition("=")[0] for each in arguments if each.startswith("--")]


def refuse_nothing(given: Mapping[str, Any], program: str, add: str) -> None:
    """Raise OptionError where none of the options is given: whoever names us wants something.

    Args:
        given: By name; an option that is off is given.
        program: What was named.
        add: What to type, for example.
    """
    if all(given.get(name) in (None, False, "") for name in NAMES):
        raise OptionError(
            f"{program} is asked for nothing, and nothing would be protected. Add an option, such "
            f"as {add}, or train without it."
        )


def refuse_unknown(names: Iterable[str], prefixes: tuple[str, ...] = PREFIXES) -> None:
    """Raise OptionError for the name of no option: a typing error.

    Where a host passes any key on, an option spelt wrongly would silently not be there.

    Args:
        names: Keys that the user typed.
        prefixes: Keys that begin with one of them are meant for us, and so are keys nearly like an
            option's; an empty one matches all, none leaves the second.
    """
    near = {name: _near(name) for name in names if name not in NAMES}
    unknown = [name for name, meant in near.items() if meant or name.startswith(prefixes)]
    if unknown:
        first = min(unknown)
        meant = f"type {near[first]}" if near[first] else f"there are {', '.join(NAMES)}"
        raise OptionError(f"`{first}` is not an option; {meant}.")


def refuse_hidden(values: Mapping[str, Any], place: str) -> None:
    """Raise OptionError for an option in a section, where nobody reads it.

    Args:
        values: Of a configuration. Options may be among its own keys; those of the mappings and
            lists in it may be none.
        place: Where the option should stand, for the message.
    """
    for section, within in values.items():
        for name in _keys(within):
            if name in NAMES or _near(name):
                raise OptionError(
                    f"`{name}` stands in `{section}`, where it is not read. Move it: {place}."
                )


def _keys(value: Any) -> Iterator[str]:
    """Yield the keys of all mappings in a value."""
    if isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _keys(each)


def _near(name: str) -> str | None:
    """Return the option whose name nearly is this."""
    plain = name.lower().lstrip("-").replace("-", "_")
    return next(iter(get_close_matches(plain, NAMES, n=1, cutoff=NEAR)), None)
