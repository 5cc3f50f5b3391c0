"""The Triton kernels in Triton's interpreter, against ATen in float64: edge shapes, poisoned buffers, frozen samples, restarts.

The interpreter is chosen when Triton is imported, so these tests need a process that had TRITON_INTERPRET=1 from the start:
`test_triton.py` runs them in one. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_interpreted.py
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import deq_compile.kernels.broyden.gpu as gpu
import deq_compile.kernels.reuse.gpu as reuse_gpu
from deq_compile.kernels.broyden import BroydenState, Factors, factors_of, new_state, step, step_residual
from deq_compile.kernels.broyden.aten import advance as advance_aten
from deq_compile.kernels.broyden.gpu import TritonState
from deq_compile.kernels.broyden.state import coefficient_width
from deq_compile.kernels.device import rehearsal
from deq_compile.kernels.reuse.multisecant import Multisecant, apply_aten, multisecant_aten
from deq_compile.kernels.reuse.reference import apply_transpose_reference
from deq_compile.kernels.tiles import Tiles, tiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("compares with ATen")


@pytest.fixture
def interpreted() -> Iterator[dict[str, Any]]:
    """Both kernel modules; numpy's word on the inf and NaN that are masked away is not wanted."""
    from deq_compile.kernels.broyden import triton_kernels as broyden
    from deq_compile.kernels.reuse import triton_kernels as reuse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # triton 3.6's interpreter turns arrays of one number into numbers
        yield {"broyden": broyden, "reuse": reuse}


TOL = 2.0**-12


def small_tiles(B: int, D: int, steps: int, element_size: int = 4) -> Tiles:
    """The interpreter is slow: small tiles give several of each, at any D."""
    cut = tiles(B, D, steps, element_size)
    return Tiles(cut.BM, 64, 64, 1, D, 2, 4)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "tiles", small_tiles)


def triton_state(
    kernels: dict[str, Any], z0: Tensor, memory: int, form: str, *, factor_dtype: torch.dtype | None = None, **options: Any
) -> TritonState:
    """A state on poisoned buffers with padded rows."""
    B, D = z0.shape
    row = (D + 15) // 16 * 16
    S = torch.full((B, memory + 1, row), math.nan, dtype=factor_dtype or z0.dtype)[:, :, :D]
    C = torch.full((B, memory, coefficient_width(memory)), math.nan, dtype=z0.dtype)
    # Numbers that fp32 holds exactly: Triton passes Python floats as fp32.
    settings = {"eta": 0.125, "tol": TOL, "relative": True, "floor": 0.0, **options}
    state = TritonState.create(z0, S, C, kernels=kernels["broyden"], **settings)
    state.form, state.poll_every = form, 1
    return state


