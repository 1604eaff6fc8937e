"""Nodes: scores from ordinary sampling, and what they say."""

import logging
import math

from comfy_api.latest import io, ui

from ..shared.drawing.step_chart import draw_note, draw_step_chart
from ..shared.sampling.watched_runs import WatchRecord, guard_lines, judge, metadata, verdict_text
from ..shared.score.calibration import Calibration
from .engine.watching import latent_id, watch
from .inputs import CalibrationSocket, RecordSocket, schema, to_image
from .panel import panel, verdict_state

log = logging.getLogger(__name__)

STRANGER = (
    "this latent was not made by a sampler of the watched model. Connect the LATENT of the sampler "
    "that the MODEL of Memorization Watch leads to, as it leaves the sampler"
)


class MemorizationWatch(io.ComfyNode):
    """Observes any sampler; changes no image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeWatch",
            search_aliases=[
                "detect memorization",
                "memorisation",
                "training image copy",
                "monitor",
            ],
            inputs=[
                io.Model.Input("model"),
                io.Boolean.Input("measure_anyway", default=False),
                io.Conditioning.Input("negative", optional=True),
            ],
            outputs=[io.Model.Output("watched"), RecordSocket.Output("record")],
        )

    @classmethod
    def execute(
        cls, model: object, measure_anyway: bool, negative: list | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(*watch(model, measure_anyway=measure_anyway, empty=negative))


class MemorizationReport(io.ComfyNode):
    """Shows what the watch wrote down about the run that made a latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeReport",
            search_aliases=["memorisation report", "memorization score", "verdict"],
            is_output_node=True,
            hidden=[io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            inputs=[
                RecordSocket.Input("record"),
                io.Latent.Input("latent"),
                io.Int.Input("steps", default=1, min=1, max=1000),
                io.Boolean.Input("save_score", default=False),
                CalibrationSocket.Input("calibration", optional=True),
            ],
            outputs=[
                io.Latent.Output("reported"),
                io.Image.Output("chart"),
                io.String.Output("report"),
                io.Float.Output("score"),
                io.Boolean.Output("memorized"),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        record: object = None,
        latent: object = None,
        steps: int = 1,
        save_score: bool = False,
        calibration: object = None,
    ) -> float:
        """Run again for every prompt when its metadata is to be written."""
        # A new object each time: ComfyUI finds `math.nan` identical to itself in its cache.
        return float("nan") if save_score else 0.0

    @classmethod
    def execute(
        cls,
        record: WatchRecord,
        latent: dict,
        steps: int,
        save_score: bool,
        calibration: Calibration | None = None,
    ) -> io.NodeOutput:
        """Find the run, judge and draw it."""
        run = record.find(latent_id(latent["samples"]))
        if run is None or not run.traces.numel():
            text = f"Not measurable in this run: {run.reason if run else STRANGER}."
            drawn, score, memorized = draw_note(text), math.nan, False
            flags: list[bool | None] = [None]
        else:
            if calibration is None and record.calibration is not None:
                calibration = record.calibration(run)
            known = calibration is not None and record.model is not None
            model = record.model() if known else None
            verdict = judge(run, calibration, steps=steps, model=model)
            if save_score:
                cls._save(metadata(verdict))
            text = verdict_text(verdict, calibration, run.extra_passes)
            drawn, memorized = draw_step_chart(run, verdict), verdict.hits > 0
            score = max(image.score for image in verdict.images)
            flags = [image.hit or image.memorized for image in verdict.images]
        image = to_image(drawn)
        text = "\n".join([text, *guard_lines(run.guarded if run else ())])
        shown = ui.PreviewImage(image, cls=cls).as_dict()
        shown |= panel(cls, *verdict_state(flags), text)
        return io.NodeOutput(latent, image, text, score, memorized, ui=shown)

    @classmethod
    def _save(cls, result: dict) -> None:
        """Put a result where nodes that save images look, beside the results of other reports."""
        if cls.hidden.extra_pnginfo is None:
            log.warning("The score is not saved: this prompt has no `extra_pnginfo` to put it in.")
            return
        cls.hidden.extra_pnginfo.setdefault("unmemorize", {})[cls.hidden.unique_id] = result
