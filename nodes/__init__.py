"""ComfyUI nodes: widgets in, one call of `shared`, sockets out. No maths."""

from comfy_api.latest import ComfyExtension, io

from .calibrate import Calibrate, LoadCalibration
from .check import MemorizationCheck
from .compare import CompareWithReferences
from .detect import DetectMemorization
from .engine.calibrations import add_folder
from .guard import MemorizationGuard
from .heatmap import TokenHeatmap
from .load_demo import LoadDemoModel, add_lora_folder
from .lora_check import LoraCheck
from .mitigate import MitigateMemorization
from .switch import MemorizationSwitch
from .unmemorize import Unmemorize
from .watch import MemorizationReport, MemorizationWatch

NODES: list[type[io.ComfyNode]] = [
    LoadDemoModel,
    MemorizationCheck,
    Unmemorize,
    CompareWithReferences,
    MemorizationWatch,
    MemorizationReport,
    DetectMemorization,
    TokenHeatmap,
    Calibrate,
    LoadCalibration,
    LoraCheck,
    MitigateMemorization,
    MemorizationGuard,
    MemorizationSwitch,
]


class PackExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        add_folder()  # ComfyUI before 0.16 never calls `on_load`
        add_lora_folder()
        return NODES
