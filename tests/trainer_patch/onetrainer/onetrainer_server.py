"""Runs scripts of OneTrainer, each in a process of its own that need not import everything again.

It imports what a training imports, then takes a job per line of its input, a JSON list:

    [output, "script", SCRIPT, ...]   the script as it is
    [output, "door", SCRIPT, ...]     the same behind the launcher

forks, and answers with the exit status; what the job says goes to the file `output`. Every job
starts from the same random numbers: OneTrainer takes noise, timesteps and order from the number of
the step, but the LoRA's first factors from a generator that nobody seeds.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Sequence

import torch


def run(door: str, arguments: Sequence[str]) -> int:
    """Run a script as its own program would run; return its exit status."""
    torch.manual_seed(1)
    sys.argv = list(arguments)
    try:
        if door == "door":
            sys.argv.insert(0, "")
            runpy.run_module(
                "unmemorize.trainer_patch.onetrainer", run_name="__main__", alter_sys=True
            )
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path[:0] = [os.path.abspath("scripts"), os.getcwd()]
    importlib.import_module("modules.trainer.GenericTrainer")  # this takes the time
    answers = os.dup(1)
    for line in sys.stdin:
        output, door, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            status = run(door, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{status}\n".encode())
