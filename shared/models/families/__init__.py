"""How each family of pipelines reads prompts and calls its network, one file each."""

from typing import Any

from .family import Family
from .flux import Flux
from .images import IMAGES
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .stable_diffusion_3 import StableDiffusion3
from .undeclared import undeclared
from .videos import VIDEOS

_DECLARED = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, *IMAGES, *VIDEOS)

FAMILIES: dict[str, type[Family]] = {
    name: family for family in _DECLARED for name in family.pipelines
}
"""By the name of diffusers' pipeline, so that diffusers need not be imported."""


def family_of(pipeline: Any) -> type[Family]:
    """Return the family of a pipeline, or of the one it derives from.

    A pipeline of none of them is tried by running one step of it, and checked.

    Raises:
        ValueError: It is refused; says why.
    """
    for base in type(pipeline).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    return undeclared(pipeline, ", ".join(FAMILIES))
