"""Functions on several ranks: the cases of `ranks_training.py`, or an example as a script. Runs in a fork of `forking.py`'s.

The launches are torchrun's, but that their processes are forked: importing torch takes each of them longer than ten steps of a
training. Threads of autograd's do not fork (a torch built for CUDA has some after its first backward), so what runs one when it
is imported, our backend that tests capture, is imported behind the fork.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
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


@record
def as_a_script(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def launched(count: int, function: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """What a function comes to on each of so many ranks."""
    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork")
    found: dict[int, Any] = elastic_launch(config, function)(*arguments)
    return found


def print_cases(cases: dict[int, tuple[str, ...]]) -> None:
    """What each rank says of each case, a line of JSON each; cases by the number of ranks."""
    for count, names in cases.items():
        for _, lines in sorted(launched(count, on_each_rank, list(names)).items()):
            for line in lines:
                print(json.dumps({**line, "count": count}))
