"""What a node shows on itself after it ran; web/panel.js draws it.

Without that file, and for programs that post API prompts, nodes give the same outputs.
"""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..shared.arrays import Float, Tensor

KEY = "unmemorize"
"""Of the result in what a node sends to the page."""
MEMORIZED, ORDINARY, NO_VERDICT, CHANGED, PLAIN = (
    "memorized", "ordinary", "no verdict", "changed", "",
)  # fmt: skip
"""States of a node: each has its colour on the page."""


def panel(
    cls: type[io.ComfyNode],
    state: str,
    badge: str,
    text: str,
    *,
    words: Sequence[tuple[str, float]] = (),
    pair: tuple[Tensor, Tensor] | None = None,
    overlay: tuple[Tensor, Tensor] | None = None,
) -> dict[str, list]:
    """Return the `ui` part of a node's output that the page draws.

    Args:
        cls: The node, whose workflow goes into the metadata of the images.
        state: One of the states above.
        badge: A few words for the title.
        text: The report; its first line is shown, the rest unfolds.
        words: Of a prompt, in order, each with its significance, 0..1.
        pair: [batch height width 3] images before and after, 0..1, compared with a slider.
        overlay: [batch height width 3] images, and the [1 height width] mask over each; 0..1.
    """
    shown: dict[str, Any] = {"state": state, "badge": badge, "text": text}
    if words:
        shown["words"] = [[word, round(share, 4)] for word, share in words]
    if pair:
        shown["before"], shown["after"] = (_saved(images, cls) for images in pair)
    if overlay:
        images, mask = overlay
        shown["images"] = _saved(images, cls)
        shown["mask"] = _saved(mask[..., None].expand(-1, -1, -1, 3), cls)[0]
    return {KEY: [shown]}


def verdict_state(flags: Sequence[bool | None]) -> tuple[str, str]:
    """Return the state and the badge of verdicts on images or prompts; None is no verdict."""
    hits = sum(map(bool, flags))
    if hits:
        return MEMORIZED, f"{hits} of {len(flags)} memorized" if len(flags) > 1 else "memorized"
    if any(flag is None for flag in flags) or not flags:
        return NO_VERDICT, "no verdict"
    return ORDINARY, "not flagged"


def _saved(images: Float[Tensor, "... height width 3"], cls: type[io.ComfyNode]) -> list[dict]:
    """Write images to ComfyUI's temporary folder and return where the page finds them."""
    flat = images.reshape(-1, *images.shape[-3:])  # some decoders keep an axis of frames
    return [dict(one) for one in ui.PreviewImage(flat, cls=cls).values]
