"""ComfyUI nodes: widgets in, one call of `shared`, sockets out. No maths."""

from comfy_api.latest import ComfyExtension, io

from .calibrate import Calibrate
from .calibration_files import add_folder
from .detect import DetectMemorization
from .heatmap import TokenHeatmap
from .load_calibration import LoadCalibration
from .load_demo import LoadDemoModel
from .lora_check import LoraCheck
from .watch import MemorizationReport, MemorizationWatch

NODES: list[type[io.ComfyNode]] = [
    LoadDemoModel,
    MemorizationWatch,
    MemorizationReport,
    DetectMemorization,
    TokenHeatmap,
    Calibrate,
    LoadCalibration,
    LoraCheck,
]


class PackExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        add_folder()  # ComfyUI before 0.16 never calls `on_load`
        return NODES
