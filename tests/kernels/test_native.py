"""What only the C++ kernels do: rows in chunks, work shared over threads, and stepping aside where they cannot be had."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deq_compile.kernels import native
from deq_compile.kernels.broyden import BroydenState, new_state, step
from deq_compile.kernels.broyden.cpu import CpuState
from deq_compile.kernels.reuse import apply_multisecant, apply_transpose, multisecant

# 8192 elements are a chunk: below, at, one above, several with a remainder
WIDTHS = [1, 15, 16, 8191, 8192, 8193, 3 * 8192 + 5]


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "native":
        pytest.skip("about the C++ kernels")


def solved(B: int, D: int, dtype: torch.dtype, memory: int = 12, steps: int = 6) -> tuple[BroydenState, Tensor]:
    torch.manual_seed(0)
    a, b = 0.9 * torch.rand(D, dtype=dtype), torch.randn(B, D, dtype=dtype)
    z = torch.zeros(B, D, dtype=dtype)
    state = new_state(z, memory, tol=-1.0)
    for _ in range(steps):
        step(state, z, torch.tanh(a * z + 0.3 * z.flip(1) + b))
    return state, z


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [12, 4])
def test_equals_aten(D: int, dtype: torch.dtype, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, z = solved(3, D, dtype, memory)
    assert isinstance(state, CpuState)
    x = torch.randn(3, D, dtype=dtype)
    y = apply_transpose(state, x)
    monkeypatch.setattr(native, "_load", lambda: None)
    expected, z_expected = solved(3, D, dtype, memory)
    assert not isinstance(expected, CpuState)
    assert state.n.tolist() == expected.n.tolist()
    # Six steps of a quasi-Newton method carry rounding on, in fp32 to about 1e-4.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(z, z_expected, **tolerance)
    torch.testing.assert_close(state.best, expected.best, **tolerance)
    if D == 1:
        return  # solved exactly after three steps: what follows are products of rounding errors
    torch.testing.assert_close(y, apply_transpose(expected, x), **tolerance)


@pytest.mark.parametrize(("B", "D"), [(1, 5 * 8192 + 3), (2, 40000), (7, 5000), (64, 600)])
def test_threads_change_no_bit(B: int, D: int) -> None:
    """Rows are shared out where there are enough of them, else the chunks of one row."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state, z = solved(B, D, torch.float32)
        assert isinstance(state, CpuState)
        assert state.struct.threads == threads
        results.append((z, state.best.clone(), apply_transpose(state, torch.ones(B, D))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_repeats_are_bitwise_equal() -> None:
    first, second = solved(5, 1000, torch.float32)[1], solved(5, 1000, torch.float32)[1]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("dtype", "factor_dtype"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_other_factor_dtypes_go_to_aten(dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    assert not isinstance(new_state(torch.zeros(2, 3, dtype=dtype), 4, factor_dtype), CpuState)


def test_a_z_that_is_not_contiguous_is_an_error() -> None:
    state = new_state(torch.zeros(3, 4), 4)
    with pytest.raises(ValueError, match="expected z contiguous"):
        step(state, torch.zeros(4, 3).t(), torch.zeros(3, 4))


def test_switched_off_or_broken_means_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    native._load.cache_clear()
    monkeypatch.setenv("DEQ_COMPILE_NATIVE", "0")
    assert native._load() is None
    monkeypatch.delenv("DEQ_COMPILE_NATIVE")
    native._load.cache_clear()
    monkeypatch.setattr(native, "source", lambda: "this is no C++")
    assert native._load() is None
    assert not isinstance(new_state(torch.zeros(2, 3), 4), CpuState)
    native._load.cache_clear()


def test_what_cpp_reports_is_what_the_tensors_say() -> None:
    """A sample that converges, one that is not finite, and one that is cut off; then three that converge."""
    z0 = torch.zeros(3, 4)
    slow = torch.tensor([0.5, 0.5, 2.0])[:, None]

    def report(f: Callable[[Tensor], Tensor], most: int) -> CpuState:
        state = new_state(z0, 5, tol=1e-4)
        assert isinstance(state, CpuState)
        z = state.iterate(z0)
        while state.running:
            step(state, z, f(z), last=state.evaluations + 1 == most)
        assert torch.equal(state.solve_info(), BroydenState.solve_info(state))
        assert state.all_converged() == BroydenState.all_converged(state)
        return state

    mixed = report(lambda z: torch.tensor([[1.0], [math.nan], [1.0]]) + torch.sin(slow * z), 3)
    assert not mixed.all_converged()
    assert mixed.done.tolist() != [1, 1, 1]
    assert report(lambda z: 1 + 0.5 * torch.sin(z), 30).all_converged()


def test_given_buffers_are_the_factors() -> None:
    torch.manual_seed(0)
    z0, b = torch.zeros(3, 7), torch.randn(3, 7)
    results = []
    for S, C in ((None, None), (torch.empty(3, 5, 7), torch.empty(3, 4, 16)), (torch.empty(3, 5, 7), None)):
        state, z = new_state(z0, 4, S=S, C=C, capacity=1), z0.clone()
        for _ in range(4):
            step(state, z, torch.tanh(0.7 * z.flip(1) + b))
        assert (state.S.shape, state.C.shape) == ((3, 5, 7), (3, 4, 16))
        if S is not None:
            assert state.S.data_ptr() == S.data_ptr()
        results.append((z, state.S[:, :4].clone(), state.C[:, :3].clone()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with pytest.raises(ValueError, match="expected S of shape"):
        new_state(z0, 4, S=torch.empty(3 * 5 * 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [5, 129, 8193])
@pytest.mark.parametrize(("memory", "steps"), [(40, 38), (20, 19), (20, 21), (20, 22), (20, 34)])
def test_room_that_grows_changes_no_bit(D: int, memory: int, steps: int, dtype: torch.dtype) -> None:
    """Up to the last slot, one beyond, and through a restart; a sample that is not finite half way, and stays behind."""
    results = []
    for capacity in (None, 1, 16, 17, 100):
        torch.manual_seed(0)
        a, b = 0.9 * torch.rand(D, dtype=dtype), torch.randn(3, D, dtype=dtype)
        z = torch.zeros(3, D, dtype=dtype)
        state = new_state(z, memory, tol=-1.0, capacity=capacity)
        assert isinstance(state, CpuState)
        assert state.S.shape[1] == 1 + min(capacity or memory, memory)
        for k in range(steps):
            f = torch.tanh(a * z + 0.3 * z.flip(1) + b)
            if k == 12:
                f[1] = math.nan
            step(state, z, f)
        assert state.S.shape[1] <= 1 + max(min(capacity or memory, memory), min(2 * steps, memory))
        lists = [(state.S[i, :n].clone(), state.C[i, : n - 1, : n - 1].clone()) for i, n in enumerate(state.n.tolist())]
        x = torch.ones(3, D, dtype=dtype)
        made = apply_multisecant(multisecant(state), x)
        used = [t for pair in lists for t in pair]
        results.append((z, state.best.clone(), state.n.clone(), apply_transpose(state, x), made, *used))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_steps_equal_aten(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small algebra over one, two and three blocks of columns."""
    torch.manual_seed(0)
    W, b = torch.randn(60, 60, dtype=dtype) / 60**0.5 * 0.6, torch.randn(2, 60, dtype=dtype)
    found = []
    for load in (native._load, lambda: None):
        monkeypatch.setattr(native, "_load", load)
        z = torch.zeros(2, 60, dtype=dtype)
        state = new_state(z, 40, tol=-1.0)
        for _ in range(n):
            step(state, z, torch.tanh(z @ W + b))
        found.append((state.C[:, : n - 1], z))
    (C, z), (expected, at) = found
    torch.testing.assert_close(z, at, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    if n <= 17 and dtype == torch.float64:  # later steps are products of rounding errors
        torch.testing.assert_close(C, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) if n > 1 else 0)
