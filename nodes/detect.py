"""Node: the score of prompts before anything is sampled."""

import math
from dataclasses import replace

from comfy_api.latest import io

from .engine.automatic import CONFIG, found
from .engine.measuring import caveat_of, latent_shape, scores_in_order
from .engine.model_identity import weights_sha256
from .engine.watching import beside_text
from .inputs import CalibrationSocket, config_of, schema, seed_inputs
from .panel import panel, verdict_state

NO_VERDICT = (
    "No verdict: a score alone does not say whether a prompt is memorized. Connect a calibration "
    "of this model (nodes Calibrate or Load Calibration), or use Memorization Check."
)

UNUSED = (
    "Measured as Memorization Check's calibration was, with {} seeds and one step; the widgets "
    "seeds and steps are not used."
)


class DetectMemorization(io.ComfyNode):
    """Scores of conditionings, and verdicts if a calibration is connected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeDetect",
            search_aliases=["memorization score", "unmemorize detect", "training image leak"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                *seed_inputs(),
                CalibrationSocket.Input("calibration", optional=True),
                io.Boolean.Input("force", default=False, optional=True),
            ],
            outputs=[
                io.String.Output("report"),
                io.Float.Output("score", is_output_list=True),
                io.Float.Output("magnitude_per_element", is_output_list=True),
                io.Float.Output("p_value", is_output_list=True),
                io.Boolean.Output("memorized", is_output_list=True),
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
        config = config_of(seeds[0], steps[0])
        judge = calibration[0].judge if calibration else None
        if judge is None:  # made by itself: it decides what is measured
            shape = latent_shape(model[0], latent[0])
            if own := found(model[0], [text for text, _ in negative[0]], shape):
                judge, config = own.judge, CONFIG
        basis = judge.basis if judge else None
        rows, settings = scores_in_order(model[0], positive, negative[0], latent[0], config, basis)
        l2, per_element = map(list, zip(*rows, strict=True))
        lines = [f"prompt {number}: score {norm:.4g}" for number, norm in enumerate(l2, 1)]
        if basis:  # the paper's score beside the residual
            first = replace(config, seeds=config.seeds[:1])
            paper, _ = scores_in_order(model[0], positive, negative[0], latent[0], first)
            magnitudes, per_element = map(list, zip(*paper, strict=True))
            lines = [
                f"{line} (1: ordinary), magnitude {norm:.4g}"
                for line, norm in zip(lines, magnitudes, strict=True)
            ]
        lines = [
            f"{line} (L2), {rms:.4g} per element"
            for line, rms in zip(lines, per_element, strict=True)
        ]
        p_values, flags, notes = [math.nan] * len(l2), [False] * len(l2), [NO_VERDICT]
        if judge:
            caveat = caveat_of(judge, weights_sha256(model[0]), settings, bool(force and force[0]))
            p_values, flags = judge.p_values(l2).tolist(), judge.flags(l2).tolist()
            told = [
                f"p = {p:.3g}: {'memorized' if flag else 'not flagged'}"
                for p, flag in zip(p_values, flags, strict=True)
            ]
            against = beside_text([extra for _, extra in negative[0]])
            for place, entries in enumerate(positive):
                if beside := beside_text([extra for _, extra in entries]) or against:
                    p_values[place], flags[place] = math.nan, False
                    told[place] = f"no verdict: the controls are texts alone, and here {beside}"
            lines = [f"{line}, {what}" for line, what in zip(lines, told, strict=True)]
            about = (
                f"Flagged above {judge.threshold:.4g}, at most {judge.false_positive_rate:.3g} "
                f"of ordinary prompts ({len(judge.control_scores)} controls, {judge.controls})."
            )
            if config is CONFIG and config != config_of(seeds[0], steps[0]):
                about += f" {UNUSED.format(len(CONFIG.seeds))}"
            notes = [about, *filter(None, [caveat, judge.unlike(l2)])]
        ranked = [lines[i] for i in sorted(range(len(l2)), key=lambda i: -l2[i])]
        report = "\n".join([*ranked, *notes])
        known = [None if math.isnan(p) else flag for p, flag in zip(p_values, flags, strict=True)]
        shown = panel(cls, *verdict_state(known), report)
        return io.NodeOutput(
            report, l2, per_element, p_values, flags, ui={"text": [report]} | shown
        )
