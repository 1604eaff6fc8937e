"""ComfyUI entry point. Importing this file imports nothing else."""

WEB_DIRECTORY = "web"
"""Where ComfyUI finds the help pages of the nodes."""


async def comfy_entrypoint():
    """Return the extension that ComfyUI asks for its nodes."""
    from .nodes import PackExtension

    return PackExtension()
