"""Started with {number of processes: names of cases} as JSON: runs those of `ranks_training.py` on so many ranks, and prints what
each rank says, a line of JSON each.

The launches are torchrun's, but that their processes are forked: importing torch takes each of them longer than ten steps of a
training. Threads of autograd's do not fork (a torch built for CUDA has some after its first backward), so what runs one when it
is imported, our backend that tests capture, is imported behind the fork.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


@record  # or the launcher says no more than that a process has failed
def on_each_rank(names: list[str]) -> list[dict[str, Any]]:
    from tests.models.ranks_training import on_this_rank

    return on_this_rank(names)


def launched(count: int, names: list[str]) -> list[dict[str, Any]]:
    """What all ranks say of some cases."""
    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork")
    found = elastic_launch(config, on_each_rank)(names)
    return [{**line, "count": count} for rank in sorted(found) for line in found[rank]]


if __name__ == "__main__":
    for processes, wanted in json.loads(sys.argv[1]).items():
        for line in launched(int(processes), wanted):
            print(json.dumps(line))
