"""What a command and its files request of this package, through either door."""

import argparse
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...shared.training.settings import ProtectionSettings
from ..options import NAMES, OptionError, settings_from
from ..typed import refuse_hidden, refuse_nothing, refuse_unknown

MODULE = __package__
"""Name of our network module."""
BASE_MODULE = "base_module"
"""Network argument: the module that ours stands in front of."""
PLACE = "to the top of the file of --config_file, or into --network_args"
PLAIN = {
    "NetworkTrainer": "networks.lora",
    "SdxlNetworkTrainer": "networks.lora",
    "Sd3NetworkTrainer": "networks.lora_sd3",
    "FluxNetworkTrainer": "networks.lora_flux",
    "LuminaNetworkTrainer": "networks.lora_lumina",
    "AnimaNetworkTrainer": "networks.lora_anima",
    "HunyuanImageNetworkTrainer": "networks.lora_hunyuan_image",
}
"""By trainer class, which module makes the network when none is named."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Read once, from the arguments of a training and the file that they come from."""

    settings: ProtectionSettings
    base_module: str
    """Makes the network."""
    network_args: Mapping[str, str]
    """Those of the base module, without ours."""
    empty: list[Any] = field(default_factory=list)
    """The encoded empty prompt, where a trainer throws its text encoders away before it makes its
    network; see `data.keeping_empty`."""


def read_request(args: argparse.Namespace, trainer: type) -> Request:
    """Return what a training's arguments request.

    Options may be keys of `--config_file`, arguments of their own, or pairs of `--network_args`,
    of which the last counts first. A window such as kohya_ss' writes `network_module` and
    `network_args` into that file, and a user can only replace them by arguments: where ours is the
    module of the command and the file names another, that one is the base and keeps its pairs.

    Args:
        args: As sd-scripts has them once it has read the file.
        trainer: Class of the trainer.

    Raises:
        OptionError: There is no such option, one stands where nobody reads it, or none is there.
    """
    file = _file(args)
    line = _pairs(args.network_args)
    window = _pairs(file.get("network_args"))
    keys = vars(args)
    refuse_unknown([*window, *line])
    refuse_unknown(keys, prefixes=())
    refuse_hidden({key: keys[key] for key in keys if key != "network_args"}, PLACE)
    given = {name: (window | line).get(name, keys.get(name)) for name in NAMES}
    refuse_nothing(given, MODULE, "--network_args mem_filter=x1.5")
    named = line.get(BASE_MODULE) or window.get(BASE_MODULE) or keys.get(BASE_MODULE)
    module = args.network_module if args.network_module != MODULE else None
    of_window = file.get("network_module")
    base = named or module or (of_window if of_window != MODULE else None)
    own = line if module or base != of_window else window | line
    return Request(
        settings=settings_from(given),
        base_module=base or PLAIN.get(trainer.__name__, PLAIN["NetworkTrainer"]),
        network_args={k: v for k, v in own.items() if k not in (*NAMES, BASE_MODULE)},
    )


def _pairs(texts: Iterable[str] | None) -> dict[str, str]:
    """Return the pairs of --network_args by key."""
    split = [text.partition("=") for text in texts or ()]
    if wrong := [key for key, sign, _ in split if not sign]:
        raise OptionError(
            f"--network_args: `{wrong[0]}` is no key=value. A value with blanks stands in quotes "
            "with its key; where a window takes quotes off, put the value into a file."
        )
    return {key: value for key, _, value in split}


def _file(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of --config_file by key, without its sections, as sd-scripts reads it."""
    if not args.config_file:
        return {}
    path = Path(f"{args.config_file.removesuffix('.toml')}.toml")
    if not path.is_file():
        raise OptionError(f"--config_file: there is no {path}. Type its whole name, with .toml.")
    # sd-scripts' own reader: that of Python's library begins with 3.11.
    held = importlib.import_module("toml").loads(path.read_text("utf-8"))
    values = {}
    for key, value in held.items():
        values |= value if isinstance(value, dict) else {key: value}
    return values
