"""The official LoRA scripts of diffusers, unedited, with a concept projection and a filter.

Text-to-image and DreamBooth; SD 1, SD 2, SDXL, SD3 and Flux. In front of the usual command stands
`accelerate launch -m unmemorize.trainer_patch.diffusers`, behind it `--mem_filter x1.5` or
`--project_concepts "mickey mouse -> a character"`.
"""

import argparse
import runpy
import sys
from pathlib import Path

from ..hooks import ending_in_one_line
from ..options import add_options
from . import PROGRAM


def main() -> None:
    """Run a script with its own arguments and ours."""
    script, *arguments = sys.argv[1:] or ["--help"]
    if script in ("-h", "--help"):
        _help().print_help()
        return
    path = Path(script)
    if not path.is_file():
        sys.exit(
            f"There is no file {script}. The scripts are in examples/text_to_image and "
            "examples/dreambooth of the source code of diffusers; take those of the release that "
            f"is installed. Type: {PROGRAM} SCRIPT.py <its usual arguments>"
        )
    from .launch import Launch

    sys.argv = [script, *arguments]
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script
    with ending_in_one_line(), Launch().attached() as launch:
        runpy.run_path(script, run_name="__main__")
        launch.finish()


def _help() -> argparse.ArgumentParser:
    """Return a parser that only describes our options; each script parses the rest itself."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} SCRIPT.py <its usual arguments> [options]",
        description=__doc__.partition("\n")[0],
        epilog="SCRIPT.py --help lists them after the script's own.",
        add_help=False,
    )
    add_options(parser)
    return parser


if __name__ == "__main__":
    main()
