"""Node: sample again only where it is needed."""

from comfy_api.latest import io

from .inputs import schema


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
            ],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def check_lazy_status(
        cls, memorized: bool, ordinary: dict | None = None, mitigated: dict | None = None
    ) -> list[str]:
        """Return the name of the one latent that is passed on, unless it is there already."""
        name, latent = ("mitigated", mitigated) if memorized else ("ordinary", ordinary)
        return [name] if latent is None else []

    @classmethod
    def execute(
        cls, memorized: bool, ordinary: dict | None = None, mitigated: dict | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(mitigated if memorized else ordinary)
