"""Workers end with the process that started them, however it ends: tested with real ones."""

import os
import signal
import subprocess
import sys
import time

import pytest
from needs import need_package
from small_audit import example_lora

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
PATIENCE = 240
"""Seconds for processes to start, on a busy machine."""
DRAW = """
import sys
from pathlib import Path
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.lora.ask import Shot
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.draw import batches, draw_all

lora, folder = map(Path, sys.argv[1:])
config = LoraAuditConfig(lora=lora, images=folder, generation_steps=400, batch_size=1,
                         device="cpu", processes=2)
shots = [Shot(prompt="green apple", asked="caption", source=None, seed=seed, mode="on",
              stage="captions", path=f"images/{seed}.png") for seed in range(40)]
draw_all(batches(shots, 1), Subject.of(config), config, folder, silent)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_no_worker_outlives_a_process_that_was_killed(number, root, package_env, tmp_path):
    psutil = need_package("psutil")
    (tmp_path / "images").mkdir()
    words = [sys.executable, "-c", DRAW, str(example_lora(root)), str(tmp_path)]
    main = subprocess.Popen(words, env=package_env | {"OMP_NUM_THREADS": "1"})
    try:
        found = wait_for(lambda: workers_of(psutil.Process(main.pid)))
        assert found, "no two workers were started"
    finally:
        main.send_signal(number)
        main.wait()
    _, alive = psutil.wait_procs(found, timeout=30)
    for process in alive:
        process.kill()
    assert alive == []


def workers_of(main):
    """Return the launcher and its workers, once two of these read their request; else nothing."""
    below = main.children(recursive=True)
    return below if len(below) >= 3 else []


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if met := condition():
            time.sleep(2)  # long enough that a worker listens to its input
            return condition() or met
        time.sleep(0.2)
    return None
