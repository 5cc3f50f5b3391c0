"""Memory that solves use again and again, on a CPU.

A step of a region needs buffers of some megabytes twice, for the steps of the forward and for the basis of the adjoint. The C
library gives such blocks back to the system as soon as they are free, and then every page is faulted in and cleared again in the
next step: up to 4 us a page, which is more than all of the solver's arithmetic and can be a third of the whole step. So the last
blocks are kept here, up to `LIMIT` bytes of them; larger ones are ordinary tensors.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _physical_memory() -> int:
    """Bytes of this machine; 1 GiB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 30


# Bytes that may be kept while nobody uses them.
LIMIT = _physical_memory() // 16
# Below this the C library does not give memory back, and a block is cheaper than the question for one.
SMALL = 64 << 10
ALIGNMENT = 64  # of torch's own CPU tensors
# Between large parts of a block: rows of several tensors that are read together must not have one address modulo a page, or they
# share the same few sets of the first-level cache, and a load waits for a store to another tensor.
STAGGER = 9 * ALIGNMENT

_Free = collections.OrderedDict[int, list[Tensor]]  # by size, least recently used first
_free: _Free = collections.OrderedDict()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor; its memory returns to the pool when its last view is gone."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if not SMALL <= size <= LIMIT:
        return torch.empty(tuple(shape), dtype=dtype)
    found = torch.frombuffer(_lease(size), dtype=dtype)
    return found if len(shape) == 1 else found.view(tuple(shape))


Place = tuple[torch.dtype, int, int]  # dtype, elements, offset in bytes


def plan(parts: Sequence[tuple[str, torch.dtype, int]]) -> tuple[dict[str, Place], int]:
    """Where parts (name, dtype, elements) lie in one block, each aligned; and the block's size in bytes."""
    places, end = {}, 0
    for name, dtype, count in parts:
        places[name] = dtype, count, end
        end += (count * dtype.itemsize + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if count * dtype.itemsize >= 4096:
            end += STAGGER
    return places, max(end, 1)


class Arena:
    """One uninitialised block for all that one solve needs: a block costs far less than a dozen tensors. Each tensor that is
    made of a part has a storage of its own and holds the block."""

    def __init__(self, size: int) -> None:
        self.lease = _lease(size)
        self.address = ctypes.addressof(self.lease)

    def tensor(self, place: Place) -> Tensor:
        """A flat tensor over a part."""
        dtype, count, offset = place
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.lease, dtype=dtype, count=count, offset=offset)


def _lease(wanted: int) -> Any:
    """A buffer of so many bytes in a block of the pool, or in a new one."""
    size = _rounded(wanted)
    block = _taken(size)
    if block is None:
        block = torch.empty(size, dtype=torch.uint8)
    lease = _lease_type(wanted).from_address(block.data_ptr())
    lease.block = block
    return lease


def _taken(size: int) -> Tensor | None:
    """A free block of this size, or one that is not much too large, so that batches of many sizes do not each keep their own."""
    found = _popped(size)
    if found is None:
        for other in sorted(other for other in list(_free) if size < other <= size + size // 2):
            if (found := _popped(other)) is not None:
                break
    return found


def _popped(size: int) -> Tensor | None:
    try:
        block = _free[size].pop()
        _free.move_to_end(size)
        return block
    except (KeyError, IndexError):  # there is none, or another thread was quicker
        return None


@functools.lru_cache(maxsize=256)
def _lease_type(size: int) -> Any:
    """A buffer of so many bytes in a block, which it gives back when it dies."""

    class Lease(ctypes.c_char * size):  # type: ignore[misc]
        block: Tensor

        def __del__(self) -> None:
            _give_back(self.block)

    return Lease


def kept() -> int:
    """Bytes that nobody uses at the moment."""
    return sum(size * len(blocks) for size, blocks in list(_free.items()))


def clear() -> None:
    """Give all of it back to the system."""
    _free.clear()


def _rounded(size: int) -> int:
    """Up by at most an eighth, so that nearly equal shapes share blocks."""
    step = 1 << max(size.bit_length() - 4, 0)
    return (size + step - 1) // step * step


def _give_back(block: Tensor) -> None:
    # Runs wherever the last reference dies, in any thread: each line is one operation on a dict or a list.
    if not SMALL <= block.numel() <= LIMIT:
        return
    _free.setdefault(block.numel(), []).append(block)
    while kept() > LIMIT:
        size, blocks = next(iter(_free.items()), (0, None))
        if blocks:
            blocks.pop()
        else:
            _free.pop(size, None)
