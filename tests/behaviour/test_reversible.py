"""`solver="reversible"`: two coupled iterations, and the exact gradient of their steps (arXiv 2509.12917)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import fixed_point, record_solves
from deq_compile.config import Options
from deq_compile.region import reversal
from deq_compile.region.body import BodySpec
from deq_compile.region.forward import solve
from deq_compile.region.modes import Ambient
from deq_compile.region.op import solve_op
from deq_compile.region.reversal import reversed_gradient
from deq_compile.region.site import RegionSpec, register
from deq_compile.region.solvers import reversible
from deq_compile.region.verdict import RegionWarning
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.reversible import B, D, Model, errors, gradients, in_turn, layer, leaky, pairs, steps
from tests.region.test_op import body, inputs, key_of

MISSED = "ignore:fixed-point region:deq_compile.region.verdict.RegionWarning"
pytestmark = pytest.mark.filterwarnings(MISSED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("b", [0.5, 0.8])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_its_gradient_is_that_of_the_papers_loop_unrolled(count: int, b: float, dtype: torch.dtype) -> None:
    """Of weight, input and start; 20 pairs are more than can be walked back in one go."""
    *given, q = leaky(0.9, dtype)
    with record_solves() as solves:
        W, x, z0 = given
        z = steps(layer(W, x), z0, 2 * count, relaxation=b)
        found = gradients(z, q, given)
    wide = [t.detach().double().requires_grad_() for t in given]
    z_wide = pairs(layer(*wide[:2]), wide[2], count, b)
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    assert errors([z.detach().double()], [z_wide.detach()]) < limit
    assert errors(found, gradients(z_wide, q.double(), wide)) < limit
    assert solves[0].vjps == 2 * count
    assert solves[0].adjoint_message.startswith("the exact gradient of the iteration's own steps")


def test_each_sample_makes_its_own_number_of_steps() -> None:
    """A batch gives what its samples give alone, values and gradients."""
    W, x, z0, q = leaky(0.6)
    with torch.no_grad():
        x[0] *= 1e3
        z0.mul_(torch.tensor([1.0, 1e-3, 1e3, 1.0])[:, None])

    def solve(rows: slice) -> tuple[Tensor, list[Tensor]]:
        z, info = fixed_point(
            layer(W, x[rows]), z0[rows], solver="reversible", tol=1e-6, max_iter=80, batch="rows", return_info=True
        )
        counts.append(info.iterations)
        return z.detach(), gradients(z, q[rows], (W, x, z0))

    counts: list[Tensor] = []
    z, whole = solve(slice(None))
    alone = [solve(slice(i, i + 1)) for i in range(B)]
    torch.testing.assert_close(z, torch.cat([one for one, _ in alone]), rtol=1e-12, atol=1e-12)
    for k, together in enumerate(whole):
        torch.testing.assert_close(together, sum(each[k] for _, each in alone), rtol=1e-9, atol=1e-9)
    assert len(set(counts[0].tolist())) > 1
    assert counts[0].tolist() == [int(c) for c in torch.cat(counts[1:])]


def test_gradcheck() -> None:
    W, x, z0 = (t.detach()[:2, :2].clone().requires_grad_() for t in leaky(0.9)[:3])

    def run(W: Tensor, x: Tensor, z0: Tensor) -> Tensor:
        return steps(lambda z: torch.tanh(z @ W.T + x), z0, 21)

    torch.autograd.gradcheck(run, (W, x, z0))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", ["fixed_point", "counted", "until close"])
def test_compiled(call: str, inner: str) -> None:
    """The gradient of the steps that were made, to rounding; and within the tolerance that of the user's own loop."""
    model, x = Model(call).double(), torch.randn(B, D, dtype=torch.float64)
    run, report = compiled(model, solver="reversible", backward_tol=None, batch="whole", inner=inner, max_iter=80)
    with record_solves() as solves:
        value_and_grads(run, model, x)
        found = value_and_grads(run, model, x)
    assert [(r.solver, r.backward) for r in report.regions] == [("reversible", "reversible")]
    made = solves[1].iterations_max
    assert solves[1].status == "solve"
    assert solves[1].vjps == made < 60
    assert largest_error(found, value_and_grads(lambda x: in_turn(model, x, made), model, x)) < 1e-10
    assert largest_error(found, reference(Model("counted"), x)) < 1e-5


