"""The operator pair by itself: opcheck, gradcheck, and the shapes at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile.config import Options
from deq_compile.region.body import BodySpec
from deq_compile.region.modes import Ambient
from deq_compile.region.op import solve_op
from deq_compile.region.site import RegionSpec, register

TIGHT = {"tol": 1e-11, "backward_tol": 1e-11, "inner": "eager", "verify": "never", "max_iter": 60, "backward_max_iter": 60}


def body(z: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(z @ w + x),)


def pair_body(z: Tensor, y: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return torch.tanh(z @ w + 0.3 * y), torch.tanh(y @ w + 0.5 * z + x)


def key_of(call: Any, states: int, iterations: int | None = None, **options: Any) -> str:
    config = Options.from_options({**TIGHT, **options}).resolve()
    spec = BodySpec(call, f"test-{call.__name__}", Ambient.now(), config.inner)
    orders = ((0, 1),) * states
    return register(RegionSpec(spec, (torch.float64,) * states, orders, iterations, True, config)).key


def inputs(batch: int = 3, d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    w = torch.randn(d, d, dtype=torch.float64)
    w = 0.5 * w / torch.linalg.matrix_norm(w, 2)
    return torch.zeros(batch, d, dtype=torch.float64), w, torch.randn(batch, d, dtype=torch.float64)


@pytest.mark.parametrize(("call", "states"), [(body, 1), (pair_body, 2)])
@pytest.mark.parametrize("iterations", [None, 4])
def test_opcheck(call: Any, states: int, iterations: int | None) -> None:
    z, w, x = inputs()
    # opcheck compares all outputs, so all of S has to be written: memory 1, or no S at all.
    if iterations is None:
        key = key_of(call, states, iterations, memory=1)
    else:  # compared with 4 iterations of the body, the loop is kept
        key = key_of(call, states, iterations, verify="first", backward="jfb")
    start = [z.clone().requires_grad_() for _ in range(states)]
    args = (start, [w.requires_grad_(), x.requires_grad_()], [], key)
    torch.library.opcheck(solve_op, args)
    torch.library.opcheck(solve_op, ([z] * states, [w.detach(), x.detach()], [], key))


@pytest.mark.parametrize(("call", "states"), [(body, 1), (pair_body, 2)])
@pytest.mark.parametrize("iterations", [None, 4])
def test_gradcheck(call: Any, states: int, iterations: int | None) -> None:
    """None: a solve, exact to 1e-11. 4: a kept loop, whose initial state has a gradient."""
    z, w, x = inputs()
    key = key_of(call, states, iterations, verify="never" if iterations is None else "first")
    start = [z.clone() for _ in range(states)]
    if iterations is not None:
        start = [s.add(0.1).requires_grad_() for s in start]

    def run(w: Tensor, x: Tensor, *start: Tensor) -> Tensor:
        out = solve_op(list(start), [w, x], [], key)
        return sum(s * (i + 1) for i, s in enumerate(out[:states]))

    torch.autograd.gradcheck(run, (w.requires_grad_(), x.requires_grad_(), *start))


@pytest.mark.parametrize("options", [{"solver": "picard"}, {"batch": "whole"}, {"batch": "rows"}, {"memory": 4}])
def test_gradcheck_options(options: dict[str, Any]) -> None:
    z, w, x = inputs()
    key = key_of(body, 1, None, **options)
    torch.autograd.gradcheck(
        lambda w, x: solve_op([z], [w, x], [], key)[0], (w.requires_grad_(), x.requires_grad_()), atol=1e-6
    )


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("d", [1, 127, 129])
def test_edges(batch: int, d: int) -> None:
    z, w, x = inputs(batch, d)
    key = key_of(body, 1)
    x.requires_grad_()
    out = solve_op([z], [w, x], [], key)
    torch.testing.assert_close(out[0], torch.tanh(out[0] @ w + x))
    (grad,) = torch.autograd.grad(out[0].sum(), x)
    assert grad.shape == (batch, d)


def test_operands_that_alias() -> None:
    """One tensor as two operands, and a view of it as a third: every gradient counts once."""

    def three(z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(z @ a + b @ c),)

    z, w, x = inputs()
    key = key_of(three, 1)

    def run(w: Tensor, x: Tensor) -> Tensor:
        return solve_op([z], [w, x, w.t()], [], key)[0]

    torch.autograd.gradcheck(run, (w.requires_grad_(), x.requires_grad_()))


def test_factors_are_not_differentiable_and_sized_by_memory() -> None:
    z, w, x = inputs(3, 5)
    key = key_of(body, 1, memory=7)
    state, S, C, n, ticket, _ = solve_op([z], [w.requires_grad_(), x], [], key)
    assert state.requires_grad
    assert not any(t.requires_grad for t in (S, C, n, ticket))
    assert S.numel() == 3 * 8 * 5
    assert C.numel() == 3 * 7 * 16  # rows of C are padded to whole vectors
    assert n.dtype == torch.int32


def test_no_factors_where_the_backward_reuses_none() -> None:
    z, w, x = inputs()
    for options in ({"solver": "picard"}, {"backward": "jfb"}):
        _, S, C, _, _, _ = solve_op([z], [w, x], [], key_of(body, 1, **options))
        assert (S.numel(), C.numel()) == (0, 0)


def test_unused_cotangents_cost_nothing() -> None:
    """Only the second state enters the loss; the first has no cotangent at all."""
    z, w, x = inputs()
    key = key_of(pair_body, 2)
    w.requires_grad_()

    def run(w: Tensor) -> Tensor:
        return solve_op([z, z], [w, x], [], key)[1]

    torch.autograd.gradcheck(run, (w,))
