"""Node: which words of a prompt drive its score, and where in the image."""

import json
from dataclasses import asdict
from typing import Any

from comfy_api.latest import io, ui

from ..shared.drawing.heatmap import prompt_heatmap_png
from ..shared.words.explanation import Explanation
from .engine.explaining import PromptWords, explain_prompt, mask_of
from .inputs import config_of, schema, seed_inputs, to_image

WIDTH, LETTERS = 640, 32
"""Pixels of the image and of its letters: readable where a node shows it at half size."""


class TokenHeatmap(io.ComfyNode):
    """The prompt in colour."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeTokenHeatmap",
            search_aliases=["unmemorize heatmap", "token attribution", "trigger words"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, dynamic_prompts=True),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                *seed_inputs(),
                io.Int.Input("most", default=3, min=0, max=20),
                io.Conditioning.Input("combine_with", optional=True),
            ],
            outputs=[
                io.Image.Output("image"),
                io.Mask.Output("where"),
                io.String.Output("report"),
                io.String.Output("data"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        text: str,
        negative: list,
        latent: dict,
        seeds: int,
        steps: int,
        most: int,
        combine_with: list | None = None,
    ) -> io.NodeOutput:
        explanation, read = explain_prompt(
            model, clip, text, negative, latent, config_of(seeds, steps),
            most=most, further=combine_with or [],
        )  # fmt: skip
        drawn = prompt_heatmap_png(
            explanation.words, explanation.significance, width=WIDTH, size=LETTERS, theme="dark"
        )
        image, mask = to_image(drawn), mask_of(model, explanation)
        report, data = _report(explanation), _data(explanation, read)
        return io.NodeOutput(image, mask, report, data, ui=ui.PreviewImage(image, cls=cls))


def _report(explanation: Explanation) -> str:
    """Return sentences for people."""
    if not any(explanation.significance):
        return "There is no word that the score depends on."
    strongest = max(zip(explanation.significance, explanation.words, strict=True))[1]
    lines = [f"The score is most sensitive to “{strongest}”."]
    if explanation.occlusions:
        lines.append(f"Score: {explanation.occlusions[0].score_before:.4g} (L2).")
        lines += explanation.suggestions or ["Leaving a word out does not lower it."]
    return "\n".join(lines)


def _data(explanation: Explanation, read: PromptWords) -> str:
    """Return the explanation as JSON."""
    words = zip(explanation.words, read.weights, explanation.significance, strict=True)
    return json.dumps(
        {
            "prompt": explanation.prompt,
            "words": [{"word": w, "weight": x, "significance": s} for w, x, s in words],
            "left_out": [asdict(occlusion) for occlusion in explanation.occlusions],
        },
        ensure_ascii=False,
    )
