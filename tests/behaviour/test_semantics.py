"""Results are never changed silently: solve or kept, verdicts, misses, options, and what a backward may be asked to do."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from deq_compile import RegionWarning, record_solves
from deq_compile.region import schedule
from deq_compile.region.kept import iterates_backwards
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.loops import CASES
from tests.models.parts import Case, Linear, Loop, Parts


def contracting(norm: float, n: int) -> tuple[nn.Module, Tensor]:
    """A symmetric body with spectral radius `norm`: slow to converge as that nears 1."""
    torch.manual_seed(0)
    model = Loop(Linear(), n)
    with torch.no_grad():
        a = torch.randn(16, 16)
        a = a + a.t()
        model.f.W.weight.copy_(a * norm / torch.linalg.matrix_norm(a, 2))
        model.f.U.weight.mul_(0.1)
    return model, 0.1 * torch.randn(4, 16)


def test_a_loop_that_has_not_converged_is_kept() -> None:
    model, x = contracting(0.95, 10)
    run, report = compiled(model)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert report.regions[0].status == "kept"
    assert report.regions[0].distance is not None
    assert report.regions[0].distance > 1e-3
    assert re.search(r"kept .*: its result is .* from the fixed point, more than verify_tol=1e-03; with semantics=", str(report))
    assert [s.status for s in solves] == ["kept"]
    assert largest_error(found, reference(model, x)) < 1e-5  # the very call that decided, value and gradient
    found = value_and_grads(run, model, x)
    assert largest_error(found, reference(model, x)) < 1e-5


def test_equilibrium_semantics_means_the_fixed_point() -> None:
    model, x = contracting(0.95, 10)
    run, report = compiled(model, semantics="equilibrium")
    long = copy.deepcopy(model)
    long.n = 2000  # type: ignore[assignment]
    assert largest_error(value_and_grads(run, model, x), reference(long, x)) < 2e-3
    assert report.regions[0].status == "solve"
    assert report.regions[0].distance is None


def test_a_slow_body_gets_a_tighter_tolerance() -> None:
    """200 iterations are at the fixed point to 1e-5; the solve at the default tolerance is not, to verify_tol: its fault."""
    model, x = contracting(0.95, 200)
    run, report = compiled(model, tol=None)
    found = value_and_grads(run, model, x)
    assert report.regions[0].status == "solve"
    assert largest_error(found[:1], reference(model, x)[:1]) < 1e-3
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert solves[0].status == "solve"
    assert largest_error(found[:1], reference(model, x)[:1]) < 1e-3
    loose, report = compiled(copy.deepcopy(model), tol=3e-2)  # said outright: not to be tightened
    value_and_grads(loose, model, x)
    assert report.regions[0].status == "kept"


@pytest.mark.parametrize("memory", [1, 3, 4, 9, 10, 50])
def test_kept_loop_with_little_memory(memory: int) -> None:
    """The same gradient, whatever is stored."""
    model, x = contracting(0.95, 10)
    run, report = compiled(model, loop_memory=memory)
    assert largest_error(value_and_grads(run, model, x), reference(model, x)) < 1e-5
    assert report.regions[0].status == "kept"


def testiterates_backwards_are_those_of_the_loop_and_few_at_a_time() -> None:
    class Doubling:
        applied = 0

        def apply(self, z: Tensor, operands: object) -> Tensor:
            self.applied += 1
            return 2 * z

    for count in (1, 2, 7, 10):
        for memory in (None, 1, 2, 3, 10, 20):
            runner = Doubling()
            found = list(iterates_backwards(runner, torch.ones(1, 1), [], count, memory))  # type: ignore[arg-type]
            assert [int(z) for z in found] == [2**k for k in reversed(range(count))]
            assert runner.applied <= 2 * count


class FromInput(Parts):
    """The initial state needs a gradient, which a solve does not give it and a loop does."""

    n = 7

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(3 * x)
        for _ in range(self.n):
            z = torch.tanh(self.f.W(z) + self.f.U.bias)
        return z


def test_initial_state_of_a_kept_loop_has_a_gradient() -> None:
    model, x = Case(FromInput, 1).make()
    model.f.W.weight.data.mul_(1.9)
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert report.regions[0].status == "kept"
    assert found[1].norm() > 0
    assert largest_error(found, reference(model, x)) < 1e-5


class FromInputInjected(FromInput):
    """The same with x in the body: what the start passes on to it is forgotten."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(3 * self.g.U(x))
        for _ in range(self.n):
            z = torch.tanh(self.f.W(z) + self.f.U(x.detach()))
        return z


