"""What the deciders of `configs.py` share, in any Python: decisions, and families by one name."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

NAMES = {
    "STABLE_DIFFUSION_15": "sd1", "STABLE_DIFFUSION_20_INPAINTING": "sd2",
    "STABLE_DIFFUSION_21": "sd2", "STABLE_DIFFUSION_XL_10_BASE": "sdxl",
    "STABLE_DIFFUSION_XL_10_BASE_INPAINTING": "sdxl", "STABLE_DIFFUSION_3": "sd3",
    "STABLE_DIFFUSION_35": "sd3", "FLUX_DEV_1": "flux", "FLUX_2": "flux2", "CHROMA_1": "chroma",
    "QWEN": "qwen_image", "Z_IMAGE": "z_image", "PIXART_SIGMA": "pixart_sigma", "SANA": "sana",
    "HI_DREAM_FULL": "hidream_image", "ERNIE": "ernie_image", "HUNYUAN_VIDEO": "hunyuan_video",
    "sd1x": "sd1", "sd2x": "sd2", "hidream": "hidream_image", "lumina": "lumina2",
    "zimage": "z_image", "z-image": "z_image", "z-image-turbo": "z_image",
    "kontext": "flux_kontext", "auraflow": "aura_flow", "ernie": "ernie_image",
    "pixart": "pixart_sigma", "flux_2": "flux2", "hv": "hunyuan_video", "qwen": "qwen_image",
    "wan21": "wan", "wan22_14b": "wan",
    "flex": "flux", "ltxvideo": "ltx", "hunyuanvideo": "hunyuan_video",
}  # fmt: skip
"""What trainers call a family, and what docs/models.md calls it."""
WORDS = "zorp, zorp sign -> a sign"


@dataclass(frozen=True)
class Decision:
    """What happens at a training's start."""

    source: str
    name: str
    family: str
    filter: str | None
    """Why it is refused; None where it works."""
    projection: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", NAMES.get(self.family, self.family))

    def tell(self) -> None:
        """Print it for `configs.py`."""
        print(json.dumps(asdict(self)), flush=True)


def known_families() -> set[str]:
    """Return the families of docs/models.md."""
    page = Path(__file__).resolve().parents[2] / "docs" / "models.md"
    return set(re.findall(r"^\| (\w+) \|", page.read_text("utf-8"), re.M)) - {"family"}


def reason(start: Callable[[], object], refusals: tuple[type[BaseException], ...]) -> str | None:
    """Return why a training is refused; None where it starts."""
    try:
        start()
    except refusals as error:
        return " ".join(str(error).split())
    return None
