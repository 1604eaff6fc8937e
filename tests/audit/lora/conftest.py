"""Lets the tests of a LoRA's audit use the LoRAs of known truth and the sets of the benchmarks."""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)
