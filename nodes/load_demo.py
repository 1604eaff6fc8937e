"""Node: the bundled demo model."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .engine.automatic import NUMBER, OWN_CONTROLS
from .engine.demo_model import load_model, ordinary_captions
from .inputs import schema

LORAS = Path(__file__).resolve().parent.parent / "example_workflows" / "loras"


def add_lora_folder() -> None:
    """Let Load LoRA list the LoRA of the demo model, after the user's own."""
    folder_paths.add_model_folder_path("loras", str(LORAS))


class LoadDemoModel(io.ComfyNode):
    """MODEL, CLIP and VAE of the demo, so that every example runs with nothing to download."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeLoadDemoModel",
            search_aliases=["unmemorize demo", "tiny model", "example checkpoint"],
            inputs=[],
            outputs=[io.Model.Output("model"), io.Clip.Output("clip"), io.Vae.Output("vae")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model, clip, vae = load_model()
        # Prompts of another kind than its few subjects would be no controls.
        model.set_attachments(OWN_CONTROLS, ordinary_captions(NUMBER))
        return io.NodeOutput(model, clip, vae)
