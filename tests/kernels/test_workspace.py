"""The pool of CPU buffers: memory comes back when its last view is gone, and never before."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator

import pytest
import torch

from deq_compile.kernels import workspace

SHAPE = (64, 1024)  # 256 KiB in fp32


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    workspace.clear()
    yield
    workspace.clear()


def test_memory_is_used_again() -> None:
    first = workspace.empty(SHAPE, torch.float32)
    at = first.data_ptr()
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, torch.float32, True)
    del first
    assert workspace.kept() == 256 << 10
    second = workspace.empty((32, 1024), torch.float64)
    assert second.data_ptr() == at
    assert workspace.kept() == 0


def test_a_view_holds_the_memory() -> None:
    whole = workspace.empty(SHAPE, torch.float32)
    row = whole.fill_(3.0)[5]
    del whole
    other = workspace.empty(SHAPE, torch.float32).fill_(0.0)
    assert other.data_ptr() != row.data_ptr() - 5 * 4096
    assert bool((row == 3).all())


def test_autograd_gives_it_back() -> None:
    x = torch.ones(SHAPE, requires_grad=True)
    saved = workspace.empty(SHAPE, torch.float32).fill_(2.0)
    y = (x * saved).sum()
    del saved
    assert workspace.kept() == 0
    y.backward()
    del y
    gc.collect()
    assert workspace.kept() == 256 << 10
    assert x.grad is not None
    assert bool((x.grad == 2).all())


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "LIMIT", 600 << 10)
    held = [workspace.empty(SHAPE, torch.float32) for _ in range(4)]
    held.clear()
    assert workspace.kept() == 512 << 10
    large = workspace.empty((4 * SHAPE[0], SHAPE[1]), torch.float32)
    del large
    assert workspace.kept() == 512 << 10


def test_a_block_that_is_somewhat_larger_serves() -> None:
    blocks = [workspace.empty((rows, 1024), torch.float32) for rows in (64, 80, 88, 128)]
    places = [b.data_ptr() for b in blocks]
    blocks.clear()
    assert workspace.empty((60, 1024), torch.float32).data_ptr() == places[0]
    again = [workspace.empty((60, 1024), torch.float32) for _ in range(4)]
    assert [a.data_ptr() for a in again[:3]] == places[:3]  # the last is more than half as large again
    assert places[3] not in [a.data_ptr() for a in again]
    del again
    assert workspace.kept() == sum(workspace._rounded(rows * 4096) for rows in (60, 64, 80, 88, 128))


def test_small_tensors_are_ordinary() -> None:
    tensor = workspace.empty((3, 0, 5), torch.float32)
    assert tensor.shape == (3, 0, 5)
    assert tensor.untyped_storage().resizable()


def test_parts_of_an_arena_lie_apart_and_hold_it() -> None:
    parts = [("a", torch.float32, 5), ("none", torch.int8, 0), ("b", torch.int32, 50_000), ("c", torch.float64, 3)]
    places, size = workspace.plan(parts)
    ends = [(offset, offset + count * dtype.itemsize) for dtype, count, offset in places.values()]
    assert all(start % workspace.ALIGNMENT == 0 and end <= size for start, end in ends)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(ends))
    arena = workspace.Arena(size)
    tensors = {name: arena.tensor(place) for name, place in places.items()}
    assert {name: (t.dtype, t.numel()) for name, t in tensors.items()} == {name: (dtype, n) for name, dtype, n in parts}
    for i, tensor in enumerate(tensors.values()):
        tensor.fill_(i)
    assert [t.unique().tolist() for t in tensors.values()] == [[0], [], [2], [3]]
    b = tensors["b"]
    del arena, tensors, tensor
    assert workspace.kept() == 0
    assert bool((b == 2).all())
    del b
    assert workspace.kept() >= size


def test_a_small_arena_is_no_matter_of_the_pool() -> None:
    arena = workspace.Arena(100)
    last = arena.tensor((torch.int8, 1, 99)).fill_(7)
    del arena
    gc.collect()
    assert workspace.kept() == 0
    assert last.tolist() == [7]
