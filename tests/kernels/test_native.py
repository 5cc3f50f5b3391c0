"""What only the C++ kernels do: rows in chunks, work shared over threads, and stepping aside where they cannot be had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_compile.kernels import native
from deq_compile.kernels.broyden import BroydenState, new_state, step
from deq_compile.kernels.broyden.cpu import CpuState
from deq_compile.kernels.reuse import apply_transpose

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
