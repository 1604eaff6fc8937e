"""ComfyUI nodes: widgets in, one call of `shared`, sockets out. No maths."""

import logging

from comfy_api.latest import ComfyExtension, io

NODES: list[type[io.ComfyNode]] = []


class PackExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes; ComfyUI itself says nothing about a pack without any."""
        if not NODES:
            logging.getLogger(__name__).warning(
                "Unmemorize has no ComfyUI nodes yet: nothing was added to the menus. "
                "Its command line works: python -m unmemorize --help"
            )
        return NODES
