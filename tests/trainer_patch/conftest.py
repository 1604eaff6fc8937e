"""Lets the tests of trainers import what they share, and the tiny pipelines of all families."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
