"""Two small real latent diffusion models that memorize, and the truth about them.

Importing this room reads nothing but paths; the duplicates in the training set were planted.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from .data import Caption

NAME = "demo"
"""As model: the bundled demo. As controls: its captions."""
MODEL = Path(__file__).parent / "model"
"""Diffusers folder that `StableDiffusionPipeline.from_pretrained` loads."""
FLOW = Path(__file__).parent / "flow"
"""What demo-flow does not share with the demo: its transformer and scheduler."""
BUNDLED = {NAME: MODEL, "demo-flow": FLOW}
"""Models by the name that stands for them wherever a MODEL is asked for, and their own files.

Both learnt the same captions and images. `locate` returns the folder that loads.
"""
IMAGES = Path(__file__).parent / "images"
"""Sheets of what the model was trained on."""


def locate(name: str) -> Path:
    """Return the diffusers folder of a bundled model; that of demo-flow is made when it is missing.

    Raises:
        ValueError: There is no bundled model of that name.
        ModelError: A file of it is missing.
    """
    if name not in BUNDLED:
        raise ValueError(f"`name` must be one of {', '.join(BUNDLED)}, got {name!r}.")
    if name == NAME:
        return MODEL
    from .assembly import complete

    return complete(FLOW, MODEL)


@cache
def captions() -> "tuple[Caption, ...]":
    """Return every caption with its group: verbatim, template, learnt or held_out."""
    from .data import load_captions

    return tuple(load_captions(MODEL / "captions.json"))


@cache
def controls() -> list[str]:
    """Return the captions set aside for calibration: of the held-out and of the learnt ones.

    Every other one of both, so that controls and audited captions are of the same mix: what the
    model knows from many drawings scores higher than what it never saw, and with fewer such
    controls more of it would be taken for memorized than the calibrated rate allows.
    Held-out captions that share half of their words with a repeated one ("open mailbox with raised
    flag" beside "open mailbox with lowered flag") are no ordinary prompts and are audited instead.
    """
    from ..shared.score.families import unlike

    texts: dict[str, list[str]] = {}
    for caption in captions():
        texts.setdefault(caption.group, []).append(caption.text)
    repeated = [*texts["verbatim"], *texts["template"]]
    return unlike(texts["held_out"], repeated)[::2] + texts["learnt"][::2]


def audited() -> "list[Caption]":
    """Return the captions an audit of the demo looks at: all but the controls."""
    aside = set(controls())
    return [c for c in captions() if c.text not in aside]


@cache
def training_images() -> "tuple[Image.Image, ...]":
    """Return every distinct training image as a thumbnail, as `data.build_renderings` orders."""
    from .data import THUMBNAIL, build_renderings, cut_sheet

    sheet = IMAGES / "training_thumbnails.webp"
    return tuple(cut_sheet(sheet, THUMBNAIL, len(build_renderings(list(captions())))))


@cache
def control_images() -> "tuple[Image.Image, ...]":
    """Return thumbnails of renderings like the training set's that were never trained on."""
    from .data import CONTROLS, THUMBNAIL, cut_sheet

    return tuple(cut_sheet(IMAGES / "control_thumbnails.webp", THUMBNAIL, CONTROLS))


def training_image(caption: str) -> "Image.Image | None":
    """Return the repeated image of a verbatim or template caption in full size, else None."""
    from .data import RESOLUTION, cut_sheet

    repeated = [c.text for c in captions() if c.group in ("verbatim", "template")]
    if caption not in repeated:
        return None
    images = cut_sheet(IMAGES / "repeated.webp", RESOLUTION, len(repeated))
    return images[repeated.index(caption)]


def verify() -> list[str]:
    """Return the files of the models whose sha256 is not the committed one, empty when all are."""
    damaged = []
    for folder in BUNDLED.values():
        expected = json.loads((folder / "sha256.json").read_text("utf-8"))
        damaged += [
            f"{folder.name}/{name}" for name, sha256 in expected.items()
            if not (folder / name).is_file()
            or hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256
        ]  # fmt: skip
    return damaged


def describe() -> dict[str, Any]:
    """Return where the models are, their sizes, the caption groups, and whether all is intact."""
    groups = [caption.group for caption in captions()]
    own, shared = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in (FLOW, MODEL)
    )
    damaged = verify()
    return {
        "path": str(MODEL),
        "megabytes": round(shared / 1e6, 1),
        "flow_path": str(FLOW if damaged else locate("demo-flow")),
        "flow_megabytes": round(own / 1e6, 1),
        **{name: groups.count(name) for name in dict.fromkeys(groups)},
        "controls": len(controls()),
        "damaged": damaged,
        "intact": not damaged,
    }