def test_the_users_own_test_ends_it() -> None:
    """At the term where it holds, which is given: what led there is differentiated, and no step more."""
    model, x = Model("until close").double(), torch.randn(B, D, dtype=torch.float64)
    run, _ = compiled(model, solver="reversible", tol=None, backward_tol=None, max_iter=80)
    with record_solves() as solves:
        value_and_grads(run, model, x)
        found = value_and_grads(run, model, x)
    made = solves[1].vjps
    assert made is not None
    assert solves[1].status == "solve"
    assert made == solves[1].iterations_max - 1
    assert largest_error(found, value_and_grads(lambda x: in_turn(model, x, made), model, x)) < 1e-10


def test_an_attached_step_is_differentiated_with_the_others() -> None:
    """A region that returns f of its last term."""
    (z, w, x), ambient = inputs(), Ambient.now()
    config = Options(solver="reversible", inner="eager", tol=1e-30, max_iter=20, batch="whole").resolve()
    spec = RegionSpec(
        BodySpec(body, "attached", ambient, "eager"), (torch.float64,), ((0, 1),), None, True, config, attached=True
    )
    made, given = register(spec), (w.requires_grad_(), x.requires_grad_(), z.add(0.1).requires_grad_())
    found = solve_op([given[2]], [w, x], [], made.key)[0]
    want = torch.tanh(pairs(lambda z: torch.tanh(z @ w + x), given[2], 10) @ w + x)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert errors(gradients(found, x.detach(), given), gradients(want, x.detach(), given)) < 1e-10


# torch 2.14: opcheck itself reads `.grad` of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    z, w, x = inputs()
    key = key_of(body, 1, None, solver="reversible", backward_tol=None)
    torch.library.opcheck(solve_op, ([z.clone().requires_grad_()], [w.requires_grad_(), x.requires_grad_()], [], key))


def test_memory_is_two_terms_and_a_pair_every_so_many_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves does not depend on the number of steps; beside it, two float64 states every 8 evaluations (float64)."""
    W, x, z0, q = leaky(0.9)
    trails: list[reversal.Trail] = []

    def watched(trail: reversal.Trail, *others: Any) -> reversal.Reversal:
        trails.append(trail)
        return reversed_gradient(trail, *others)

    monkeypatch.setattr("deq_compile.region.steps.reversed_gradient", watched)

    def saved(run: Callable[[], Tensor]) -> int:
        held: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t, held.setdefault(t.data_ptr(), t))[0], lambda t: t):
            z = run()
        gradients(z, q, (W, x, z0))
        return sum(t.numel() for t in held.values())

    few, many = (saved(lambda n=n: steps(layer(W, x), z0, n)) for n in (8, 64))  # type: ignore[misc]
    once = x.numel()  # by the evaluation that looks where gradients go, and freed after it
    assert few == many == W.numel() + x.numel() + z0.numel() + once
    assert saved(lambda: pairs(layer(W, x), z0, 32)) > 6 * saved(lambda: pairs(layer(W, x), z0, 4))
    assert [len(trail.kept) for trail in trails] == [0, 7]
    assert reversible.stride_of(0.8, torch.float64) == 8
    assert [reversible.stride_of(b, torch.float32) for b in (0.5, 0.8, 0.999)] == [28, 12, 2]


def test_without_gradients_nothing_is_kept() -> None:
    W, x, z0, _ = leaky(0.9)
    problem = reversible.Problem(tol=0.0, max_iter=64)
    assert solve(layer(W, x), z0.detach(), problem, solver="reversible").progress.kept == []
    with torch.no_grad():
        assert not steps(layer(W, x), z0, 4).requires_grad


@pytest.mark.parametrize("certified", [True, False])
def test_drift_is_seen_at_the_start_and_the_steps_are_made_again(certified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no pair kept on the way, 60 steps back in float64 end nowhere; without a look at the start the gradient is lost."""
    *given, q = leaky(0.9)
    monkeypatch.setattr(reversible, "stride_of", lambda *_: 0)
    if not certified:
        monkeypatch.setattr(reversal, "_apart", lambda *_: 0.0)
    with record_solves() as solves:
        found = gradients(steps(layer(*given[:2]), given[2], 60), q, given)
    error = errors(found, gradients(pairs(layer(*given[:2]), given[2], 30), q, given))
    assert error < 1e-10 if certified else error > 1e-3
    assert ("1 of 1 stretches were not reversible, and made again" in solves[0].adjoint_message) is certified


