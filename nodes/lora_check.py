"""Node: what a LoRA does to the scores of its training captions."""

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..shared.drawing.score_changes import LoraScores, draw_score_changes
from ..shared.files.prompts import Prompt as Caption
from ..shared.files.prompts import clean, read_prompts
from ..shared.score.controls import CONTROLS, load_controls
from .engine.comfy_denoiser import Prompt
from .engine.measuring import encoded, scores
from .inputs import config_of, schema, seed_inputs, to_image
from .panel import PLAIN, panel


class LoraCheck(io.ComfyNode):
    """Scores with the LoRA minus scores without, per caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeLoraCheck",
            search_aliases=["lora memorization check", "unmemorize lora", "lora overfitting"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Model.Input("model_with_lora"),
                io.Clip.Input("clip_with_lora"),
                io.Latent.Input("latent"),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    placeholder="training captions, one a line",
                ),
                io.String.Input("folder", default=""),
                io.Int.Input("controls", default=20, min=0, max=250),
                *seed_inputs(),
            ],
            outputs=[
                io.Image.Output("table"),
                io.String.Output("report"),
                io.String.Output("data"),
                io.Float.Output("increase"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        model_with_lora: Any,
        clip_with_lora: Any,
        latent: dict,
        captions: str,
        folder: str,
        controls: int,
        seeds: int,
        steps: int,
    ) -> io.NodeOutput:
        config = config_of(seeds, steps)
        read = [Caption(text=line, source="typed") for line in captions.splitlines()]
        read += read_prompts(Path(folder)) if folder.strip() else []
        own = clean([caption for caption in read if caption.text.strip()]).prompts
        if not own:
            raise ValueError("There are no captions: type some, or give a training folder.")
        others = [text for text in load_controls(CONTROLS[0]) if text not in own][:controls]
        texts = [*own, *others]
        sides = []
        for network, encoder in ((model, clip), (model_with_lora, clip_with_lora)):
            prompts = {text: Prompt(entries=encoded(encoder, text)) for text in texts}
            detection, _ = scores(network, prompts, encoded(encoder, ""), latent, config)
            sides.append(detection.scores.tolist())
        result = LoraScores.of(texts, *sides, captions=len(own))
        image = to_image(draw_score_changes(result))
        data = json.dumps(result.as_json(), ensure_ascii=False)
        shown = ui.PreviewImage(image, cls=cls).as_dict()
        shown |= panel(cls, PLAIN, f"{result.mean_increase:+.3g} with LoRA", str(result))
        return io.NodeOutput(image, str(result), data, result.mean_increase, ui=shown)
