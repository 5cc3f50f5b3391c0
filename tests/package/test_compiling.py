"""Tracing and compiling: one at a time, full collections are rare, frames have room, and what the user set is as it was."""

from __future__ import annotations

import concurrent.futures
import gc
import resource
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deq_compile
from deq_compile import backend as backends
from deq_compile import compiling
from deq_compile.compiling import RARER, alone, in_room, seldom
from deq_compile.testing import Backend
from deq_compile.torch_parts import compile_lock


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_the_users_thresholds_come_back() -> None:
    gc.set_threshold(500, 7, 9)
    with seldom():
        assert gc.get_threshold() == (500, 7, 9 * RARER)
        with seldom():
            assert gc.get_threshold() == (500, 7, 9 * RARER)
        assert gc.get_threshold() == (500, 7, 9 * RARER)
    assert gc.get_threshold() == (500, 7, 9)
    with pytest.raises(ZeroDivisionError), seldom():
        1 / 0  # noqa: B018
    assert gc.get_threshold() == (500, 7, 9)


def test_blocks_of_two_threads_that_overlap() -> None:
    gc.set_threshold(500, 7, 9)
    one, other = seldom(), seldom()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold() == (500, 7, 9 * RARER)
    other.__exit__(None, None, None)
    assert gc.get_threshold() == (500, 7, 9)


@pytest.mark.parametrize("third", [0, 10**9, 2**31 - 1])
def test_any_threshold(third: int) -> None:
    gc.set_threshold(500, 7, third)
    with seldom():
        assert gc.get_threshold()[2] >= third
    assert gc.get_threshold() == (500, 7, third)


def test_what_somebody_sets_meanwhile_stays() -> None:
    with seldom():
        gc.set_threshold(300)
    assert gc.get_threshold()[0] == 300


def test_what_is_passed_on() -> None:
    assert in_room(divmod, 7, 2) == (3, 1)
    assert in_room(sorted, [1, 3], reverse=True) == [3, 1]
    with pytest.raises(ZeroDivisionError):
        in_room(divmod, 7, 0)


def small(a: int = 1, b: int = 2, c: int = 3) -> tuple[int, int, int]:
    d, e, f = a, b, c
    return d, e, f


def faults_at(depth: int) -> int:
    """Pages that the system gives while a call is made a thousand times, so many frames further down."""
    if depth:
        return faults_at(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(1000):
        small()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def worst() -> int:
    return max(faults_at(depth) for depth in range(500))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames are no chunks there")
@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted")
def test_no_call_gives_memory_back_where_frames_have_room() -> None:
    with concurrent.futures.ThreadPoolExecutor() as fresh:  # this thread's frames may have room already
        without, with_it = fresh.submit(worst).result(), fresh.submit(in_room, worst).result()
    assert without >= 1000
    assert with_it < 200


def test_a_trace_and_its_compilation_have_both_and_then_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.set_threshold(800, 11, 12)
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    seen = []
    whole = backends.rewrite_if_possible

    def rewrite(*args: Any) -> Any:
        code = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe())]
        seen.append((gc.get_threshold(), in_room.__code__ in code))
        return whole(*args)

    monkeypatch.setattr(backends, "rewrite_if_possible", rewrite)

    def model(x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            z = torch.tanh(z @ W + x)
        return z

    torch.compile(model, backend=Backend({"inner": "eager"}))(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert seen == [((800, 11, 12 * RARER), True)]
    assert gc.get_threshold() == (800, 11, 12)


def test_bodies_are_compiled_under_dynamos_lock_too() -> None:
    dynamos = compile_lock()
    assert dynamos is not None

    def model(x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            z = torch.cos(z) / 2 + x
        return z

    compiled, x = torch.compile(model, backend=Backend({"inner": "eager"})), torch.ones(2, 3)
    expected = compiled(x)
    deq_compile.reset()  # the model stays, its body is made anew

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        with dynamos:
            waiting = other.submit(compiled, x)
            with pytest.raises(concurrent.futures.TimeoutError):
                waiting.result(0.3)
        assert torch.allclose(waiting.result(60), expected)
        with alone, alone:
            assert not other.submit(dynamos.acquire, False).result(60)
        assert other.submit(dynamos.acquire, False).result(60)
        other.submit(dynamos.release).result(60)


def test_the_lock_is_given_back_as_it_was_taken_though_dynamo_comes_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamos = threading.Lock()
    there: list[bool] = []
    monkeypatch.setattr(compiling, "compile_lock", lambda: dynamos if there else None)
    with alone:
        there.append(True)
        with alone:
            assert dynamos.locked()
        assert not dynamos.locked()
    with pytest.raises(ZeroDivisionError), alone:
        1 / 0  # noqa: B018
    assert not dynamos.locked()
    assert not alone.taken
