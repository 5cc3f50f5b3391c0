"""Ranks of a distributed run agree on a verdict, without a collective.

A collective here could meet another one of the training loop and corrupt it, or wait forever for a rank that compiled one
graph more. So each rank writes its own finding to the process group's key-value store and waits, bounded, for the others.
"""

from __future__ import annotations

import datetime
import logging

import torch.distributed as dist

log = logging.getLogger("deq_compile.region")

PATIENCE = datetime.timedelta(seconds=60)


def agreed(key: str, call: int, mine: bool, grad: bool) -> bool:
    """Whether all ranks find that the solve may stand in for the loop. Only calls that record gradients are compared:
    evaluation often runs on one rank alone."""
    if not grad or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return mine
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    prefix = f"deq_compile/{key}/{call}"
    store.set(f"{prefix}/{dist.get_rank()}", "1" if mine else "0")
    names = [f"{prefix}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.wait(names, PATIENCE)
    except (RuntimeError, dist.DistError):
        log.warning("region %s: not all ranks reached call %d; this rank decides alone: %s", key, call, mine)
        return mine
    return all(store.get(name) == b"1" for name in names)
