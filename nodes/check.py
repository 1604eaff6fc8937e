"""Node: whether a prompt is memorized, with nothing else to set up."""

from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import GraphBuilder

from ..shared.drawing.prompt_chart import draw_prompt_chart
from ..shared.score.calibration import Calibration
from .engine.checking import check_prompt
from .engine.prompt_graph import source_of
from .inputs import CalibrationSocket, schema, to_image
from .panel import panel, verdict_state

NO_CLIP = (
    "The text encoder of this prompt was not found: connect its CLIP to `clip`. Control prompts "
    "are encoded with it."
)


class MemorizationCheck(io.ComfyNode):
    """The verdict on a prompt; calibrates by itself on first use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeCheck",
            search_aliases=[
                "unmemorize check", "memorisation", "copyright", "duplicate", "overfit",
                "plagiarism", "training image",
            ],
            is_output_node=True,
            enable_expand=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent"),
                io.Conditioning.Input("negative", optional=True),
                io.Clip.Input("clip", optional=True),
                CalibrationSocket.Input("calibration", optional=True),
            ],
            outputs=[
                io.Model.Output("checked"),
                io.String.Output("verdict"),
                io.Boolean.Output("memorized"),
                io.Image.Output("chart"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent: dict,
        negative: list | None = None,
        clip: Any = None,
        calibration: Calibration | None = None,
    ) -> io.NodeOutput:
        if clip is None:
            return with_clip(cls)
        check = check_prompt(model, clip, positive, negative, latent, calibration)
        judge, fits = check.calibration, not check.misfit
        drawn = draw_prompt_chart(
            check.headline, check.scores, check.flags,
            judge.sorted_scores.numpy() if fits else [], judge.threshold if fits else None,
        )  # fmt: skip
        image, verdict = to_image(drawn), str(check)
        shown = ui.PreviewImage(image, cls=cls).as_dict() | {"text": [verdict]}
        shown |= panel(cls, *verdict_state(check.flags if fits else [None]), verdict)
        return io.NodeOutput(model, verdict, any(check.flags), image, ui=shown)


def with_clip(cls: type[io.ComfyNode]) -> io.NodeOutput:
    """Return the same node in its place, its CLIP connected to what encoded its prompt.

    Args:
        cls: A node with the inputs `positive` and `clip`, while it runs.

    Raises:
        ValueError: No CLIP leads to its prompt.
    """
    graph, own = cls.hidden.dynprompt, cls.hidden.unique_id
    clip = source_of(graph, own, "positive", "CLIP")
    if clip is None:
        raise ValueError(NO_CLIP)
    node, builder = graph.get_node(own), GraphBuilder()
    same = builder.node(node["class_type"], **node["inputs"] | {"clip": clip})
    outputs = range(len(cls.RETURN_TYPES))
    return io.NodeOutput(*map(same.out, outputs), expand=builder.finalize())
