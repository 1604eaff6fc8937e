"""How each family of pipelines reads prompts and calls its network, one file each."""

from typing import Any

from .family import Family
from .flux import Flux
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL

FAMILIES: dict[str, type[Family]] = {
    name: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
    for name in family.pipelines
}
"""By the name of diffusers' pipeline, so that diffusers need not be imported."""


def family_of(pipeline: Any) -> type[Family]:
    """Return the family of a pipeline, or of the one it derives from.

    Raises:
        ValueError: It is of none of them; names those there are.
    """
    for base in type(pipeline).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise ValueError(
        f"{type(pipeline).__name__} is not supported; expected one of {', '.join(FAMILIES)}. "
        "Load the text-to-image pipeline of this model."
    )
