"""Anderson acceleration against a dense least-squares version in float64, and what holds for every solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile.kernels.anderson import new_state, step
from deq_compile.region.forward import Solution, solve

pytestmark = pytest.mark.usefixtures("implementation")


def body(D: int, B: int, gain: float = 0.9, dtype: torch.dtype = torch.float64) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(D)
    W = torch.randn(D, D, generator=generator, dtype=torch.float64) * gain / D**0.5
    b = torch.randn(B, D, generator=generator, dtype=torch.float64)
    W, b = W.to(dtype), b.to(dtype)
    return lambda z: torch.tanh(z @ W.T + b)


def reference(f: Callable[[Tensor], Tensor], z: Tensor, memory: int, damping: float, steps: int) -> list[Tensor]:
    """One sample, (1, D): the definition, by lstsq."""
    zs, gs = [z], [f(z) - z]
    for k in range(steps):
        m = min(k, memory)
        ahead = zs[-1] + damping * gs[-1]
        if m:
            dz = torch.stack([zs[-j] - zs[-j - 1] for j in range(1, m + 1)], 2)[0]
            dg = torch.stack([gs[-j] - gs[-j - 1] for j in range(1, m + 1)], 2)[0]
            gamma = torch.linalg.lstsq(dg, gs[-1].T).solution
            ahead = ahead - ((dz + damping * dg) @ gamma).T
        zs.append(ahead)
        gs.append(f(ahead) - ahead)
    return zs


@pytest.mark.parametrize(("memory", "damping"), [(1, 1.0), (3, 0.7), (5, 1.0)])
@pytest.mark.parametrize("D", [31, 127, 128])
def test_iterates_are_those_of_the_definition(D: int, memory: int, damping: float) -> None:
    f = body(D, 1)
    z = torch.zeros(1, D, dtype=torch.float64)
    expected = reference(f, z.clone(), memory, damping, 8)
    state, z = new_state(z, memory, damping)
    for k in range(8):
        torch.testing.assert_close(z, expected[k], rtol=1e-6, atol=1e-8)  # a ridge of 10 eps in the normal equations
        step(state, z, f(z))


def solved(**options: Any) -> Solution:
    return solve(body(65, 5), torch.zeros(5, 65, dtype=torch.float64), solver="anderson", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_converges_faster_than_plain_iteration(dtype: torch.dtype) -> None:
    f, z0 = body(65, 5, 1.2, dtype), torch.zeros(5, 65, dtype=dtype)
    found = solve(f, z0, solver="anderson", tol=1e-5, max_iter=60)
    plain = solve(f, z0, solver="picard", tol=1e-5, max_iter=200)
    assert found.status.tolist() == [1] * 5
    assert found.state is None
    assert int(found.iterations.max()) < int(plain.iterations.max())
    residual = (f(found.z) - found.z).norm(dim=1) / f(found.z).norm(dim=1)
    assert float(residual.max()) <= 1.01e-5


def test_samples_do_not_depend_on_each_other() -> None:
    z0 = torch.zeros(5, 65, dtype=torch.float64)
    f = body(65, 5)
    whole = solve(f, z0, solver="anderson", tol=1e-8, max_iter=60)

    calls = 0

    def spoiled(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = f(z)
        if calls == 4:
            out[2, 7] = math.nan
        return out

    found = solve(spoiled, z0, solver="anderson", tol=1e-8, max_iter=60)
    others = [0, 1, 3, 4]
    assert found.status.tolist() == [1, 1, 4, 1, 1]
    assert torch.equal(found.z[others], whole.z[others])
    assert torch.isfinite(found.z).all()


def test_cap_and_floor() -> None:
    assert solved(tol=1e-14, max_iter=4).status.tolist() == [3] * 5
    assert solved(tol=1e-14, max_iter=4).evaluations == 4
    f = body(65, 5, 0.5, torch.float32)
    found = solve(f, torch.zeros(5, 65), solver="anderson", tol=1e-12, max_iter=100)
    assert set(found.status.tolist()) == {2}
    assert found.evaluations < 60


def test_a_solved_body_stays_solved() -> None:
    """Differences of zero: a fixed point reached exactly must not be left."""
    target = torch.linspace(1, 2, 20, dtype=torch.float64).repeat(3, 1)
    state, z = new_state(torch.zeros_like(target), 4)
    for _ in range(8):
        step(state, z, target)
    assert torch.equal(z, target)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="memory >= 1"):
        new_state(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match=r"damping in \(0, 1\]"):
        new_state(torch.zeros(1, 2), 3, 0.0)
    assert solve(lambda z: z, torch.zeros(0, 3), solver="anderson").z.shape == (0, 3)
