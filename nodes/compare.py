"""Node: whether images are copies of those in a folder."""

import torch
from comfy_api.latest import io

from ..shared.files.images import read_image
from .engine.model_identity import digest
from .engine.references import compare, images_below
from .inputs import schema, to_image
from .panel import MEMORIZED, NO_VERDICT, ORDINARY, panel

TITLE = "Compare References"


class CompareWithReferences(io.ComfyNode):
    """The copy rule on a batch of images, and the nearest image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeCompare",
            search_aliases=[
                "unmemorize compare", "copyright", "duplicate", "plagiarism", "overfit",
                "image similarity", "training images", "copy detection",
            ],
            is_output_node=True,
            inputs=[io.Image.Input("images"), io.String.Input("folder", default="")],
            outputs=[
                io.String.Output("verdict"),
                io.Boolean.Output("copied"),
                io.Image.Output("nearest"),
                io.Float.Output("similarity"),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", images: object = None) -> str:
        """Return what changes when a file of the folder does."""
        try:
            files = images_below(folder, TITLE)
        except ValueError:  # told when the node runs
            return ""
        return digest([[str(path), path.stat().st_mtime_ns] for path in files])

    @classmethod
    def execute(cls, images: torch.Tensor, folder: str) -> io.NodeOutput:
        result = compare(images, folder, TITLE)
        nearest = to_image(read_image(result.paths[result.closest.index]))
        told = result.closest.limit is not None
        state = MEMORIZED if result.copied else ORDINARY if told else NO_VERDICT
        closest = min(range(len(result.found)), key=lambda i: result.found[i] is not result.closest)
        shown = panel(
            cls, state, result.headline, str(result),
            pair=(images[closest : closest + 1, ..., :3], nearest),
        )  # fmt: skip
        return io.NodeOutput(
            str(result), result.copied, nearest, result.similarity,
            ui={"text": [str(result)]} | shown,
        )  # fmt: skip
