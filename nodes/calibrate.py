"""Node: a calibration of this very model, from control prompts."""

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..shared.files.storage import Journal
from ..shared.score.calibration import Calibration, controls_needed
from ..shared.score.controls import CONTROLS, load_controls
from .engine import calibration_files
from .engine.comfy_denoiser import Prompt
from .engine.measuring import config_of, encoded, latent_input, model_input, scores, seed_inputs
from .engine.model_identity import digest, weights_sha256
from .engine.noise_levels import noise_levels
from .engine.schema import CalibrationSocket, schema


class Calibrate(io.ComfyNode):
    """Scores of control prompts, saved under a name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
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
        """Measure the controls and save."""
        calibration_files.checked_name(name)
        typed = list(dict.fromkeys(filter(None, map(str.strip, prompts.splitlines()))))
        texts = typed or load_controls(controls)
        if len(texts) < controls_needed(false_positive_rate):
            raise ValueError(
                f"{len(texts)} control prompts cannot support a false-positive rate of "
                f"{false_positive_rate}: it takes {controls_needed(false_positive_rate)}. Add "
                "prompts or raise `false_positive_rate`."
            )
        config, sha256 = config_of(seeds, steps), weights_sha256(model)
        negative = encoded(clip, "") if negative is None else negative
        named = {text: Prompt(entries=encoded(clip, text)) for text in texts}
        levels = noise_levels(model.get_model_object("model_sampling"), config.schedule_steps)
        read = [entries[0][0] for entries in (negative, *(p.entries for p in named.values()))]
        key = digest([sha256, seeds, levels[:steps], latent["samples"].shape[2:], read])[:16]
        # ComfyUI empties this folder when it starts.
        journal = Journal(Path(folder_paths.get_temp_directory()) / f"unmemorize-{key}.jsonl")
        detection, settings = scores(
            model, named, negative, latent, config,
            known=_traces(journal, len(texts)),
            on_result=lambda index, trace: journal.put(str(index), trace.tolist()),
        )  # fmt: skip
        calibration = Calibration.from_controls(
            detection,
            model=sha256,
            settings=settings,
            name="typed prompts" if typed else controls,
            false_positive_rate=false_positive_rate,
        )
        path = calibration_files.save(calibration, name)
        journal.path.unlink(missing_ok=True)
        report = (
            f"Threshold {calibration.threshold:.4g} (L2), from {len(texts)} controls; at most "
            f"{false_positive_rate:.3g} of ordinary prompts lie above. Saved as {path.name}."
        )
        return io.NodeOutput(calibration, report, ui={"text": [report]})


def _traces(journal: Journal, prompts: int) -> dict[int, torch.Tensor]:
    """Return the traces that an interrupted run has left, by the prompt's index."""
    found = {index: journal.get(str(index)) for index in range(prompts)}
    return {
        index: torch.tensor(trace, dtype=torch.float64)
        for index, trace in found.items()
        if trace is not None
    }