def test_initial_state_of_a_solve_has_gradient_zero() -> None:
    model, x = Case(FromInputInjected, 1).make()
    model.n = 60  # type: ignore[assignment]
    run, _ = compiled(model)
    found = value_and_grads(run, model, x)
    assert float(found[1].abs().max()) == 0.0


def test_verdict_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that stops converging in the course of training is noticed at the next verification, in that very call."""
    monkeypatch.setattr(schedule, "VERIFY_EVERY", 3)
    model, x = contracting(0.3, 12)
    run, report = compiled(model)
    for _ in range(4):  # calls 0, 1, 2 and 3 compare
        value_and_grads(run, model, x)
        assert report.regions[0].status == "solve"
    with torch.no_grad():
        model.f.W.weight.mul_(0.97 / 0.3)
    for _ in range(2):
        value_and_grads(run, model, x)
        assert report.regions[0].status == "solve"
    found = value_and_grads(run, model, x)
    assert report.regions[0].status == "kept"
    assert largest_error(found, reference(model, x)) < 1e-5
    with torch.no_grad():
        model.f.W.weight.mul_(0.3 / 0.97)
    for _ in range(3):
        value_and_grads(run, model, x)
    assert report.regions[0].status == "solve"
    assert report.regions[0].kept_reason == ""  # nothing is left of it


def test_verify_never() -> None:
    model, x = contracting(0.95, 10)
    run, report = compiled(model, verify="never")
    value_and_grads(run, model, x)
    assert report.regions[0].status == "solve"


def test_a_miss_warns_once_and_three_go_back_to_the_loop() -> None:
    """Every call gives what the loop gives, value and gradient, whatever the solve came to."""
    model, x = contracting(0.3, 12)
    run, report = compiled(model, max_iter=12)
    for _ in range(5):  # calls 0, 1, 2 and 4 compare
        value_and_grads(run, model, x)
    with torch.no_grad():
        model.f.W.weight.mul_(1.2 / 0.3)
        model.f.U.weight.mul_(50)
    with warnings.catch_warnings(record=True) as caught, record_solves() as solves:
        warnings.simplefilter("always")
        for status in ("solve", "solve", "kept"):
            found = value_and_grads(run, model, x)
            assert largest_error(found, reference(model, x)) < 1e-5
            assert report.regions[0].status == status
    (warning,) = (w for w in caught if w.category is RegionWarning)
    assert re.search(r"missed tol=1e-06 within max_iter=12; the loop's own iterations.*Raise max_iter", str(warning.message))
    assert [(s.status, s.iterations) for s in solves] == [("kept", 12)] * 3
    assert "3 solves in a row missed the tolerance" in str(report)


def test_raw_reuse_is_exactly_one_transposed_application() -> None:
    """backward_tol=inf: w = -H^T q with the H of the forward's steps, and one VJP."""
    model, x = CASES["linear"].make(torch.float64)
    run, _ = compiled(model, backward_tol=float("inf"), tol=1e-10)
    with record_solves(tensors=True) as solves:
        run(x).pow(2).sum().backward()
    (solve,) = solves
    assert solve.vjps == 1
    assert solve.z is not None
    assert solve.cotangent is not None
    # textbook good Broyden, dense, from the same start
    f = copy.deepcopy(model.f).requires_grad_(False)
    for b in range(len(x)):
        z, H = torch.zeros(16, dtype=torch.float64), -torch.eye(16, dtype=torch.float64)
        g = f(z, x[b]) - z
        while g.norm() > 1e-10 * f(z, x[b]).norm():
            s = -H @ g
            new = f(z + s, x[b]) - (z + s)
            y = new - g
            if new.norm() > 1e-10 * f(z + s, x[b]).norm():
                H = H + torch.outer(s - H @ y, s @ H) / (s @ H @ y)
            z, g = z + s, new
        torch.testing.assert_close(z, solve.z[b], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(-H.T @ solve.cotangent[b], solve.w[b], rtol=1e-5, atol=1e-7)  # type: ignore[index]


def test_jacobian_free() -> None:
    model, x = CASES["linear"].make(torch.float64)
    run, _ = compiled(model, backward="jfb")
    with record_solves(tensors=True) as solves:
        found = value_and_grads(run, model, x)
    z = solves[0].z
    assert z is not None
    attached = copy.deepcopy(model)
    expected = value_and_grads(lambda x: attached.f(z, x), attached, x)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-6)
    assert solves[0].vjps == 1


