"""ComfyUI entry point. Importing this file imports nothing else."""


async def comfy_entrypoint():
    """Return the extension that ComfyUI asks for its nodes."""
    from .nodes import PackExtension

    return PackExtension()
