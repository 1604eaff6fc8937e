"""One of several processes that draw: ``accelerate launch -m unmemorize.audit.lora.worker FILE``.

A batch is drawn by one process alone and holds the same images whoever draws it, so that the number
of processes changes nothing. Nothing is sent between them: finished files are the result.
"""

import json
import sys
from pathlib import Path

from .asking import Shot
from .config import LoraAuditConfig
from .drawing import Batch, Subjects, draw


def main(request: Path) -> None:
    """Draw this process's share of a request that `spread` wrote."""
    from accelerate import PartialState

    asked = json.loads(request.read_text("utf-8"))
    settings, folder = asked["settings"], Path(asked["folder"])
    on_cpu = settings["device"] == "cpu"
    state = PartialState(cpu=on_cpu)
    if config_path := settings["model_config"]:
        settings["model_config"] = Path(config_path)
    planned = [Batch(lora=Path(batch["lora"]), shots=tuple(Shot(**s) for s in batch["shots"]))
               for batch in asked["batches"]]  # fmt: skip
    config = LoraAuditConfig(
        lora=planned[0].lora, images=folder, **settings | {"device": str(state.device)}
    )
    subjects = Subjects(config)
    with state.split_between_processes(planned) as mine:
        for batch in mine:
            draw(subjects.under(batch.lora), batch, folder, config)
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
