"""Node: which words of a prompt drive its score, and where in the image."""

import json
from dataclasses import asdict
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..shared.drawing.heatmap import LEVELS, prompt_heatmap_png, word_levels
from ..shared.words.explanation import Method
from ..shared.words.leaving_out import TELLING
from .engine.explaining import Explained, explain_prompt, mask_of
from .inputs import config_of, schema, seed_inputs, to_image
from .panel import PLAIN, panel

WIDTH, LETTERS = 640, 32
"""Pixels of the image and of its letters: readable where a node shows it at half size."""
METHODS = ("leave_out", "encoder_gradient")
"""Those that need no gradient through a text encoder: ComfyUI loads it apart from the network."""


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
                *seed_inputs(1),
                io.Int.Input("most", default=3, min=0, max=20),
                io.Conditioning.Input("combine_with", optional=True),
                # Optional, and last among the widgets: workflows saved without them still load.
                io.Combo.Input("method", options=list(METHODS), default=METHODS[0], optional=True),
                io.String.Input("edit", multiline=True, default="", optional=True),
                io.Image.Input("shown_image", optional=True),
            ],
            outputs=[
                io.Image.Output("image"),
                io.Mask.Output("where"),
                io.String.Output("report"),
                io.String.Output("data"),
                io.String.Output("edited"),
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
        method: Method = METHODS[0],
        edit: str = "",
        shown_image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        explained = explain_prompt(
            model, clip, text, negative, latent, config_of(seeds, steps),
            method=method, most=most, edit=edit, further=combine_with or [],
        )  # fmt: skip
        explanation, edited = explained.explanation, explained.edited
        drawn = prompt_heatmap_png(
            explanation.words, explanation.significance, width=WIDTH, size=LETTERS, theme="dark"
        )
        image, mask = to_image(drawn), mask_of(model, explanation)
        report = _report(explained, most)
        levels = [level / LEVELS for level in word_levels(explanation.significance)]
        strongest = explanation.words[explanation.ranked[0]] if explanation.ranked else "no word"
        shown = ui.PreviewImage(image, cls=cls).as_dict() | panel(
            cls, PLAIN, strongest, report,
            words=[*zip(explanation.words, levels, strict=True)],
            overlay=None if shown_image is None else (shown_image, mask),
        )  # fmt: skip
        return io.NodeOutput(
            image, mask, report, _data(explained), text if edited is None else edited.prompt,
            ui=shown,
        )  # fmt: skip


def _report(explained: Explained, most: int) -> str:
    """Return sentences for people, about `most` words at most."""
    explanation, edited = explained.explanation, explained.edited
    lines = [] if edited is None else [f"{str(edited)[0].upper()}{str(edited)[1:]}."]
    if explanation.occlusions:
        lines.append(f"Magnitude: {explanation.occlusions[0].score_before:.4g} (L2).")
        falling = [str(o) for o in explanation.occlusions if o.telling]
        lines += falling[:most] or [f"Leaving a word out does not lower it by {TELLING:.0%}."]
    if explanation.method == "encoder_gradient" and explanation.ranked:
        strongest = explanation.words[explanation.ranked[0]]
        lines.append(f"The gradient at the text encoder's output is largest at “{strongest}”.")
    if not explanation.ranked:
        lines.append("There is no word that carries the score.")
    return "\n".join([*lines, *explanation.notes])


def _data(explained: Explained) -> str:
    """Return the explanation as JSON."""
    explanation, edited = explained.explanation, explained.edited
    words = zip(explanation.words, explained.weights, explanation.significance, strict=True)
    return json.dumps(
        {
            "prompt": explanation.prompt,
            "method": explanation.method,
            "words": [{"word": w, "weight": x, "significance": s} for w, x, s in words],
            "left_out": [asdict(occlusion) for occlusion in explanation.occlusions],
            "edited": None if edited is None else {
                "prompt": edited.prompt, "score_before": edited.score_before,
                "score_after": edited.score_after,
            },
        },
        ensure_ascii=False,
    )  # fmt: skip
