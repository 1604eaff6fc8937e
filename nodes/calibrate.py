"""Nodes: a calibration of this very model, made from control prompts or saved before."""

from typing import Any

from comfy_api.latest import io

from ..shared.score.controls import CONTROLS, load_controls
from .engine import calibrations
from .inputs import CalibrationSocket, config_of, schema, seed_inputs
from .panel import PLAIN, panel


class Calibrate(io.ComfyNode):
    """Scores of control prompts, saved under a name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeCalibrate",
            search_aliases=["unmemorize calibrate", "memorization threshold", "control prompts"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Latent.Input("latent"),
                io.String.Input("name", default="my model"),
                io.Combo.Input("controls", options=list(CONTROLS), default=CONTROLS[0]),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="control prompts, one a line; empty: the bundled list",
                ),
                io.Float.Input("false_positive_rate", default=0.01, min=0.001, max=0.5, step=0.001),
                *seed_inputs(),
                io.Conditioning.Input("negative", optional=True),
            ],
            outputs=[CalibrationSocket.Output("calibration"), io.String.Output("report")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        latent: dict,
        name: str,
        controls: str,
        prompts: str,
        false_positive_rate: float,
        seeds: int,
        steps: int,
        negative: list | None = None,
    ) -> io.NodeOutput:
        typed = list(dict.fromkeys(filter(None, map(str.strip, prompts.splitlines()))))
        texts = typed or load_controls(controls)
        path = calibrations.new_path(name)
        calibration = calibrations.calibrate(
            model, clip, texts, negative, latent, config_of(seeds, steps),
            controls="typed prompts" if typed else controls,
            false_positive_rate=false_positive_rate, path=path,
        )  # fmt: skip
        report = (
            f"Threshold {calibration.threshold:.4g} (L2), from {len(texts)} controls; at most "
            f"{false_positive_rate:.3g} of ordinary prompts lie above. Saved as {path.name}."
        )
        if calibration.residual:
            threshold = calibration.judge.threshold
            report += (
                f" Prompts are judged by their residual, threshold {threshold:.4g} (1: ordinary)."
            )
        if calibration.observed:
            threshold = calibration.observed.threshold
            report += (
                f" Sampled images are judged by their own residual, threshold {threshold:.4g}."
            )
        else:
            report += (
                " Sampled images are judged by magnitudes: their residual takes two seeds or more "
                "and one step."
            )
        shown = panel(cls, PLAIN, f"{len(texts)} controls", report)
        return io.NodeOutput(calibration, report, ui={"text": [report]} | shown)


class LoadCalibration(io.ComfyNode):
    """A calibration by name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeLoadCalibration",
            search_aliases=["unmemorize load calibration", "memorization threshold"],
            inputs=[io.Combo.Input("name", options=calibrations.names())],
            outputs=[CalibrationSocket.Output("calibration")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        """Return what changes when the file does."""
        path = calibrations.path_of(name)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(calibrations.load(name))
