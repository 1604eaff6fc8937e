"""Control prompts: ordinary captions that no model should have memorized.

Two bundled lists, written for this project: of no famous work, person, character or brand, no
caption of a known data set. Whether a model was trained on something alike cannot be excluded;
controls from the model's own domain, held out from its training, are better where they exist.
"""

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "controls"
CONTROLS = ("photographs", "art")
"""Names of the bundled lists."""


def load_controls(name: str) -> list[str]:
    """Return a bundled list of control prompts, at least 250 different ones.

    Args:
        name: "photographs" (as under photos of everyday life) or "art" (paintings, prints,
            illustrations, renderings).

    Raises:
        ValueError: There is no such list.
    """
    if name not in CONTROLS:
        raise ValueError(
            f"There is no list of controls {name!r}; choose one of {', '.join(CONTROLS)}, "
            "or give a file with your own prompts, one a line."
        )
    lines = (FOLDER / f"{name}.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line]


def spread(texts: Sequence[str], number: int) -> list[str]:
    """Return so many texts from all over a list, whose neighbours are alike."""
    return [texts[index * len(texts) // number] for index in range(number)]
