"""Implicit gradients in autograd Functions and hooks: found out by running them on a small problem, and taken for that."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from deq_compile import Reason, Report, record_solves
from deq_compile.families.adjoints import Adjoint, Toy, kind_of
from deq_compile.testing import Backend
from tests.helpers import compiled, largest_error, value_and_grads
from tests.models.attached import IMPLICIT, LEFT_ALONE, NO_FIXED_POINTS, SERIES, TalkativeHook, ThreeTerms


def with_gradient(model: nn.Module, x: Tensor, terms: int | None) -> list[Tensor]:
    """The fixed point in float64, with the implicit gradient, or so many terms of its Neumann series."""
    model, x = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    f = model.f
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(500):
            z = f(z, x)
    start = z.clone().requires_grad_()
    image, out = f(start, x), f(z, x)
    q = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    w = q
    for _ in range((terms or 500) - 1):
        w = q + torch.autograd.grad(image, start, w, retain_graph=True)[0]
    return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], w)]


@pytest.mark.parametrize(("kind", "terms"), [*((kind, None) for kind in IMPLICIT), *SERIES.items()], ids=str)
def test_one_graph_with_the_gradient_that_the_user_means(kind: type[nn.Module], terms: int | None) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 16)
    run, report = compiled(model, tol=1e-7, backward_tol=1e-7)
    found = value_and_grads(run, model, x)
    (region,) = report.regions
    assert region.status == "solve"
    assert region.backward == ("reuse" if terms is None else "jfb" if terms == 1 else "neumann"), str(report)
    assert report.graphs == 1
    for a, b in zip(found, with_gradient(model, x, terms), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_attached_step_is_taken(inner: str) -> None:
    """At a coarse tolerance the user's result is f(z*), one contraction nearer to the fixed point than z* is."""
    torch.manual_seed(0)
    model, x = IMPLICIT[1](), torch.randn(4, 16)
    run, _ = compiled(model, tol=3e-2, backward_tol=1e-6, inner=inner)
    with record_solves(tensors=True) as solves:
        found = value_and_grads(run, model, x)
    (solve,) = solves
    assert solve.z is not None
    torch.testing.assert_close(found[0], model.f(solve.z, x).double(), rtol=1e-5, atol=1e-6)
    right = with_gradient(model, x, None)
    assert (found[0] - right[0]).norm() < 0.8 * (solve.z.double() - right[0]).norm()
    assert largest_error(found, right) < 3e-2


def test_numbers_that_may_change_are_guarded() -> None:
    """Under dynamic=True the number of terms is a symbol: another one is another gradient."""
    torch.manual_seed(0)
    model, x = ThreeTerms(), torch.randn(4, 16)
    report = Report()
    run = torch.compile(model, backend=Backend({"inner": "eager", "tol": 1e-7, "backward_tol": 1e-7}, report), dynamic=True)
    for terms in (3, 2):
        model.terms = terms
        for a, b in zip(value_and_grads(run, model, x), with_gradient(model, x, terms), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [region.backward for region in report.regions] == ["neumann", "neumann"], str(report)


@pytest.mark.parametrize(("kind", "why"), LEFT_ALONE.items(), ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_left_alone_with_the_reason(kind: type[nn.Module], why: str) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 16)
    run, report = compiled(model, tol=None, fullgraph=False)
    found, right = value_and_grads(run, model, x), value_and_grads(model, model, x)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert any(s.reason is Reason.AUTOGRAD_FUNCTION and why in s.detail for s in report.skipped), str(report)


@pytest.mark.parametrize("kind", NO_FIXED_POINTS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_what_a_function_returns_is_what_it_returns(kind: type[nn.Module]) -> None:
    """A gradient that is one of a fixed point says nothing of the value."""
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 16)
    run, _ = compiled(model, tol=None, fullgraph=False)
    for a, b in zip(value_and_grads(run, model, x), value_and_grads(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_trial_of_a_hook_is_not_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    """What it notes, counts, prints and draws is not the user's."""
    torch.manual_seed(0)
    model, x = TalkativeHook(), torch.randn(4, 16)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    run, _ = compiled(model, tol=None, fullgraph=False)
    with torch.no_grad():
        run(x)
    run(x)
    assert model.log == [0]
    assert model.calls == {"count": [0]}
    assert model.seen == 0
    assert not capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_what_is_no_adjoint() -> None:
    """Twice the cotangent, a clipped solve, a solve of another equation, one that raises, and none at all."""

    def solve(toy: Toy, q: Tensor) -> Tensor:
        return toy.terms(q, 100)

    assert kind_of(solve, 2, 1) == Adjoint(1e-6)
    assert kind_of(lambda toy, q: toy.terms(q, 4), 2, 1) == Adjoint(0.0, 4)
    assert kind_of(lambda toy, q: 2 * q, 2, 1) is None
    assert kind_of(lambda toy, q: 2 * toy.terms(q, 100), 2, 1) is None
    assert kind_of(lambda toy, q: None, 2, 1) is None
    assert kind_of(lambda toy, q: q[0, 0, 0, 0, 0, 0, 0], 2, 1) is None
    clipped = kind_of(lambda toy, q: toy.terms(q, 2).clamp(-50, 50), 2, 1)
    assert isinstance(clipped, str)
    loose = kind_of(lambda toy, q: toy.terms(q, 100) * (1 + 3e-3), 2, 1)
    assert isinstance(loose, Adjoint)
    assert loose.tol == pytest.approx(3e-3)
