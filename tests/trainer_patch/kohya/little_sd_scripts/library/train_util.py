"""What the launcher and the saving look for here in sd-scripts."""

import argparse
import json


def read_config_from_file(args, parser):
    """Return the arguments with those of a file below them; keys no option has are kept."""
    if not args.config_file:
        return args
    with open(args.config_file, encoding="utf-8") as file:
        pairs = (line.split(" = ", 1) for line in file.read().splitlines())
        known = argparse.Namespace(**{key: json.loads(value) for key, value in pairs})
    return parser.parse_args(namespace=known)
