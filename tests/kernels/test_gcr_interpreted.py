"""The adjoint iteration in Triton's interpreter, against ATen in float64; test_triton.py runs it in a process of its own."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import deq_compile.kernels.gcr.gpu as gpu
from deq_compile.kernels import device, gcr, native
from deq_compile.kernels.broyden import Factors, new_state, step
from deq_compile.kernels.broyden.state import coefficient_width
from deq_compile.kernels.gcr import GcrState, move
from deq_compile.kernels.gcr.aten import new_aten_state
from deq_compile.kernels.gcr.gpu import TritonGcr
from deq_compile.kernels.recycle import Shared, Sketch
from deq_compile.kernels.reuse.multisecant import Multisecant, multisecant_aten
from deq_compile.kernels.tiles import Tiles, tiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")
TOL = 2.0**-12  # fp32 holds it exactly: Triton passes Python floats as fp32


@pytest.fixture(autouse=True)
def _quiet(implementation: str) -> Iterator[None]:
    if implementation != "aten":
        pytest.skip("compares with ATen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(params=["whole rows", "two slabs"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(B: int, D: int, steps: int, element_size: int = 4) -> Tiles:
        cut = tiles(B, D, steps, element_size)
        slab = max((D // 2 + 15) // 16 * 16, 16)
        slabs = 1 if request.param == "whole rows" else -(-D // slab)
        return Tiles(cut.BM, 64, 64, slabs, D if slabs == 1 else slab, 2, 4)

    monkeypatch.setattr(gpu, "tiles", small)


def problem(B: int, D: int) -> tuple[Tensor, Tensor, Factors]:
    """J (B, D, D), cotangents, and the factors of a forward solve, all float64; rows of S poisoned where nothing is stored."""
    generator = torch.Generator().manual_seed(B * 1000 + D)
    J = torch.randn(B, D, D, generator=generator, dtype=torch.float64) * 0.4 / D**0.5
    b = torch.randn(B, D, generator=generator, dtype=torch.float64)
    z = torch.zeros(B, D, dtype=torch.float64)
    state = new_state(z, 12, tol=1e-5)
    while state.running:
        step(state, z, b + torch.einsum("bij,bj->bi", J, z), last=state.evaluations == 11)
    q = torch.randn(B, D, generator=generator, dtype=torch.float64)
    q[0] *= 1e-3
    S = torch.full((B, 13, (D + 15) // 16 * 16), math.nan, dtype=torch.float64)[:, :, :D]
    for i, n in enumerate(state.n.tolist()):
        S[i, :n] = state.S[i, :n]
    assert state.C.shape[2] == coefficient_width(12)
    return J, q, Factors(S=S, C=state.C, n=state.n, slots_written=13)


def aten_operator(factors: Factors, dtype: torch.dtype = torch.float64) -> Multisecant:
    clean = Factors(S=factors.S.nan_to_num(0.0), C=factors.C, n=factors.n, slots_written=int(factors.n.max()))
    found = multisecant_aten(clean)
    return Multisecant(S=found.S.to(dtype), V=found.V.to(dtype), n=found.n, slots_written=found.slots_written)


def run(state: GcrState, J: Tensor, cap: int = 30) -> list[Tensor]:
    """The trials at which VJPs were taken."""
    trials = []
    while True:
        trials.append(state.w.clone())
        move(state, torch.einsum("bij,bi->bj", J, state.w), last=state.evaluations + 1 == cap, look=True)
        if state.converged or not state.running:
            return trials


def progress(q: Tensor, tol: float) -> dict[str, Any]:
    from deq_compile.kernels.broyden.state import progress_fields

    return progress_fields(q, tol, relative=True, floor=0.0)


def triton_state(q: Tensor, operator: Multisecant | None, memory: int, tol: float) -> TritonGcr:
    with device.rehearsal():
        kernels = device.triton_kernels("gcr")
        found = TritonGcr.create(q, operator, memory, tol, 0.0, kernels, begin=False)
        for buffer in (found.basis, found.gram, found.squares, found.w, found.true_residual):
            buffer.fill_(math.nan)
        found.restart()
    return found


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize(("B", "D"), [(2, 1), (2, 33)])
@pytest.mark.parametrize("factored", [True, False])
def test_trials_in_float64(B: int, D: int, factored: bool) -> None:
    J, q, factors = problem(B, D)
    expected = new_aten_state(q, aten_operator(factors) if factored else None, 20, progress(q, TOL))
    poisoned = Multisecant(S=factors.S, V=aten_operator(factors).V, n=factors.n, slots_written=13) if factored else None
    ours = triton_state(q, poisoned, 20, TOL)
    theirs, mine = run(expected, J), run(ours, J)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert ours.converged == expected.converged
    torch.testing.assert_close(ours.residuals, expected.residuals, rtol=1e-5, atol=1e-9)
    assert ours.batch == pytest.approx(expected.batch, rel=1e-4)
    exact = torch.linalg.solve(torch.eye(D, dtype=torch.float64) - J.transpose(1, 2), q)
    torch.testing.assert_close(ours.w, exact, rtol=1e-2, atol=1e-2 * float(q.abs().max()))


@pytest.mark.usefixtures("_form")
def test_a_basis_that_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    J, q, _ = problem(2, 40)
    expected, ours = new_aten_state(q, None, 3, progress(q, TOL)), triton_state(q, None, 3, TOL)
    theirs, mine = run(expected, J, 8), run(ours, J, 8)
    assert len(mine) == len(theirs)
    torch.testing.assert_close(mine[-1], theirs[-1], rtol=1e-6, atol=1e-8)
    assert ours.done.tolist() == expected.done.tolist()


@pytest.mark.usefixtures("_form")
def test_a_failing_sample_harms_no_other() -> None:
    J, q, _ = problem(3, 40)
    results = []
    for fails in (False, True):
        state = triton_state(q, None, 12, 0.0)
        for count in range(1, 5):
            jw = torch.einsum("bij,bi->bj", J, state.w)
            if fails and count == 2:
                jw[1, 5] = math.nan
            move(state, jw, last=count == 4, look=True)
        results.append((state.w.clone(), state.done.tolist(), state.z_best.clone()))
    (healthy, codes, _), (failing, failed, best) = results
    assert codes == [3, 3, 3]
    assert failed == [3, 4, 3]
    for row in (0, 2):
        assert torch.equal(healthy[row], failing[row])
    assert torch.equal(failing[1], best[1])
    assert torch.isfinite(failing).all()


@pytest.mark.usefixtures("_form")
def test_nothing_new_begins_again() -> None:
    """J = 0: the first trial is the answer. J = identity: no step says anything."""
    q = torch.randint(-4, 5, (2, 20)).double()  # so that q + w - w is exactly q
    state = triton_state(q, None, 5, 1e-12)
    move(state, torch.zeros_like(q), look=True)
    assert state.converged
    torch.testing.assert_close(state.w, q, rtol=0, atol=0)
    state = triton_state(q, None, 5, 1e-12)
    for _ in range(4):
        move(state, state.w.clone(), look=True)  # r(w) = q whatever w: y = 0
    assert state.n.tolist() == [0, 0]
    assert torch.isfinite(state.w).all()


@pytest.mark.usefixtures("_form")
def test_fp32_and_low_precision_steps_are_repeatable() -> None:
    J, q, factors = problem(2, 50)
    operator = aten_operator(factors, torch.float32)
    operator = Multisecant(S=factors.S.to(torch.bfloat16), V=operator.V, n=operator.n, slots_written=13)
    runs = []
    for _ in range(2):
        state = triton_state(q.float(), operator, 20, 1e-4)
        runs.append(run(state, J.float())[-1])
        assert state.converged
    assert torch.equal(*runs)


def test_no_samples_and_no_compiler() -> None:
    state = triton_state(torch.zeros(0, 5), None, 4, 1e-3)
    move(state, torch.zeros(0, 5), look=True)
    assert state.converged
    assert native.functions(torch.zeros(1)) is None  # the fixture hides the C++ kernels


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("rank", [5, 17])
@pytest.mark.parametrize("factored", [True, False])
def test_trials_that_a_shared_inverse_precedes(factored: bool, rank: int) -> None:
    """w = x + P M r, by the kernels and, with a rank that those do not take, by ATen's products."""
    J, q, factors = problem(3, 33)
    g = torch.Generator().manual_seed(rank)
    A, Y = (0.3 / rank**0.5 * torch.randn(rank, 33, generator=g, dtype=torch.float64) for _ in range(2))
    shared = Shared(A, Y.T.contiguous(), torch.ones(rank))
    operator = aten_operator(factors) if factored else None
    expected = gcr.new_state(q, operator, 20, tol=TOL, shared=shared)
    alone = run(gcr.new_state(q, operator, 20, tol=TOL), J)
    theirs = run(expected, J)
    with device.rehearsal():
        ours = gcr.new_state(q, operator, 20, tol=TOL, shared=shared)
        assert isinstance(ours, TritonGcr)
        assert (ours.products is not None) == (rank <= 16)
        mine = run(ours, J)
    assert not torch.equal(alone[1], theirs[1])
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert ours.converged == expected.converged is True
    exact = torch.linalg.solve(torch.eye(33, dtype=torch.float64) - J.transpose(1, 2), q)
    torch.testing.assert_close(ours.w, exact, rtol=1e-2, atol=1e-2 * float(q.abs().max()))


def test_a_sketch_takes_the_pairs_that_the_kernels_leave() -> None:
    """Images are kept unnormalised there; a pair is an image and its direction all the same."""
    J, q, _ = problem(3, 33)
    with device.rehearsal():
        state = gcr.new_state(q, None, 20, tol=TOL)
        run(state, J)
        sketch = Sketch(4, 20, 0)
        sketch.take(state.basis[..., :33], state.n)
    rows = sketch.rows()
    assert rows is not None
    S, Y = rows
    assert S.shape == (4 * int(state.n.max()), 33)
    assert bool(torch.isfinite(S).all() and torch.isfinite(Y).all())
    A = torch.eye(33, dtype=torch.float64) - J.transpose(1, 2)
    p, image = state.basis[:, 1, 0, :33], state.basis[:, 0, 0, :33]
    torch.testing.assert_close(image, torch.einsum("bij,bj->bi", A, p), rtol=1e-9, atol=1e-12)
