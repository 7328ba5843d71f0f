"""One rank that ends right behind its last exchange, with gloo's threads starved as on a busy machine.

python ending_worker.py      with the variables of a launcher
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bivec.engine.distributed import launched, process_group

HELD = []  # the group outlives its end, as a device mesh has it


def starve_gloo() -> None:
    """Its threads run only when nothing else wants the one core that the process has."""
    for task in Path("/proc/self/task").iterdir():
        if "runloop" in (task / "comm").read_text():
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))


def main() -> None:
    world = launched()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with process_group(world, "cpu", timeout_seconds=60):
        HELD.append(torch.distributed.group.WORLD._get_backend(torch.device("cpu")))
        world.barrier()
        starve_gloo()


if __name__ == "__main__":
    main()
