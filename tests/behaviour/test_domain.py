"""A body that raises where a solver comes and the user's loop does not: the result is the loop's, and it is said."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import Report, fixed_point
from deq_compile.region.verdict import RegionWarning
from deq_compile.testing import Backend

EDGE = 1.5


def body(z: Tensor, x: Tensor, rate: float = 0.3, edge: float = EDGE) -> Tensor:
    """Towards 1 from below, ever slower at first: a secant step from 0 overshoots by far. Defined below the edge."""
    root = torch.linalg.cholesky(torch.diag_embed(edge - z))  # raises where that is not positive
    return z + rate * (1 + x - z**3) + 0.0 * root.sum((-1, -2))[:, None]


def model(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(100):
        z = body(z, x)
    return z


def loop_with_a_test(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(200):
        new = body(z, x)
        if (new - z).norm() < 1e-6 * new.norm():
            break
        z = new
    return z


def inputs() -> Tensor:
    return 0.3 * torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient(f: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = f(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("options", [{}, {"semantics": "equilibrium"}, {"recycle": "always"}, {"solver": "anderson"},
                                     {"solver": "broyden"}, {"warm_start": "previous", "semantics": "equilibrium"},
                                     {"batch": "rows"}, {"batch": "whole"}], ids=str)  # fmt: skip
def test_the_result_is_the_loops(options: dict[str, Any]) -> None:
    holds(model, options)


@pytest.mark.parametrize("options", [{}, {"recycle": "always"}], ids=str)
def test_that_of_a_loop_with_a_test_too(options: dict[str, Any]) -> None:
    holds(loop_with_a_test, options)


def holds(loop: Any, options: dict[str, Any]) -> None:
    expected, wanted = gradient(loop, inputs())
    compiled = torch.compile(loop, backend=Backend({"inner": "eager", **options}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegionWarning)
        for _ in range(4):
            out, grad = gradient(compiled, inputs())
            assert torch.allclose(out, expected, rtol=1e-3)
            assert torch.allclose(grad, wanted, rtol=2e-2)


def test_it_is_said_why_the_loop_is_kept() -> None:
    report = Report()

    def short(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(10):  # where they have come after so many, plain iterations have not converged either
            z = body(z, x, 0.1, 1.2)
        return z

    out, grad = gradient(torch.compile(short, backend=Backend({"inner": "eager", "solver": "broyden"}, report)), inputs())
    expected, wanted = gradient(short, inputs())
    assert torch.allclose(out, expected)
    assert torch.allclose(grad, wanted)
    assert report.regions[0].status == "kept"
    assert "LinAlgError: linalg.cholesky" in str(report)
    assert "at an iterate of the solver's, where the loop itself does not come" in " ".join(str(report).split())


def test_a_declared_fixed_point_goes_on_by_plain_iterations() -> None:
    x = inputs()
    z = fixed_point(lambda z: body(z, x), torch.zeros_like(x), max_iter=200, solver="broyden")
    assert torch.allclose(z, (1 + x) ** (1 / 3), rtol=1e-3)


def test_where_those_miss_too_it_is_said_why() -> None:
    x = inputs()
    with pytest.warns(RegionWarning, match="since the body raised .*LinAlgError"):
        fixed_point(lambda z: body(z, x), torch.zeros_like(x), max_iter=5, tol=1e-10, solver="broyden")


def test_factors_that_are_made_again_are_those_of_a_solve_that_ended_there() -> None:
    x = inputs()
    options = {"inner": "eager", "solver": "broyden", "backward_tol": math.inf, "semantics": "equilibrium"}
    solved = torch.compile(model, backend=Backend(options))
    _, expected = gradient(solved, x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):  # what a forward leaves hangs on tensors
        _, grad = gradient(solved, x)
    assert torch.allclose(grad, expected, rtol=1e-3)


@pytest.mark.parametrize("eager", [True, False])
def test_what_the_loop_itself_raises_is_raised(eager: bool) -> None:
    x = inputs() + 4  # the loop passes the edge
    with pytest.raises(RuntimeError, match="positive-definite"):
        model(x)
    f = (lambda x: fixed_point(lambda z: body(z, x), torch.zeros_like(x))) if eager else torch.compile(
        model, backend=Backend({"inner": "eager"})
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="positive-definite"):
        f(x)


def test_an_error_of_the_first_evaluation_is_raised_at_once() -> None:
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(z)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fixed_point(f, torch.zeros(2, 3), batch="rows")
    assert len(calls) == 1


def test_memory_that_is_not_there_is_no_value() -> None:
    count = []

    def f(z: Tensor) -> Tensor:
        count.append(1)
        if len(count) > 3:
            raise torch.OutOfMemoryError("no memory")
        return 0.9 * z + 1

    with pytest.raises(torch.OutOfMemoryError):
        fixed_point(f, torch.zeros(2, 3), batch="rows")


def test_the_users_assertion_in_a_loop_still_raises() -> None:
    def guarded(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            assert torch.isfinite(z).all(), "diverged"
            z = torch.cos(z) * x
        return z

    compiled = torch.compile(guarded, backend=Backend({"inner": "eager"}))
    assert torch.equal(compiled(inputs()), guarded(inputs()))
    with pytest.raises((AssertionError, RuntimeError), match="diverged"):
        compiled(inputs() * math.nan)


def test_what_a_signal_raises_in_the_body_is_raised() -> None:
    """A timeout is no property of the place where the body happens to be evaluated."""

    class Timeout(Exception):
        pass

    due: list[bool] = []

    def f(z: Tensor) -> Tensor:
        if len(due) == 3:
            due.append(True)
            raise Timeout
        due.append(True)
        return 0.9 * torch.tanh(z) + 1

    with pytest.raises(Timeout):
        fixed_point(f, torch.zeros(2, 3), batch="rows", tol=1e-6)
    assert len(due) == 5  # once more, to see whether it is the place
