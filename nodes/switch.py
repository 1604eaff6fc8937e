"""Node: sample again only where it is needed."""

from typing import Any

from comfy_api.latest import io

from .inputs import schema
from .panel import CHANGED, PLAIN, panel


class MemorizationSwitch(io.ComfyNode):
    """One of two latents; what leads to the other one does not run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeSwitch",
            search_aliases=["unmemorize switch", "lazy switch", "resample if memorized"],
            inputs=[
                io.Boolean.Input("memorized", force_input=True),
                io.Latent.Input("ordinary", lazy=True),
                io.Latent.Input("mitigated", lazy=True),
                io.Vae.Input("vae", optional=True),
            ],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def check_lazy_status(
        cls,
        memorized: bool,
        ordinary: dict | None = None,
        mitigated: dict | None = None,
        vae: Any = None,
    ) -> list[str]:
        """Return the name of the latent that is passed on, and of the other if both are drawn."""
        wanted = {"ordinary": ordinary, "mitigated": mitigated}
        if not memorized:
            del wanted["mitigated"]
        elif vae is None:
            del wanted["ordinary"]
        return [name for name, latent in wanted.items() if latent is None]

    @classmethod
    def execute(
        cls,
        memorized: bool,
        ordinary: dict | None = None,
        mitigated: dict | None = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        if not memorized:
            text = "The ordinary latent is passed on: nothing was flagged."
            return io.NodeOutput(ordinary, ui=panel(cls, PLAIN, "ordinary", text))
        text = "The mitigated latent is passed on: the ordinary one looks memorized."
        pair = None
        if vae is not None and ordinary is not None and mitigated is not None:
            pair = vae.decode(ordinary["samples"]), vae.decode(mitigated["samples"])
        return io.NodeOutput(mitigated, ui=panel(cls, CHANGED, "mitigated", text, pair=pair))
