"""The operator pair by itself: opcheck, gradcheck, and the shapes at the edges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deq_compile.config import Options
from deq_compile.region.body import BodySpec
from deq_compile.region.modes import Ambient
from deq_compile.region.op import solve_op
from deq_compile.region.run import SavedForBackward
from deq_compile.region.site import RegionSpec, Site, register, site

TIGHT = {"tol": 1e-11, "backward_tol": 1e-11, "inner": "eager", "verify": "never", "max_iter": 60, "backward_max_iter": 60}


def body(z: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(z @ w + x),)


def pair_body(z: Tensor, y: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return torch.tanh(z @ w + 0.3 * y), torch.tanh(y @ w + 0.5 * z + x)


_held: list[Site] = []  # by nothing else, since no graph was compiled


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    _held.clear()


def key_of(call: Any, states: int, iterations: int | None = None, **options: Any) -> str:
    config = Options.from_options({**TIGHT, **options}).resolve()
    spec = BodySpec(call, f"test-{call.__name__}", Ambient.now(), config.inner)
    orders = ((0, 1),) * states
    made = register(RegionSpec(spec, (torch.float64,) * states, orders, iterations, True, config))
    _held.append(made)
    return made.key


def inputs(batch: int = 3, d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    w = torch.randn(d, d, dtype=torch.float64)
    w = 0.5 * w / torch.linalg.matrix_norm(w, 2)
    return torch.zeros(batch, d, dtype=torch.float64), w, torch.randn(batch, d, dtype=torch.float64)


# torch 2.14: opcheck itself reads `.grad` of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("call", "states"), [(body, 1), (pair_body, 2)])
@pytest.mark.parametrize("iterations", [None, 4])
def test_opcheck(call: Any, states: int, iterations: int | None) -> None:
    z, w, x = inputs()
    # Compared with 4 iterations of the body, the loop is kept. One solver: a choice between several is another at a later call.
    key = key_of(call, states, iterations, verify="never" if iterations is None else "first", solver="broyden")
    start = [z.clone().requires_grad_() for _ in range(states)]
    args = (start, [w.requires_grad_(), x.requires_grad_()], [], key)  # type: ignore[var-annotated]
    torch.library.opcheck(solve_op, args)
    torch.library.opcheck(solve_op, ([z] * states, [w.detach(), x.detach()], [], key))


def test_opcheck_of_the_backward() -> None:
    z, w, x = inputs()
    key = key_of(pair_body, 2)
    *_, ticket, _, held = solve_op([z, z], [w, x], [], key)
    q = torch.randn_like(z)
    args = ([q, None], [held], ticket, [z, z], [w, x], [], key, [False, False], [True, True])  # type: ignore[var-annotated]
    torch.library.opcheck(torch.ops.deq.solve_backward.default, args)


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
    torch.autograd.gradcheck(lambda w, x: solve_op([z], [w, x], [], key)[0], (w.requires_grad_(), x.requires_grad_()), atol=1e-6)


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


def test_a_mode_that_watches_operators_changes_nothing() -> None:
    """Dispatch modes send the operators around autograd's part, and a body that is run eagerly records its own graph there."""
    z, w, x = inputs()
    key = key_of(body, 1)
    w.requires_grad_()
    found = []
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with mode:
            found.append(torch.autograd.grad(solve_op([z], [w, x], [], key)[0].sum(), w)[0])
    assert found[0].norm() > 0.1
    torch.testing.assert_close(*found)


def left_of(ticket: Tensor) -> SavedForBackward:
    found: SavedForBackward = ticket.saved  # type: ignore[attr-defined]
    return found


def test_what_hangs_on_the_ticket(implementation: str) -> None:
    """Factors as large as the solve needed, up to `memory`; nothing that autograd would differentiate."""
    z, w, x = inputs(3, 5)
    state, ticket, about, _ = solve_op([z], [w.requires_grad_(), x], [], key_of(body, 1, memory=7))
    assert state.requires_grad
    assert not ticket.requires_grad
    assert not about.requires_grad
    factors = left_of(ticket).factors
    assert factors is not None
    assert not any(t.requires_grad for t in (factors.S, factors.C, factors.n))
    assert factors.S.shape == (3, 8, 5)
    assert factors.C.shape == (3, 7, 16)  # rows of C are padded to whole vectors
    assert factors.n.dtype == torch.int32
    z, w, x = inputs(3, 40)
    key = key_of(body, 1)
    for slots in (33, 25):  # a first solve makes room for 16 steps, then for twice as many; the second knows that 24 do
        factors = left_of(solve_op([z], [1.8 * w, x], [], key)[1]).factors
        assert factors is not None
        assert 17 < int(factors.n.max()) <= 24
        assert factors.S.shape[1] == (slots if implementation == "native" else 61)


def test_no_factors_where_the_backward_reuses_none() -> None:
    z, w, x = inputs()
    for options in ({"solver": "picard"}, {"backward": "jfb"}, {"reuse": "never"}):
        ticket = solve_op([z], [w, x], [], key_of(body, 1, **options))[1]
        assert left_of(ticket).factors is None


def test_factors_that_do_not_pay_end_with_the_solve() -> None:
    z, w, x = inputs()
    key = key_of(body, 1)
    site(key).reuse(False)
    site(key).backwards = 1  # the first is due to look again
    assert left_of(solve_op([z], [w, x], [], key)[1]).factors is None
    site(key).reuse(True)
    assert left_of(solve_op([z], [w, x], [], key)[1]).factors is not None


@pytest.mark.parametrize("backward_tol", [1e-11, float("inf")])
def test_a_ticket_that_was_copied_costs_time_only(backward_tol: float) -> None:
    """Hooks on saved tensors may move them, to a disk or another device: then what hung on the ticket is gone."""
    z, w, x = inputs(4, 7)
    w.requires_grad_()
    grads = []
    for pack in (lambda t: t, torch.clone):
        key = key_of(body, 1, backward_tol=backward_tol)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = solve_op([z], [w, x], [], key)[0]
        grads.append(torch.autograd.grad(out.square().sum(), w)[0])
    if backward_tol < 1:
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
    else:  # not the gradient, but what the factors make of it: the solve was repeated, and gave the same
        assert torch.equal(*grads)


def test_unused_cotangents_cost_nothing() -> None:
    """Only the second state enters the loss; the first has no cotangent at all."""
    z, w, x = inputs()
    key = key_of(pair_body, 2)
    w.requires_grad_()

    def run(w: Tensor) -> Tensor:
        return solve_op([z, z], [w, x], [], key)[1]

    torch.autograd.gradcheck(run, (w,))
