"""What two images are compared by where the extra `sscd` is installed."""

from ...shared.copies.features import Features
from ...shared.copies.neighbours import Bounds


def sscd_features() -> Features:
    """Return SSCD, which knows an image again when it was cropped, recoloured or mirrored.

    Raises:
        ImportError: The extra `sscd` is not installed.
    """
    from .sscd import Sscd

    return Features(
        name="SSCD (distilled): cosine of the embeddings",
        rows=Sscd().embed,
        similarity=lambda distance: 1 - distance**2 / 2,  # of unit vectors
        bounds=Bounds(own_factor=0.8, ratio=0.9),  # distances differ little in many dimensions
    )