def test_adjoint_residual_is_the_true_one() -> None:
    model, x = CASES["linear"].make(torch.float64)
    for tol in (float("inf"), 1e-1, 1e-8):
        run, _ = compiled(model, backward_tol=tol)
        with record_solves(tensors=True) as solves:
            run(x).pow(2).sum().backward()
        (s,) = solves
        assert s.z is not None
        z = s.z.clone().requires_grad_()
        (jtw,) = torch.autograd.grad(model.f(z, x), z, s.w)
        true = (s.cotangent + jtw - s.w).norm(dim=1) / s.cotangent.norm(dim=1)
        assert s.adjoint_residual == pytest.approx(float(true.max()), rel=1e-9, abs=1e-12)
        assert s.adjoint_residual_mean == pytest.approx(float(true.mean()), rel=1e-9, abs=1e-12)


def test_two_forwards_before_two_backwards() -> None:
    model, x = CASES["linear"].make()
    run, _ = compiled(model)
    y = torch.randn_like(x)
    expected = [reference(model, v) for v in (x, y)]
    model.zero_grad()
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    c = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
    first, second = run(a), run(b)
    (first * c).sum().backward()
    (second * c).sum().backward()
    for got, want in ((a.grad, expected[0][1]), (b.grad, expected[1][1])):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-5)
    both = expected[0][2] + expected[1][2]
    torch.testing.assert_close(next(model.parameters()).grad.double(), both, rtol=2e-3, atol=1e-4)


def test_retain_graph() -> None:
    model, x = CASES["linear"].make()
    run, _ = compiled(model)
    x.requires_grad_()
    out = run(x).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    # The second backward knows how many products the first needed, and takes them in another order.
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_double_backward_raises() -> None:
    model, x = CASES["linear"].make()
    run, _ = compiled(model)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through a fixed-point region is not implemented"):
        grad.sum().backward()


def test_frozen_parameters_and_inputs() -> None:
    model, x = CASES["linear"].make()
    model.f.W.weight.requires_grad_(False)
    run, _ = compiled(model)
    (run(x) ** 2).sum().backward()
    assert model.f.W.weight.grad is None
    assert model.f.W.bias.grad is not None
    assert x.grad is None


def test_two_models_with_one_body_and_two_sets_of_options() -> None:
    model, x = CASES["linear"].make()
    twin = copy.deepcopy(model)
    loose, _ = compiled(model, tol=1e-1, verify="never")
    tight, _ = compiled(twin, tol=1e-6)
    with record_solves() as solves:
        for _ in range(2):
            loose(x)
            tight(x)
    assert solves[0].region != solves[1].region
    assert solves[0].iterations < 6 < solves[1].iterations
    assert solves[2].iterations == solves[0].iterations


def test_same_model_compiled_twice_has_two_sites() -> None:
    model, x = CASES["linear"].make()
    keys = []
    for _ in range(2):
        run, report = compiled(model)
        run(x)
        keys.append(report.regions[0].key)
    assert keys[0] != keys[1]
    assert keys[0].rpartition("-")[0] == keys[1].rpartition("-")[0]


def test_registry_miss_is_one_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"unknown key 'nowhere'.*Fix: compile the model in this process"):
        torch.ops.deq.solve([torch.zeros(2, 3)], [], [], "nowhere")


def test_batch_rows_on_unequal_batches_is_an_error() -> None:
    class Unequal(Parts):
        def forward(self, x: Tensor) -> Tensor:
            z, w = torch.zeros_like(x), torch.zeros(1, 16)
            for _ in range(10):
                z, w = self.f(z, x + w), torch.tanh(self.g.W(w)) + 0.1 * z.mean(0, keepdim=True)
            return z + w

    model, x = Case(Unequal, 1).make()
    run, _ = compiled(model, batch="rows")
    with pytest.raises(ValueError, match="batch size in dimension 0"):
        run(x)
    run, report = compiled(model, semantics="equilibrium")
    run(x)
    assert len(report.regions) == 1


def test_one_bad_sample_leaves_the_others_alone() -> None:
    model, x = CASES["linear"].make()
    run, _ = compiled(model, semantics="equilibrium")
    bad = x.clone()
    bad[1] = float("nan")
    clean = run(x).detach()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = run(bad).detach()
    keep = [0, 2, 3]
    torch.testing.assert_close(found[keep], clean[keep], rtol=1e-5, atol=1e-6)
