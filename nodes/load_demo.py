"""Node: the bundled demo model."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .engine.demo_model import load_model
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
            display_name="Load Demo Model",
            description=(
                "A small model that memorizes, made to try these nodes on: 128 x 128 pixels, "
                "seconds on a laptop, nothing to download. Its duplicates were planted."
            ),
            search_aliases=["unmemorize demo", "tiny model", "example checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="U-Net, Stable Diffusion 1.x at small width."),
                io.Clip.Output("clip", tooltip="Text encoder and tokenizer, 77 tokens."),
                io.Vae.Output("vae", tooltip="Autoencoder, 8 x 8 pixels per latent place."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_model())
