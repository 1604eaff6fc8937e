"""Node: which words of a prompt drive its score, and where in the image."""

import json
from dataclasses import asdict, replace
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..shared.arrays import Float, Tensor
from ..shared.drawing.heatmap import prompt_heatmap_png, unit_map
from ..shared.words.explanation import Explanation, explain, leave_out, shortened
from .engine.comfy_denoiser import Prompt
from .engine.images import to_image
from .engine.measuring import (
    config_of,
    encoded,
    forward_rows,
    latent_input,
    model_input,
    negative_input,
    seed_inputs,
)
from .engine.prompt_words import PromptWords, read_words
from .engine.sampling_work import with_denoiser
from .engine.schema import schema

WIDTH, LETTERS = 640, 32
"""Pixels of the picture and of its letters: readable where a node shows it at half size."""


class TokenHeatmap(io.ComfyNode):
    """The prompt in colour."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return schema(
            node_id="UnmemorizeTokenHeatmap",
            display_name="Token Heatmap",
            description=(
                "Which words of a prompt drive its score, drawn as the prompt in colour, and where "
                "in the image they act. The strongest words are left out in turn, to see how far "
                "the score falls."
            ),
            search_aliases=["unmemorize heatmap", "token attribution", "trigger words"],
            is_output_node=True,
            inputs=[
                model_input(),
                io.Clip.Input("clip", tooltip="Text encoder of the model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, with weights (word:1.2) and embedding:names as you use "
                    "them; long prompts are read to the end.",
                ),
                negative_input(),
                latent_input(),
                *seed_inputs(),
                io.Int.Input(
                    "most",
                    display_name="leave out",
                    default=3, min=0, max=20,
                    tooltip="How many of the strongest words are left out in turn, 0 to 20; each "
                    "costs a score.",
                ),
                io.Conditioning.Input(
                    "combine_with",
                    optional=True,
                    tooltip="Further conditioning that is averaged with the text, as Conditioning "
                    "Combine does; its words are not shown.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The prompt, each word on its colour."),
                io.Mask.Output(
                    "where",
                    tooltip="Where the prompt dictates the pixels, 0 to 1, at the image's size.",
                ),
                io.String.Output("report", tooltip="What leaving words out does to the score."),
                io.String.Output("data", tooltip="The same as JSON, one number per word."),
            ],
        )  # fmt: skip

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
        """Explain the prompt."""
        further, config = combine_with or [], config_of(seeds, steps)
        own = encoded(clip, text)
        read = read_words(clip.tokenizer, text, own[0][0].shape[1])
        prompts = {text: Prompt(entries=own + further, tokens=read.tokens, words=read.words)}
        explanation = with_denoiser(
            model, prompts, negative, latent,
            lambda denoiser: explain(denoiser, text, config, occlude=0),
            forward_rows=2 * seeds * steps, gradients=True,
        )  # fmt: skip
        if shorter := shortened(explanation, most):
            for rest in shorter.values():
                prompts.setdefault(rest, Prompt(entries=encoded(clip, rest) + further))
            occlusions = with_denoiser(
                model, prompts, negative, latent,
                lambda denoiser: leave_out(denoiser, explanation, shorter, config),
                forward_rows=forward_rows(1 + len(shorter), config),
            )  # fmt: skip
            explanation = replace(explanation, occlusions=occlusions)
        picture = prompt_heatmap_png(
            explanation.words, explanation.significance, width=WIDTH, size=LETTERS, theme="dark"
        )
        image = to_image(picture)
        mask, data = _mask(model, explanation), _data(explanation, read)
        return io.NodeOutput(
            image, mask, _report(explanation), data, ui=ui.PreviewImage(image, cls=cls)
        )


def _mask(model: Any, explanation: Explanation) -> Float[Tensor, "1 height width"]:
    """Return the map of differences at the size of the image."""
    # Formats of before 2026 do not say; all of them have 8 pixels a place.
    scale = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    unit = torch.from_numpy(unit_map(explanation.difference_map))[None, None]
    height, width = (side * scale for side in unit.shape[-2:])
    return comfy.utils.common_upscale(unit, width, height, "bilinear", "disabled")[0]


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
