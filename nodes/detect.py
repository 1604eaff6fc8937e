"""Node: the score of prompts before anything is sampled."""

import math
from typing import Any

from comfy_api.latest import io

from ..shared.score.detection import Detection
from .engine.comfy_denoiser import Prompt, share_negative
from .engine.measuring import (
    calibration_input,
    caveat_of,
    config_of,
    latent_input,
    model_input,
    negative_input,
    scores,
    seed_inputs,
)
from .engine.model_identity import weights_sha256
from .engine.schema import schema

NO_VERDICT = (
    "No verdict: a score alone does not say whether a prompt is memorized. Connect a calibration "
    "of this model (nodes Calibrate or Load Calibration)."
)


class DetectMemorization(io.ComfyNode):
    """Scores of conditionings, and verdicts if a calibration is connected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return schema(
            node_id="UnmemorizeDetect",
            display_name="Detect Memorization",
            description=(
                "How strongly a prompt alone steers the first denoising step, measured before any "
                "sampling. Memorized prompts steer more than ordinary ones."
            ),
            search_aliases=["memorization score", "unmemorize detect", "training image leak"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt, or a list of prompts: each gets a score."
                ),
                negative_input(),
                latent_input(),
                *seed_inputs(),
                calibration_input(),
                io.Boolean.Input(
                    "force",
                    default=False,
                    optional=True,
                    tooltip="Use a calibration of another model or other settings; the report says "
                    "so.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="One line a prompt, highest score first."),
                io.Float.Output(
                    "score", is_output_list=True, tooltip="L2 norm in latent units, 0 or more."
                ),
                io.Float.Output(
                    "score_per_element",
                    is_output_list=True,
                    tooltip="Root mean square over latent elements, does not grow with the size.",
                ),
                io.Float.Output(
                    "p_value",
                    is_output_list=True,
                    tooltip="Share of ordinary prompts that score as high, 0 to 1; NaN without a "
                    "calibration.",
                ),
                io.Boolean.Output(
                    "memorized",
                    is_output_list=True,
                    tooltip="Score above the calibration's threshold; False without a calibration.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: list,
        positive: list,
        negative: list,
        latent: list,
        seeds: list,
        steps: list,
        calibration: list | None = None,
        force: list | None = None,
    ) -> io.NodeOutput:
        """Measure."""
        config = config_of(seeds[0], steps[0])
        named = {str(i): Prompt(entries=entries) for i, entries in enumerate(positive, 1)}
        parts = [
            scores(model[0], part, negative[0], latent[0], config) for part in share_negative(named)
        ]
        by_name = {name: row for detection, _ in parts for name, row in _rows(detection)}
        found = [by_name[name] for name in named]
        if not calibration:
            told = "\n".join([*_ranked(named, found, [""] * len(found)), NO_VERDICT])
            return _output(told, found, [math.nan] * len(found), [False] * len(found))
        control, sha256 = calibration[0], weights_sha256(model[0])
        caveat = caveat_of(control, sha256, parts[0][1], bool(force and force[0]))
        l2 = [row[0] for row in found]
        p_values, flags = control.p_values(l2).tolist(), control.flags(l2).tolist()
        verdicts = [
            f", p = {p:.3g}: {'memorized' if flag else 'not flagged'}"
            for p, flag in zip(p_values, flags, strict=True)
        ]
        about = (
            f"Flagged above {control.threshold:.4g}, at most {control.false_positive_rate:.3g} of "
            f"ordinary prompts ({len(control.control_scores)} controls, {control.controls})."
        )
        lines = [*_ranked(named, found, verdicts), about, *filter(None, [caveat])]
        return _output("\n".join(lines), found, p_values, flags)


def _rows(detection: Detection) -> list[tuple[str, tuple[float, float]]]:
    """Return per prompt its name and its score, L2 and per element."""
    l2, rms = detection.scores.tolist(), detection.scores_per_element.tolist()
    return list(zip(detection.prompts, zip(l2, rms, strict=True), strict=True))


def _ranked(names: Any, found: list[tuple[float, float]], verdicts: list[str]) -> list[str]:
    """Return a line per prompt, highest score first."""
    lines = [
        (l2, f"prompt {name}: score {l2:.4g} (L2), {rms:.4g} per element{verdict}")
        for name, (l2, rms), verdict in zip(names, found, verdicts, strict=True)
    ]
    return [line for _, line in sorted(lines, key=lambda pair: -pair[0])]


def _output(
    report: str, found: list[tuple[float, float]], p_values: list[float], flags: list[bool]
) -> io.NodeOutput:
    return io.NodeOutput(
        report, [l2 for l2, _ in found], [rms for _, rms in found], p_values, flags,
        ui={"text": [report]},
    )  # fmt: skip
