"""Node: mitigation while any sampler samples, only where a prompt is memorized."""

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..shared.score.calibration import Calibration
from .engine.guard_methods import chosen_method, method_inputs
from .engine.guarding import guard
from .engine.mitigating import calibration_inputs, gate_input, gate_of
from .engine.schema import RecordSocket, schema
from .engine.watching import watch


class MemorizationGuard(io.ComfyNode):
    """Methods that act on guidance, attention or the initial noise, behind a gate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return schema(
            node_id="UnmemorizeGuard",
            display_name="Memorization Guard",
            description=(
                "Put it between the model and any sampler. Before the first step it scores the "
                "prompt; if that is memorized, it changes guidance, attention or the initial noise "
                "of this run. All other images stay the very same."
            ),
            search_aliases=["unmemorize guard", "memorisation", "delayed guidance", "mitigation"],
            inputs=[
                io.Model.Input("model", tooltip="With its LoRAs; the sampler gets the output."),
                gate_input(),
                *method_inputs(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the score is measured against, as it was for the calibration: an "
                    "encoded empty text. Without it the sampler's own negative prompt.",
                ),
                *calibration_inputs(),
            ],
            outputs=[
                io.Model.Output("guarded", display_name="model", tooltip="For the sampler."),
                RecordSocket.Output(
                    "record", tooltip="For Memorization Report: scores, and what the guard decided."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        gate: str,
        method: str | Mapping[str, Any],
        negative: list | None = None,
        calibration: Calibration | None = None,
        force: bool = False,
        **parameters: Any,
    ) -> io.NodeOutput:
        """Attach the wrappers."""
        if gate == "never":
            return io.NodeOutput(*watch(model))
        return io.NodeOutput(
            *guard(
                model,
                chosen_method(method, parameters),
                gate_of(gate, calibration),
                empty=negative,
                force=force,
            )
        )
