"""record_solves: nested, in threads, on empty batches, and what it holds on to."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import fixed_point, record_solves
from deq_compile.region import records
from tests.helpers import compiled


def solve(a: Tensor | None = None) -> Tensor:
    return fixed_point(lambda z: 0.5 * z + (1 if a is None else a), torch.zeros(2, 3))


def loop(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(20):
        z = torch.tanh(0.3 * z + x)
    return z


@pytest.mark.parametrize("same", [True, False])
def test_nested_blocks_each_get_what_runs_inside(same: bool) -> None:
    """Recorders that are equal when the inner one ends, and such that are not."""
    with record_solves() as outer:
        if not same:
            solve()
        with record_solves() as inner:
            solve()
        solve()
    solve()
    assert (len(outer), len(inner)) == (2 if same else 3, 1)
    assert not records._active


def test_the_outer_block_sees_the_backward_of_a_forward_in_the_inner() -> None:
    a = torch.ones(3, requires_grad=True)
    with record_solves() as outer:
        with record_solves(tensors=True) as inner:
            z = solve(a)
        z.sum().backward()
    assert inner[0].vjps is None  # the block had ended
    assert inner[0].z is not None
    assert outer[0].vjps is not None
    assert outer[0].z is None


def test_blocks_that_end_in_another_order_than_they_began() -> None:
    """As blocks of two threads do."""
    first, second = record_solves(), record_solves()
    a, b = first.__enter__(), second.__enter__()
    solve()
    first.__exit__(None, None, None)
    solve()
    second.__exit__(None, None, None)
    solve()
    assert (len(a), len(b)) == (1, 2)


def test_threads() -> None:
    errors: list[BaseException] = []
    counts: list[int] = []

    def work() -> None:
        try:
            for _ in range(20):
                with record_solves(timing=True) as solves:
                    solve()
                counts.append(len(solves))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    with record_solves() as every:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(every) == 60
    assert min(counts) >= 1  # its own, and what the others ran meanwhile
    assert not records._active


def test_nothing_is_held_after_the_last_block() -> None:
    with record_solves():
        for _ in range(20):
            with record_solves(tensors=True) as solves:
                solve()
            gone = weakref.ref(solves[0])
    del solves
    gc.collect()
    assert gone() is None
    assert len(records._open) == 0


def test_a_long_block_may_drop_records_as_it_goes() -> None:
    a = torch.ones(3, requires_grad=True)
    with record_solves(tensors=True) as solves:
        z = solve(a)
        gone = weakref.ref(solves[0])
        solves.clear()
        assert gone() is None
        z.sum().backward()  # with nobody to tell
        solve(a).sum().backward()
        assert solves[0].w is not None


def test_a_block_that_nobody_left() -> None:
    abandoned = record_solves()
    abandoned.__enter__()
    solve()
    del abandoned
    gc.collect()
    assert not records._active
    assert len(records._open) == 0


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_an_empty_batch(inner: str, tensors: bool) -> None:
    run, _ = compiled(loop, inner=inner, dynamic=True)
    run(torch.randn(5, 8, requires_grad=True)).sum().backward()
    x = torch.zeros(0, 8, requires_grad=True)
    with record_solves(tensors=tensors, timing=True) as solves:
        run(x).sum().backward()
        fixed_point(lambda z: 0.5 * z + x, torch.zeros(0, 8)).sum().backward()
        fixed_point(lambda z: 0.5 * z + x[:, :0], torch.zeros(0, 0)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 8)
    assert [s.status for s in solves] == ["solve"] * 3
    assert [s.adjoint_residual or 0.0 for s in solves] == [0.0] * 3
    assert (solves[0].adjoint_residual, solves[0].adjoint_residual_mean) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["tensors", "timing"])
@pytest.mark.parametrize("value", ["x", 1, None, torch.ones(())])
def test_arguments_are_bools(name: str, value: Any) -> None:
    """At once, not when the block is entered."""
    with pytest.raises(TypeError, match=f"record_solves: expected {name} to be True or False, got"):
        record_solves(**{name: value})
