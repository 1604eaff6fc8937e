"""Lets the tests of benchmarks use the small networks of `tests/shared`."""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent.parent / "shared")
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)
