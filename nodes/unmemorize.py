"""Node: a prompt made harmless, only where the check says that it is memorized."""

from typing import Any

from comfy_api.latest import io, ui

from ..shared.drawing.prompt_chart import draw_prompt_chart
from ..shared.score.calibration import Calibration
from .check import with_clip
from .engine.unmemorizing import look, unmemorize_prompt
from .inputs import CalibrationSocket, schema, to_image
from .panel import CHANGED, panel, verdict_state

NO_VAE = "To show images before and after, connect the model's VAE to `vae`, or turn off `show_me`."


class Unmemorize(io.ComfyNode):
    """Changes the embedding of a memorized prompt, and nothing else."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizePrompt",
            search_aliases=[
                "unmemorize", "memorisation", "copyright", "duplicate", "overfit", "plagiarism",
                "fix memorization",
            ],
            is_output_node=True,
            enable_expand=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent"),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05,
                               display_mode=io.NumberDisplay.slider),
                io.Boolean.Input("show_me", default=False),
                io.Conditioning.Input("negative", optional=True),
                io.Clip.Input("clip", optional=True),
                io.Vae.Input("vae", optional=True),
                CalibrationSocket.Input("calibration", optional=True),
            ],
            outputs=[
                io.Model.Output("unchanged"),
                io.Conditioning.Output("harmless"),
                io.String.Output("report"),
                io.Boolean.Output("acted"),
                io.Image.Output("shown"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent: dict,
        strength: float,
        show_me: bool,
        negative: list | None = None,
        clip: Any = None,
        vae: Any = None,
        calibration: Calibration | None = None,
    ) -> io.NodeOutput:
        if show_me and vae is None:
            raise ValueError(NO_VAE)
        if clip is None:
            return with_clip(cls)
        done = unmemorize_prompt(model, clip, positive, negative, latent, strength, calibration)
        check, report = done.after or done.before, str(done)
        fits, judge = not check.misfit, check.calibration
        images = to_image(draw_prompt_chart(
            done.headline, check.scores, check.flags,
            judge.sorted_scores.numpy() if fits else [], judge.threshold if fits else None,
        ))  # fmt: skip
        state, badge = (
            (CHANGED, "changed")
            if done.after
            else verdict_state(done.before.flags if fits else [None])
        )
        pair = None
        if show_me and done.after:
            images = look(model, vae, (positive, done.positive), done.against, latent)
            pair = images[:1], images[1:]
        shown = ui.PreviewImage(images, cls=cls).as_dict() | {"text": [report]}
        return io.NodeOutput(
            model, done.positive, report, done.after is not None, images,
            ui=shown | panel(cls, state, badge, report, pair=pair),
        )  # fmt: skip
