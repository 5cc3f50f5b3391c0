"""The solver in torch's own operations, as exported programs have it: iterates, endings and fallbacks of the package's own.

A Python loop stands for the graph's here; tests/behaviour/test_exports.py has the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile.config import Options
from deq_compile.kernels.iteration import CONVERGED, FLOOR, MAX_ITER, NONFINITE
from deq_compile.region.body import BodySpec
from deq_compile.region.forward import solve
from deq_compile.region.in_graph import run_in_graph
from deq_compile.region.modes import Ambient
from deq_compile.region.outputs import Outputs
from deq_compile.region.site import RegionSpec
from deq_compile.region.stop import NormTest

B, D = 6, 24


def in_python(condition: Callable[..., Tensor], turn: Callable[..., Any], carried: Any, others: Any) -> Any:
    while bool(condition(*carried, *others)):
        before = [t.clone() for t in carried]
        found = turn(*carried, *others)
        # Torch refuses a turn that writes to these, or gives one of them back.
        torch.testing.assert_close(list(carried), before, rtol=0, atol=0, equal_nan=True)
        own = {t.data_ptr() for t in (*carried, *others) if t.numel()}
        assert not own & {t.data_ptr() for t in found if t.numel()}
        carried = found
    return carried


def run(f: Callable[..., Tensor], z0: Tensor, operands: list[Tensor], rows: bool = True, **facts: Any) -> Outputs:
    options = facts.pop("options", {})
    spec = RegionSpec(
        body=BodySpec(lambda *given: (f(*given),), "f", Ambient.now(), "eager"), dtypes=(z0.dtype,), orders=((0, 1),),
        iterations=facts.pop("iterations", None), grad=False, config=Options.from_options(options).resolve(), **facts,
    )  # fmt: skip
    with torch.no_grad():
        return Outputs.of(run_in_graph(spec, rows, in_python, [z0], operands, []), 1)


def problem(scale: float) -> tuple[Callable[..., Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(D, D, dtype=torch.float64, generator=generator) * scale / D**0.5
    u = torch.randn(B, D, dtype=torch.float64, generator=generator)
    return lambda z, u, W: torch.tanh(z @ W + u), torch.zeros(B, D, dtype=torch.float64), [u, W]


@pytest.mark.parametrize("memory", [40, 5, 1])
@pytest.mark.parametrize("scale", [0.5, 0.9, 1.4])
@pytest.mark.parametrize("rows", [True, False])
def test_the_iterates_are_the_solvers(scale: float, memory: int, rows: bool) -> None:
    """Restarts included, and ends and counts of every sample."""
    f, z0, operands = problem(scale)
    found = run(f, z0, operands, rows, options={"tol": 1e-7, "memory": memory, "max_iter": 30})
    flat = z0 if rows else z0.reshape(1, -1)
    whole = lambda z: f(z.reshape(B, D), *operands).reshape(z.shape)  # noqa: E731
    wanted = solve(whole, flat, tol=1e-7, memory=memory, max_iter=30)
    good = (wanted.status == CONVERGED) | (wanted.status == FLOOR)
    same = good if rows else good.expand(B)
    torch.testing.assert_close(found.states[0][same], wanted.z.reshape(B, D)[same], rtol=1e-9, atol=1e-9)
    info = found.info if rows else found.info[:1]
    assert info[good, 1].tolist() == wanted.iterations[good].tolist()
    assert info[good, 2].tolist() == wanted.status[good].tolist()


def test_a_sample_that_is_not_finite_harms_no_other() -> None:
    f, z0, (u, W) = problem(0.5)
    u[2] = float("nan")
    found = run(f, z0, [u, W])
    healthy = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(found.states[0][healthy], solve(lambda z: f(z, u, W), z0).z[healthy])
    assert found.info[healthy, 2].tolist() == [CONVERGED] * 5
    assert found.info[2, 2] == NONFINITE
    assert found.states[0][2].isnan().all()  # as from the loop


def test_a_map_without_a_fixed_point_is_not_converged() -> None:
    """The plain iterations stand in, where nobody has a loop of his own."""
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    found = run(lambda z: z + 1.5 + z.sin(), z0, [], options={"max_iter": 20})
    assert (found.info[:, 2] == MAX_ITER).all()
    assert torch.isfinite(found.states[0]).all()


@pytest.mark.parametrize("cap", [5, 100])
def test_the_users_test_ends_the_solve_and_his_cap_the_fallback(cap: int) -> None:
    """`max_iter` of 3 makes the solve miss: then the loop's own iterates follow, to where its test or its cap ends them."""
    f, z0, operands = problem(0.5)
    stop = (NormTest(1e-8, False),)
    solved = run(f, z0, operands, stop=stop, own_tests=stop, own_cap=cap)
    gap = float((f(solved.states[0], *operands) - solved.states[0]).norm())
    assert gap <= 1e-8
    assert (solved.info[:, 2] == CONVERGED).all()
    missed = run(f, z0, operands, stop=stop, own_tests=stop, own_cap=cap, options={"max_iter": 3})
    z, k, done = z0, 0, False
    while k < cap and not done:
        new = f(z, *operands)
        done, z, k = bool((new - z).norm() <= 1e-8), new, k + 1
    assert (k == cap) is (cap == 5)
    assert torch.equal(missed.states[0], z)
    assert missed.info[:, 1].tolist() == [k] * B


def test_a_counted_loop_ends_early_only_where_it_has_converged() -> None:
    """What is left of the way counts, not the last step: with a factor of 0.99 a hundred times the residual is left."""
    z0, target = torch.zeros(B, D, dtype=torch.float64), torch.ones(B, D, dtype=torch.float64)
    for factor, count in ((0.5, 1000), (0.99, 5000), (0.99, 200), (-1.0, 31)):
        found = run(lambda z, t: t + factor * (z - t), z0, [target], iterations=count)  # noqa: B023 (called at once)
        wanted = target + factor**count * (z0 - target)
        assert float((found.states[0] - wanted).norm() / wanted.norm().clamp_min(1)) <= 1.1e-4
        turns = int(found.info[0, 1])
        assert turns == count if factor**count > 1e-2 or factor < 0 else turns < 0.6 * count
