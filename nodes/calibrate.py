"""Nodes: a calibration of this very model, made from control prompts or saved before."""

from typing import Any

from comfy_api.latest import io

from ..shared.score.controls import CONTROLS, load_controls
from .engine import calibrations
from .inputs import CalibrationSocket, config_of, latent_input, model_input, schema, seed_inputs


class Calibrate(io.ComfyNode):
    """Scores of control prompts, saved under a name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeCalibrate",
            display_name="Calibrate",
            description=(
                "Scores ordinary prompts on this model, so that other nodes can tell which scores "
                "are extraordinary. Once per model, LoRA and size; the result is saved. After "
                "Cancel, the next run goes on where it stopped."
            ),
            search_aliases=["unmemorize calibrate", "memorization threshold", "control prompts"],
            is_output_node=True,
            inputs=[
                model_input(),
                io.Clip.Input("clip", tooltip="Encodes the control prompts."),
                latent_input(),
                io.String.Input(
                    "name",
                    default="my model",
                    tooltip="File name in models/unmemorize, without ending; replaced if there.",
                ),
                io.Combo.Input(
                    "controls",
                    options=list(CONTROLS),
                    default=CONTROLS[0],
                    tooltip="Bundled list of about 250 prompts, used when none are typed below.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="control prompts, one a line; empty: the bundled list",
                    tooltip="Ordinary prompts of the kind the model is used for, none of them from "
                    "its training set. One a line.",
                ),
                io.Float.Input(
                    "false_positive_rate",
                    default=0.01, min=0.001, max=0.5, step=0.001,
                    tooltip="Share of ordinary prompts that may be flagged, 0.001 to 0.5. 0.01 "
                    "needs 99 controls.",
                ),
                *seed_inputs(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="As connected to the nodes that will use the calibration; without it "
                    "the empty text.",
                ),
            ],
            outputs=[
                CalibrationSocket.Output(
                    "calibration", tooltip="For Detect Memorization and Memorization Report."
                ),
                io.String.Output("report", tooltip="Threshold, its rate and where it was saved."),
            ],
        )  # fmt: skip

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
        calibration, path = calibrations.calibrate(
            model, clip, texts, negative, latent, config_of(seeds, steps),
            controls="typed prompts" if typed else controls,
            false_positive_rate=false_positive_rate, name=name,
        )  # fmt: skip
        report = (
            f"Threshold {calibration.threshold:.4g} (L2), from {len(texts)} controls; at most "
            f"{false_positive_rate:.3g} of ordinary prompts lie above. Saved as {path.name}."
        )
        return io.NodeOutput(calibration, report, ui={"text": [report]})


class LoadCalibration(io.ComfyNode):
    """A calibration by name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeLoadCalibration",
            display_name="Load Calibration",
            description="A calibration that the node Calibrate saved in models/unmemorize.",
            search_aliases=["unmemorize load calibration", "memorization threshold"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=calibrations.names(),
                    tooltip="Files of models/unmemorize; press R after making a new one.",
                )
            ],
            outputs=[
                CalibrationSocket.Output(
                    "calibration", tooltip="Bound to the model and settings it was made with."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        """Return what changes when the file does."""
        path = calibrations.path_of(name)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(calibrations.load(name))
