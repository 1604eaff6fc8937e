"""Lets the tests of the command line make the results that those of audits make."""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent.parent / "audit")
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)
