"""The steps-only Broyden update against the textbook's, and what freezing, failing and restarting leave intact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deq_compile.kernels.broyden import BroydenState, factors_of, new_state, step, step_residual
from deq_compile.kernels.broyden.cpu import CpuState
from deq_compile.kernels.broyden.reference import dense_broyden
from deq_compile.kernels.iteration import CONVERGED, FLOOR, MAX_ITER, NONFINITE, RUNNING, observe
from deq_compile.kernels.reuse import apply_transpose
from deq_compile.kernels.reuse.reference import apply_transpose_reference

Body = Callable[[Tensor], Tensor]


def tanh_problem(B: int, D: int, gain: float = 0.9, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(D, D, generator=g, dtype=torch.float64) * gain / D**0.5
    return W, torch.randn(B, D, generator=g, dtype=torch.float64)


def used(state: BroydenState) -> Tensor:
    """C (B, M, ...), in C++ with zeros in the rows that no stored pair owns: what stands there is nobody's business.

    ATen's `apply_transpose` has no mask, so there those rows have to be zero already and are returned as they are.
    """
    if not isinstance(state, CpuState):
        return state.C
    rows = torch.arange(state.C.shape[1])[None, :, None] < state.n[:, None, None] - 1
    return torch.where(rows, state.C, 0.0)


def run(body: Body, state: BroydenState, z: Tensor, evaluations: int) -> list[Tensor]:
    """The iterates that were evaluated."""
    seen = []
    for k in range(evaluations):
        seen.append(z.clone())
        step(state, z, body(z), last=k == evaluations - 1)
    return seen


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(("B", "D"), [(1, 1), (5, 2), (1, 127), (5, 128), (5, 129), (5, 31)])
def test_iterates_equal_the_textbooks(B: int, D: int, eta: float) -> None:
    # D = 1: a nonlinear body still takes several steps, but converges to the last bit; fewer are compared.
    evaluations = 4 if D < 3 else 12
    W, b = tanh_problem(B, D)
    z = torch.zeros(B, D, dtype=torch.float64)
    state = new_state(z, 20, eta=eta, tol=-1.0)
    seen = run(lambda z: torch.tanh(z @ W.T + b), state, z, evaluations)
    for i in range(B):
        expected, _ = dense_broyden(lambda z, i=i: torch.tanh(W @ z + b[i]), seen[0][i], evaluations - 1, eta)  # type: ignore[misc]
        for ours, theirs in zip(seen, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-10, atol=1e-11)  # rounding, amplified by 11 steps


def test_large_eta_does_guard() -> None:
    W, b = tanh_problem(5, 31)
    z = torch.zeros(5, 31, dtype=torch.float64)
    plain, guarded = (
        run(lambda z: torch.tanh(z @ W.T + b), new_state(z, 20, eta=eta, tol=-1.0), z.clone(), 12)[-1] for eta in (0.0, 0.9)
    )
    assert (plain - guarded).norm() > 1e-6 * plain.norm()


@pytest.mark.parametrize("memory", [20, 11, 12])
def test_factors_equal_the_dense_inverse(memory: int) -> None:
    W, b = tanh_problem(5, 23)
    z = torch.zeros(5, 23, dtype=torch.float64)
    state = new_state(z, memory, eta=0.5, tol=-1.0)
    run(lambda z: torch.tanh(z @ W.T + b), state, z, 12)
    assert state.n.tolist() == [11] * 5
    x = torch.randn(5, 23, dtype=torch.float64)
    for i in range(5):
        _, H = dense_broyden(lambda z, i=i: torch.tanh(W @ z + b[i]), torch.zeros(23), 11, 0.5)  # type: ignore[misc]
        # eleven rank-one updates in two orders of summation, each of which cond(H) ~ 100 may amplify: 1e-16 becomes 1e-9
        torch.testing.assert_close(apply_transpose(state, x)[i], -H.T @ x[i], rtol=1e-8, atol=1e-9)


def test_zero_and_orthogonal_steps() -> None:
    # Sample 0: the body moves along one axis at a time, so s_k is orthogonal to the new residual: tau = 0, gamma = 1.
    # Sample 1 starts at its fixed point, with a tolerance that nothing reaches: |s| = 0, every update is skipped.
    shift = torch.diag(torch.ones(5, dtype=torch.float64), -1)[:6, :6]
    b = torch.zeros(2, 6, dtype=torch.float64)
    b[0, 0] = 1.0
    z = torch.zeros(2, 6, dtype=torch.float64)
    state = new_state(z, 20, tol=-1.0)
    run(lambda z: z @ shift.T + b, state, z, 6)
    torch.testing.assert_close(z[0], torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=torch.float64))
    assert torch.equal(z[1], torch.zeros(6, dtype=torch.float64))
    assert not used(state)[1].any()
    assert torch.equal(state.C[0, :4].diagonal(), torch.ones(4, dtype=torch.float64))
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(apply_transpose(state, x), apply_transpose_reference(state.S, state.C, state.n, x))


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_garbage_buffers_do_not_leak(factor_dtype: torch.dtype) -> None:
    W, b = (t.float() for t in tanh_problem(5, 31))
    # Sample 0 freezes early, so the others write slots that it never uses; then all restart.
    b[0] = 0
    results = []
    for fill in (0.0, math.nan):
        z = torch.zeros(5, 31)
        S = torch.full((5, 7, 31), fill, dtype=factor_dtype)
        C = torch.full((5, 6, 16), fill)
        state = new_state(z, 6, S=S, C=C, tol=1e-3)
        run(lambda z: torch.tanh(z @ W.T + b), state, z, 9)
        assert state.S is S
        x = torch.randn(5, 31, generator=torch.Generator().manual_seed(1))
        results.append((z, state.z_best, used(state), state.n, apply_transpose(state, x)))
    assert not torch.isnan(results[1][-1]).any()
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def stored(state: BroydenState, i: int) -> list[Tensor]:
    n = int(state.n[i])
    return [state.S[i, :n].clone(), used(state)[i], state.n[i].clone(), state.z_best[i].clone()]


@pytest.mark.parametrize("memory", [40, 5])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_frozen_samples_keep_everything(memory: int, factor_dtype: torch.dtype) -> None:
    # Sample i has gain 0.2 i: they converge one after another, before the restarts (memory 5) and after.
    B, D = 5, 31
    W, b = (t.float() for t in tanh_problem(B, D, gain=1.0))
    gains = torch.arange(B)[:, None] * 0.2

    def body(z: Tensor) -> Tensor:
        return gains * (z @ W.T) + b.where(gains > 0, -0.0)

    z = torch.full((B, D), -0.0)
    state = new_state(z, memory, factor_dtype, tol=1e-4)
    kept: dict[int, list[Tensor]] = {}
    for _ in range(40):
        step(state, z, body(z))
        for i in range(B):
            if state.done[i] and i not in kept:
                kept[i] = [z[i].clone(), *stored(state, i)]
    assert not state.running
    assert len({int(state.iterations[i]) for i in range(B)}) == B
    assert torch.signbit(z[0]).all()  # -0.0 as at the start: frozen at once, and never added to
    for i, before in kept.items():
        for old, new in zip(before, [z[i], *stored(state, i)], strict=True):
            assert torch.equal(old, new)
    x = torch.randn(B, D)
    reference = apply_transpose_reference(state.S, state.C, state.n, x).float()
    torch.testing.assert_close(apply_transpose(state, x), reference, rtol=1e-4, atol=1e-4)  # fp32 dots, |C| up to 1e6
    again = factors_of(state.S, state.C, state.n)
    assert torch.equal(apply_transpose(again, x), apply_transpose(state, x))


def test_early_factors_survive_a_restart() -> None:
    # Samples 0 and 1 converge in a few steps; 2 and 3 go round a memory of 6 several times.
    B, D = 4, 64
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    spectrum = torch.linspace(-0.95, 0.95, D, dtype=torch.float64)
    A = Q @ torch.diag(spectrum) @ Q.T
    gains = torch.tensor([[0.1], [0.3], [1.0], [1.0]], dtype=torch.float64)
    b = torch.randn(B, D, generator=g, dtype=torch.float64)
    x = torch.randn(B, D, generator=g, dtype=torch.float64)

    def solved(memory: int) -> tuple[BroydenState, Tensor]:
        z = torch.zeros(B, D, dtype=torch.float64)
        state = new_state(z, memory, tol=1e-6)
        for _ in range(150):
            if state.running:
                step(state, z, gains * (z @ A) + b)
        return state, apply_transpose(state, x)

    small, product = solved(6)
    large, expected = solved(150)
    assert small.done.tolist() == [CONVERGED] * B
    assert small.iterations.min() <= 7 < small.iterations.max()
    early = small.iterations <= 7
    assert torch.equal(small.n[early], large.n[early])
    torch.testing.assert_close(product[early], expected[early])
    residual = (gains * (small.z_best @ A) + b - small.z_best).norm(dim=1)
    assert (residual <= 2e-6 * small.z_best.norm(dim=1)).all()


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_restart_reaches_tolerance(memory: int) -> None:
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.linspace(-0.95, 0.95, 64, dtype=torch.float64)) @ Q.T
    b = torch.randn(8, 64, generator=g, dtype=torch.float64)
    z = torch.zeros_like(b)
    state = new_state(z, memory, tol=1e-6)
    while state.running and state.evaluations < 250:
        step(state, z, z @ A + b)
        assert state.count <= memory + 1
    assert state.done.tolist() == [CONVERGED] * 8
    assert state.evaluations > memory + 2


@pytest.mark.parametrize("memory", [40, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [1, 2, 5])
def test_a_failing_sample_harms_no_other(when: int, bad: float, memory: int) -> None:
    W, b = (t.float() for t in tanh_problem(5, 31))

    def solved(fails: bool) -> tuple[BroydenState, Tensor, list[Tensor]]:
        z = torch.zeros(5, 31)
        state = new_state(z, memory, tol=1e-5)
        seen = []
        while state.running and state.evaluations < 40:
            seen.append(z.clone())
            f = torch.tanh(z @ W.T + b)
            if fails and len(seen) == when:
                f[2, 3] = bad
            step(state, z, f)
        return state, z, seen

    healthy, z_healthy, _ = solved(False)
    failing, z_failing, seen = solved(True)
    others = torch.tensor([0, 1, 3, 4])
    assert healthy.done.tolist() == [CONVERGED] * 5
    assert failing.done.tolist() == [CONVERGED, CONVERGED, NONFINITE, CONVERGED, CONVERGED]
    assert torch.equal(used(healthy)[others], used(failing)[others])
    for field in ("n", "best", "z_best", "iterations"):
        assert torch.equal(getattr(healthy, field)[others], getattr(failing, field)[others]), field
    assert torch.equal(z_healthy[others], z_failing[others])
    assert failing.iterations[2] == when
    # It is put back to the best iterate before the failure. Where there was none, a plain iteration's is returned: f(z_0).
    assert any(torch.equal(z_failing[2], z[2]) for z in seen[: max(when - 1, 1)])
    f0 = torch.tanh(seen[0] @ W.T + b)[2]
    f0[3] = bad
    torch.testing.assert_close(failing.z_best[2], f0 if when == 1 else z_failing[2], rtol=0, atol=0, equal_nan=True)
    x = torch.randn(5, 31)
    # The step that led there is taken back, from the factors too.
    count = max(when - 2, 0) if when <= memory + 2 else 2 + (when - memory - 3) % memory - 1
    assert failing.n[2] == count
    assert torch.isfinite(failing.S[2, :count]).all()
    assert not used(failing)[2, max(count - 1, 0) :].any()
    expected = apply_transpose_reference(failing.S, failing.C, failing.n, x).float()
    torch.testing.assert_close(apply_transpose(failing, x), expected, rtol=1e-4, atol=1e-4)  # fp32 dots
    assert torch.equal(apply_transpose(healthy, x)[others], apply_transpose(failing, x)[others])


@pytest.mark.parametrize("when", [1, 2, 4, 6, 7, 8])
def test_factors_are_finite_when_the_last_sample_fails(when: int) -> None:
    # Nobody goes on, so nothing overwrites what the failure left in S; after the restart (from 6 on) it would be read.
    W, b = (t.float() for t in tanh_problem(1, 9))
    z = torch.zeros(1, 9)
    state = new_state(z, 4, tol=0.0)
    for k in range(when):
        step(state, z, torch.tanh(z @ W.T + b) if k < when - 1 else torch.full((1, 9), math.nan))
    assert state.done.tolist() == [NONFINITE]
    x = torch.randn(1, 9)
    expected = apply_transpose_reference(state.S, state.C, state.n, x).float()
    torch.testing.assert_close(apply_transpose(state, x), expected, rtol=1e-4, atol=1e-5)  # fp32 dots


def test_a_restart_keeps_the_last_factor() -> None:
    W, b = tanh_problem(3, 17)
    z = torch.zeros(3, 17, dtype=torch.float64)
    state = new_state(z, 2, eta=0.0, tol=0.0)
    for _ in range(3):
        step(state, z, torch.tanh(z @ W.T + b))
    assert state.n.tolist() == [3, 3, 3]
    last, before = state.S[:, 2].clone(), z.clone()
    step(state, z, torch.tanh(z @ W.T + b))
    assert state.n.tolist() == [2, 2, 2]
    assert torch.equal(state.S[:, 0], last)
    torch.testing.assert_close(state.S[:, 1], z - before)
    torch.testing.assert_close(state.C[:, 0, 0], 1 / (last * last).sum(1))
    assert not used(state)[:, 1].any()


def test_overflowing_products_do_not_reach_the_factors() -> None:
    # |s_1|^2 overflows float32, so its pair is skipped: the coefficient is 0, but the row it multiplies is infinite.
    z = torch.zeros(1, 8)
    state = new_state(z, 5, tol=0.0)
    low, high = (torch.arange(8)[None] < 4).float(), (torch.arange(8)[None] >= 4).float()
    for g in (low, 1e30 * high, 1e10 * high):
        step_residual(state, z, g, torch.ones(1))
    assert state.n.tolist() == [3]
    torch.testing.assert_close(state.C[0, :2, :2], torch.tensor([[0.25, 0.0], [0.0, 0.0]]))
    x = torch.randn(1, 8)
    assert torch.isfinite(apply_transpose(state, x)).all()


def test_overflowing_steps_fail_cleanly() -> None:
    # f grows by 1e15 an iteration until float32 squares overflow: the products are infinite before f is.
    z = torch.ones(2, 8)
    factor = torch.tensor([[1e15], [0.5]])
    state = new_state(z, 20, tol=1e-5)
    while state.running and state.evaluations < 30:
        step(state, z, (z.abs() + 1) ** 1.5 * factor.where(factor > 1, 0) + 0.5 * z.where(factor < 1, 0))
    assert state.done[0] == NONFINITE
    assert torch.isfinite(apply_transpose(state, torch.randn(2, 8))).all()
    assert torch.isfinite(state.z_best).all()


def test_half_precision_factors_hold_the_steps_taken() -> None:
    W, b = (t.float() for t in tanh_problem(3, 64))
    z = torch.zeros(3, 64)
    state = new_state(z, 20, torch.bfloat16, tol=1e-4)
    seen = run(lambda z: torch.tanh(z @ W.T + b), state, z, 8)
    for k in range(7):
        torch.testing.assert_close(seen[k + 1] - seen[k], state.S[:, k].float(), rtol=0, atol=1e-6)  # one fp32 rounding
    big = new_state(torch.zeros(1, 4), 2, torch.float16, tol=1e-4)
    step(big, torch.zeros(1, 4), torch.full((1, 4), 1e6))
    assert torch.equal(big.S[:, 0], torch.full((1, 4), 65504.0, dtype=torch.float16))


def test_stop_norm_overrides_the_residual() -> None:
    z = torch.zeros(3, 4)
    state = new_state(z, 5, tol=0.1)
    step(state, z, torch.ones(3, 4), stop_norm=torch.tensor([0.05, 0.2, 0.1]))
    assert state.done.tolist() == [CONVERGED, RUNNING, CONVERGED]
    assert torch.equal(z, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4))
    step_residual(state, z, torch.zeros(3, 4), torch.tensor([9.0, 0.01, 9.0]), last=True)
    assert state.done.tolist() == [CONVERGED] * 3
    torch.testing.assert_close(state.best, torch.tensor([0.05, 0.01, 0.1]))


def test_stagnation_is_each_samples_own() -> None:
    # Sample 0 sits below the floor from the start, 1 sinks below it at the fourth evaluation, 2 gains, 3 is above.
    state = new_state(torch.zeros(4, 1), 5, tol=0.0, floor=1.0)
    z = torch.zeros(4, 1)
    for k in range(12):
        norms = torch.tensor([0.5, 0.5 if k >= 3 else 2.0, 0.8**k, 2.0])
        observe(state, z, norms, last=k == 11)
    assert state.done.tolist() == [FLOOR, FLOOR, MAX_ITER, MAX_ITER]
    assert state.iterations.tolist() == [6, 9, 12, 12]


@pytest.mark.parametrize("relative", [True, False])
def test_floor_is_relative_in_both_modes(relative: bool) -> None:
    state = new_state(torch.zeros(2, 1), 5, tol=0.0, floor=1e-3, relative=relative)
    for k in range(12):
        observe(state, torch.zeros(2, 1), torch.tensor([1.0, 1.0]), torch.tensor([1e4, 1e2]), last=k == 11)
    assert state.done.tolist() == [FLOOR, MAX_ITER]


def test_wrong_arguments_are_named() -> None:
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"z0 of shape \(B, D\)"):
        new_state(torch.zeros(2, 3, 4), 5)
    with pytest.raises(ValueError, match="float16"):
        new_state(z.half(), 5)
    with pytest.raises(ValueError, match="memory >= 1, got 0"):
        new_state(z, 0)
    with pytest.raises(ValueError, match="eta"):
        new_state(z, 5, eta=1.0)
    with pytest.raises(ValueError, match="factor_dtype"):
        new_state(z, 5, torch.int8)
    with pytest.raises(ValueError, match=r"expected S of shape \(2, 6, 3\)"):
        new_state(z, 5, S=torch.empty(2, 5, 3))
    with pytest.raises(ValueError, match="expected C contiguous"):
        new_state(z, 5, C=torch.empty(2, 5, 5, dtype=torch.float64))
