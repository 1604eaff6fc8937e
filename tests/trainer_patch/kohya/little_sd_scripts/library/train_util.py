"""What the launcher and the saving look for here in sd-scripts."""

import argparse

import toml


def read_config_from_file(args, parser):
    """Return the arguments with those of a file below them; keys no option has are kept."""
    if not args.config_file:
        return args
    held = {}
    for key, value in toml.load(args.config_file).items():
        held |= value if isinstance(value, dict) else {key: value}
    args = parser.parse_args(namespace=argparse.Namespace(**held))
    args.config_file = args.config_file.removesuffix(".toml")
    return args