def test_an_f_that_stretches_is_differentiated_as_well() -> None:
    """No contraction, no fixed point in reach: still the gradient of what was computed."""
    *given, q = leaky(1.6)
    found = gradients(steps(layer(*given[:2]), given[2], 24), q, given)
    assert errors(found, gradients(pairs(layer(*given[:2]), given[2], 12), q, given)) < 1e-9


def test_an_f_that_draws_is_refused() -> None:
    W, x, z0, q = leaky(0.5)
    z = steps(lambda z: torch.tanh(nn.functional.dropout(z @ W.T, 0.5) + x), z0, 8)
    with pytest.raises(RuntimeError, match="expected f to give the same values in the backward as in the forward"):
        gradients(z, q, (W, x))


def test_what_was_written_to_is_refused() -> None:
    W, x, z0, q = leaky(0.5)
    z = steps(layer(W, x), z0, 8)
    with torch.no_grad():
        W.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(z, q, (W, x))


def test_the_last_term_is_given_and_a_miss_is_said() -> None:
    W, x, z0, _ = leaky(0.9)
    with pytest.warns(RegionWarning, match="missed tol=1e-06 within max_iter=6; their last iterate is used"):
        z = fixed_point(layer(W, x), z0, solver="reversible", tol=1e-6, max_iter=6)
    torch.testing.assert_close(z, pairs(layer(W, x), z0, 3))


def test_other_states() -> None:
    """A dictionary with bfloat16 in it, an odd number of evaluations, no samples at all, and values that are not finite."""
    W, x, z0, _ = leaky(0.5, torch.float32)

    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": torch.tanh(state["a"] @ W.T + x + state["b"].float()), "b": (0.5 * state["a"]).bfloat16()}

    def gradient(x: Tensor, z0: Tensor) -> Tensor:
        state = {"a": z0, "b": z0.bfloat16()}
        found = fixed_point(f if x.shape[0] else lambda s: s, state, solver="reversible", tol=1e-6, max_iter=31)
        return torch.autograd.grad(found["a"].sum() + found["b"].sum(), (x, z0), allow_unused=True)[1]

    assert torch.isfinite(gradient(x, z0)).all()
    none = z0.detach()[:0].requires_grad_()
    assert gradient(x[:0], none).shape == (0, D)
    bad = x.detach().clone()
    bad[1] = torch.nan
    z = fixed_point(layer(W, bad), z0, solver="reversible", max_iter=40)
    assert torch.isfinite(z[[0, 2, 3]]).all()
    assert z[1].isnan().all()


def test_a_forward_whose_steps_got_lost_is_made_again() -> None:
    """Hooks on saved tensors may hand a copy of the ticket on, to which nothing is attached."""
    model, x = Model("fixed_point").double(), torch.randn(B, D, dtype=torch.float64)
    run, _ = compiled(model, solver="reversible", backward_tol=None)
    want = value_and_grads(run, model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        found = value_and_grads(run, model, x)
    assert largest_error(found, want) < 1e-12


def test_batched_cotangents() -> None:
    W, x, z0, q = leaky(0.6)
    z = steps(layer(W, x), z0, 10)
    (each,) = torch.autograd.grad(z, x, torch.stack([q, 2 * q]), is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(z, x, q)
    torch.testing.assert_close(each, torch.stack([one, 2 * one]))
