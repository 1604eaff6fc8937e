"""Node: a calibration that was saved before."""

from comfy_api.latest import io

from ..shared.score.calibration import Calibration, CalibrationError
from .engine import calibration_files
from .engine.schema import CalibrationSocket, schema


class LoadCalibration(io.ComfyNode):
    """A calibration by name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return schema(
            node_id="UnmemorizeLoadCalibration",
            display_name="Load Calibration",
            description="A calibration that the node Calibrate saved in models/unmemorize.",
            search_aliases=["unmemorize load calibration", "memorization threshold"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=calibration_files.names(),
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
        path = calibration_files.path_of(name)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load the file."""
        try:
            return io.NodeOutput(Calibration.load(calibration_files.path_of(name)))
        except CalibrationError as error:
            raise ValueError(f"{error} In ComfyUI: run the node Calibrate.") from error