def problem(B: int, D: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(B * 1000 + D)
    a = 0.9 * torch.rand(D, generator=generator, dtype=torch.float64)
    b = torch.randn(B, D, generator=generator, dtype=torch.float64) * torch.linspace(0.02, 1.5, max(B, 1))[:B, None]
    a, b = a.to(dtype), b.to(dtype)
    return (lambda z: torch.tanh(a * z + 0.3 * z.roll(1, 1) + b)), torch.zeros(B, D, dtype=dtype)


def clean(buffer: Tensor) -> Tensor:
    """Without the poison in what is not in use; the reference looks at stored steps and pairs only."""
    return buffer.nan_to_num(0.0)


def run(state: BroydenState, f: Any, z: Tensor, cap: int = 40) -> list[Tensor]:
    seen = [z.clone()]
    while state.running:
        step(state, z, f(z), last=state.evaluations + 1 == cap)
        seen.append(z.clone())
    return seen


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize(("B", "D"), [(1, 1), (3, 127), (2, 128), (1, 129)])
def test_solve_in_float64(form: str, B: int, D: int, interpreted: dict[str, Any]) -> None:
    f, z0 = problem(B, D, torch.float64)
    z, expected_z = z0.clone(), z0.clone()
    state = triton_state(interpreted, z0, 20, form)
    expected = new_state(z0, 20, eta=0.125, tol=TOL)
    iterates, theirs = run(state, f, z), run(expected, f, expected_z)
    assert state.done.tolist() == expected.done.tolist()
    assert state.n.tolist() == expected.n.tolist()
    assert state.iterations.tolist() == expected.iterations.tolist()
    for ours, other in zip(iterates, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.z_best, expected.z_best, rtol=1e-9, atol=1e-10)
    x = torch.randn(B, D, dtype=torch.float64)
    reference = apply_transpose_reference(clean(state.S), clean(state.C), state.n, x)
    for cut in (Tiles(32, 64, 128, 1, D, 2, 4), Tiles(32, 64, 64, -(-D // 48), 48, 2, 4)):
        ours = reuse_gpu.apply_transpose(state, x, interpreted["reuse"], cut)
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize("memory", [1, 3])
def test_restart(form: str, memory: int, interpreted: dict[str, Any]) -> None:
    f, z0 = problem(3, 50, torch.float64)
    z, expected_z = z0.clone(), z0.clone()
    state, expected = triton_state(interpreted, z0, memory, form), new_state(z0, memory, eta=0.125, tol=TOL)
    run(state, f, z)
    run(expected, f, expected_z)
    assert state.n.tolist() == expected.n.tolist()
    torch.testing.assert_close(z, expected_z, rtol=1e-8, atol=1e-9)
    x = torch.randn(3, 50, dtype=torch.float64)
    reference = apply_transpose_reference(expected.S, expected.C, expected.n, x)
    ours = reuse_gpu.apply_transpose(state, x, interpreted["reuse"], Tiles(8, 64, 64, 1, 50, 2, 4))
    torch.testing.assert_close(ours, reference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_low_precision(form: str, dtype: torch.dtype, factor_dtype: torch.dtype, interpreted: dict[str, Any]) -> None:
    """Rounded steps need a few iterations more, and reach the tolerance all the same."""
    f, z0 = problem(3, 100, dtype)
    z = z0.clone()
    state = triton_state(interpreted, z0, 30, form, factor_dtype=factor_dtype, tol=1e-4)
    run(state, f, z)
    assert state.done.tolist() == [1, 1, 1]
    residual = (f(z) - z).norm(dim=1) / f(z).norm(dim=1)
    assert float(residual.max()) <= 1.01e-4
    assert torch.isfinite(state.S[:, : int(state.n.min())].float()).all()


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize("when", [1, 3])
def test_a_failing_sample_harms_no_other(form: str, when: int, interpreted: dict[str, Any]) -> None:
    f, z0 = problem(3, 40, torch.float64)
    results = []
    for fails in (False, True):
        z = z0.clone()
        state = triton_state(interpreted, z0, 12, form, tol=2.0**-7)
        while state.running:
            out = f(z)
            if fails and state.evaluations + 1 == when:
                out[1, 3] = math.nan
            step(state, z, out)
        results.append((z, state))
    (healthy, a), (failing, b) = results
    assert b.done.tolist() == [1, 4, 1]
    for row in (0, 2):
        assert torch.equal(healthy[row], failing[row])
        assert torch.equal(a.z_best[row], b.z_best[row])
    assert torch.isfinite(failing).all()
    if when == 1:  # none was finite: what a plain iteration has is returned
        out = f(z0)[1]
        out[3] = math.nan
        torch.testing.assert_close(b.z_best[1], out, rtol=0, atol=0, equal_nan=True)
    else:
        assert torch.equal(failing[1], b.z_best[1])
    assert b.n[1] == max(when - 2, 0)


@pytest.mark.parametrize("form", ["fused", "split"])
def test_repeats_are_bitwise_equal(form: str, interpreted: dict[str, Any]) -> None:
    f, z0 = problem(2, 150, torch.float32)
    runs = []
    for _ in range(2):
        z = z0.clone()
        run(triton_state(interpreted, z0, 12, form, tol=2.0**-7), f, z)
        runs.append(z)
    assert torch.equal(*runs)


@pytest.mark.parametrize("form", ["fused", "split"])
def test_adjoint_steps_with_a_norm_of_their_own(form: str, interpreted: dict[str, Any]) -> None:
    """advance from zero, then steps on a given residual, stopped by another norm."""
    torch.manual_seed(0)
    A = 0.1 * torch.randn(2, 60, 60, dtype=torch.float64)
    q = torch.randn(2, 60, dtype=torch.float64)
    found = []
    ours = triton_state(interpreted, q, 15, form, tol=2.0**-10)
    for state in (ours, new_state(q, 15, eta=0.125, tol=2.0**-10)):
        w = torch.zeros_like(q)
        if isinstance(state, TritonState):
            state.advance(w, q)
        else:
            advance_aten(state, w, q)
        while state.running:
            r = q + torch.einsum("bij,bi->bj", A, w) - w
            step_residual(state, w, 0.9 * r, r.norm(dim=1) / q.norm(dim=1))
        found.append((w, state.iterations.tolist(), state.done.tolist()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-8, atol=1e-9)
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize(("form", "relative"), [("fused", True), ("fused", False), ("split", True), ("split", False)])
def test_stagnation_and_cap(form: str, relative: bool, interpreted: dict[str, Any]) -> None:
    """A body that jumps to and fro by 1e-7 cannot be solved to 1e-12, and the solver notices below 1e-5."""
    target, z0 = torch.linspace(1.0, 2.0, 20, dtype=torch.float64).repeat(2, 1), torch.zeros(2, 20, dtype=torch.float64)
    outcomes = []
    for ours in (True, False):
        options = {"tol": 1e-12, "floor": 2.0**-16, "relative": relative}
        if ours:
            state: BroydenState = triton_state(interpreted, z0, 30, form, **options)
        else:
            state = new_state(z0, 30, eta=0.125, **options)
        z = z0.clone()
        while state.running and state.evaluations < 20:
            step(state, z, target * (1 + (-1) ** state.evaluations * 1e-7))
        outcomes.append((state.done.tolist(), state.iterations.tolist()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == [2, 2]
    capped, z = triton_state(interpreted, z0, 30, form, tol=1e-12), z0.clone()
    run(capped, lambda z: torch.tanh(0.5 * z.flip(1) + 1), z, cap=3)
    assert capped.done.tolist() == [3, 3]
    assert capped.iterations.tolist() == [3, 3]


def test_no_samples_launch_nothing() -> None:
    state = triton_state({"broyden": None}, torch.zeros(0, 5), 4, "fused")
    step(state, torch.zeros(0, 5), torch.zeros(0, 5))
    assert not state.running
    assert reuse_gpu.apply_transpose(state, torch.zeros(0, 5), None).shape == (0, 5)


def test_polling_asks_every_so_often() -> None:
    """Between two looks the host believes that everything runs."""

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: None

    class Kernels:
        step_fused = Counting()

    state = triton_state({"broyden": Kernels()}, torch.zeros(2, 5), 9, "fused")
    state.poll_every = 4
    state.done.fill_(1)
    z = torch.zeros(2, 5)
    steps = 0
    while state.running:
        step(state, z, z)
        steps += 1
    assert steps == 4


@pytest.mark.parametrize("form", ["fused", "split"])
def test_traffic_and_launches_of_an_iteration(form: str, interpreted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 2n + 8 words of B D from and to the steps, f, z and the best iterate; at most two launches."""
    from triton.runtime.interpreter import InterpreterBuilder

    B, D, n = 2, 96, 5
    f, z0 = problem(B, D, torch.float64)
    z = z0.clone()
    state = triton_state(interpreted, z0, 12, form, tol=1e-14)
    for _ in range(n):
        step(state, z, f(z))
    assert state.n.tolist() == [n, n]
    fz = f(z)
    spans = [(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in (state.S, z, fz, state.z_best)]
    words = launches = 0

    def counting(original: Any, mask_at: int) -> Any:
        def access(self: Any, ptrs: Any, *args: Any) -> Any:
            nonlocal words
            at = ptrs.data[args[mask_at].data.astype(bool)]
            words += sum(int(((at >= lo) & (at < hi)).sum()) for lo, hi in spans)
            return original(self, ptrs, *args)

        return access

    def launched(*args: Any, **kwargs: Any) -> None:
        nonlocal launches
        launches += 1
        run_kernel(*args, **kwargs)

    run_kernel = gpu.launch
    monkeypatch.setattr(gpu, "launch", launched)
    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(InterpreterBuilder, name, counting(getattr(InterpreterBuilder, name), mask_at))
    step(state, z, fz)
    assert 2 * n + 4 <= words / (B * D) <= 2 * n + 8
    assert launches == (1 if form == "fused" else 2)


@pytest.mark.parametrize("form", ["fused", "split"])
def test_through_a_table_of_addresses(form: str, interpreted: dict[str, Any]) -> None:
    """As in a captured graph: other S and C in every solve, counters begun anew by `restart`; bitwise the direct solve."""
    f, z0 = problem(2, 40, torch.float32)
    direct = triton_state(interpreted, z0, 12, form, tol=2.0**-7)
    z = z0.clone()
    run(direct, f, z)
    with rehearsal():
        state = TritonState.for_capture(
            z0, 12, torch.float32, eta=0.125, tol=2.0**-7, relative=True, floor=0.0, limit=40
        )  # fmt: skip
        state.form = form
        z = torch.full_like(z0, math.nan)
        for _ in range(2):
            out = state.outputs()
            S, C = (t.fill_(math.nan) for t in (out.S, out.C))
            summary = torch.zeros(4, dtype=torch.int32)
            state.restart(z, z0, out)
            while bool((state.done == 0).any()):
                step(state, z, f(z))
            state.summarise(summary)
            assert torch.equal(out.z_best, direct.z_best)
            assert torch.equal(out.ints[:, :2], torch.stack([direct.n, direct.iterations, direct.done]))
            assert torch.equal(out.residual, direct.best)
            assert torch.equal(out.solve_info, torch.stack([direct.best, direct.iterations, direct.done], 1))
            for b, n in enumerate(direct.n.tolist()):
                assert torch.equal(S[b, :n], direct.S[b, :n])
                assert torch.equal(C[b, : n - 1, : n - 1].tril(), direct.C[b, : n - 1, : n - 1].tril())
    assert summary.tolist() == [0, 0, int(direct.iterations.max()), 0]


@pytest.mark.parametrize("D", [1, 127, 8192, 8193, 65536, 585000, 5_000_000])
@pytest.mark.parametrize("B", [1, 32, 128])
def test_tiles_cover_a_row(B: int, D: int) -> None:
    for steps in (1, 9, 40, 65):
        cut = tiles(B, D, steps)
        assert steps <= cut.BM
        assert cut.slabs * cut.slab >= D > (cut.slabs - 1) * cut.slab
        assert cut.slabs == 1 or cut.slab % 16 == 0
        assert cut.slabs <= 64


# The operator M and the Gram matrix.


def factors(B: int, D: int, iterations: int, dtype: torch.dtype) -> Factors:
    """Of a finished solve whose samples stopped at different times, on padded rows with NaN in what is not in use."""
    f, z0 = problem(B, D, dtype)
    state, z = new_state(z0, iterations, eta=0.125), z0.clone()
    for k in range(iterations):
        stop = torch.tensor([1.0 if k + 1 < iterations - 2 * b else 0.0 for b in range(B)], dtype=dtype)
        step(state, z, f(z), stop_norm=stop)
    row = (D + 15) // 16 * 16
    S = torch.full((B, iterations + 1, row), math.nan, dtype=dtype)[:, :, :D]
    for b in range(B):
        S[b, : int(state.n[b])] = state.S[b, : int(state.n[b])]
    return factors_of(S, state.C.clone(), state.n)


CUTS = {
    "fused": lambda D: Tiles(16, 64, 64, 1, D, 2, 4),
    "split": lambda D: Tiles(16, 64, 64, -(-D // 48), 48, 2, 4),
}


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize(("B", "D"), [(1, 1), (3, 127), (2, 129)])
def test_type_ii_operator(form: str, B: int, D: int, interpreted: dict[str, Any]) -> None:
    made = factors(B, D, 9 if D > 1 else 2, torch.float64)
    operator = multisecant_aten(made)
    x = torch.randn(B, D, dtype=torch.float64)
    S = made.S.nan_to_num(0.0)  # ATen reads what is not in use
    expected = apply_aten(Multisecant(S=S, V=operator.V, n=made.n, slots_written=made.slots_written), x)
    cut = CUTS[form](D)
    torch.testing.assert_close(reuse_gpu.apply_multisecant(operator, x, interpreted["reuse"], cut), expected)
