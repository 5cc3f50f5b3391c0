"""Calls of a solver: recognised by signature and behaviour, with what they return built anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import record_solves, register_solver
from deq_compile.capture.solver_calls import _About, _fill
from deq_compile.families.fields import field
from deq_compile.families.hooks import read_hook
from deq_compile.families.solvers import Family, family_of
from tests.forms import expected
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models import solvers
from tests.models.solvers import HOOKS, SOLVERS

SOLVED = [name for name, form in SOLVERS.items() if form.regions]


@pytest.mark.parametrize("name", SOLVED)
def test_taken_at_its_own_tolerance(name: str) -> None:
    form = SOLVERS[name]
    model, x = form.make()
    run, report = compiled(model, tol=None, backward_tol=None)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert [r.kind for r in report.regions] == [form.kind], str(report)
    assert len(solves) == 1
    assert largest_error(found, reference(model, x)) < 1e-4


def test_families() -> None:
    """What is learnt from trying a function out."""
    assert family_of(solvers.newton_root, 2) is None
    assert family_of(value_and_grads, 2) is None
    for function, absolute, shape in (
        (solvers.forward_iteration, False, ("tuple", "z", "relative floats")),
        (solvers.anderson, False, ("tuple", "z", "relative floats")),
        (solvers.damped, True, "z"),
    ):
        for dims in (2, 3, 4):
            family = family_of(function, dims)
            assert isinstance(family, Family)
            assert (family.absolute, family.shape) == (absolute, shape)
    family = family_of(solvers.broyden, 3)
    assert isinstance(family, Family)
    assert (family.tol, family.cap, family.mode) == ("eps", "threshold", "stop_mode")
    assert dict(family.shape[1:])["result"] == "z"


def test_the_fields_of_a_result_are_true() -> None:
    class Told(solvers.BroydenModel):
        def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
            with torch.no_grad():
                return solvers.broyden(lambda z: self.f(z, x), torch.zeros_like(x), 50, eps=1e-3)

    torch.manual_seed(0)
    model, x = solvers.Form(Told).make()
    run, _ = compiled(model, tol=None)
    with record_solves() as solves:
        result = run(x)
    theirs = model(x)
    assert result.keys() == theirs.keys()
    residual = (model.f(result["result"], x) - result["result"]).norm() / result["result"].norm()
    assert {key: type(value) for key, value in result.items()} == {key: type(value) for key, value in theirs.items()}
    assert [type(value) for value in result["rel_trace"]] == [type(theirs["rel_trace"][-1])]
    assert result["lowest"] == pytest.approx(residual.item(), rel=5e-3)
    assert result["rel_trace"][-1] == pytest.approx(result["lowest"])
    assert result["lowest"] <= 1e-3
    assert type(result["nstep"]) is int
    assert result["nstep"] == solves[0].iterations_max - 1  # it numbers its steps from 0
    assert (result["eps"], result["threshold"], result["prot_break"]) == (1e-3, 50, False)


def test_their_tolerance_is_the_default() -> None:
    model, x = solvers.Form(lambda: solvers.SolverAttribute(tol=1e-2)).make()
    with record_solves() as solves:
        compiled(model, tol=None)[0](x)
        torch._dynamo.reset()
        compiled(model, tol=1e-6)[0](x)
    assert 1e-4 < solves[0].residual <= 1e-2
    assert solves[1].residual <= 1e-6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"f": "h"}, ValueError, "expected f among"),
        ({"z0": 7}, ValueError, "expected z0 among"),
        ({"tol": "accuracy"}, ValueError, "expected tol among"),
        ({"stop_mode": "norm"}, ValueError, "'rel' or 'abs'"),
        ({"f": 0, "z0": 0}, ValueError, "expected f and z0 to be different parameters of solver, .* got 'f' for both"),
        ({"f": "z0"}, ValueError, "expected f and z0 to be different parameters"),
        ({"z0": -3}, ValueError, "expected f and z0 to be different parameters"),
        ({"tol": "z0"}, ValueError, "expected z0 and tol to be different parameters"),
        ({"max_iter": "eps", "tol": "eps"}, ValueError, "expected tol and max_iter to be different parameters"),
        ({"f": None}, ValueError, "expected f among .* got None"),
        ({"f": False}, ValueError, "expected f among .* got False"),
        ({"f": 1.0}, ValueError, "expected f among .* got 1.0"),
        ({"z0": "rest"}, ValueError, "expected z0 among"),
        ({"result": 2.5}, TypeError, "expected result to be None, an index, a key, or a function .* got 2.5"),
        ({"result": True}, TypeError, "expected result to be"),
        ({"result": ["z"]}, TypeError, "expected result to be"),
    ],
)
def test_bad_registration(options: dict[str, Any], error: type[Exception], message: str) -> None:
    def solver(f: Any, z0: Tensor, eps: float = 1e-3, *rest: Any) -> Tensor:
        return f(z0)

    with pytest.raises(error, match=message):
        register_solver(solver, **options)
    with pytest.raises(TypeError, match="plain Python function"):
        register_solver(torch.nn.Linear(2, 2))


# ---- hooks that solve the adjoint


@pytest.mark.parametrize("name", list(HOOKS))
def test_hook_taken_at_its_own_tolerance(name: str) -> None:
    form = HOOKS[name]
    model, x = form.make()
    run, report = compiled(model, tol=None, backward_tol=None)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert [(r.kind, r.backward) for r in report.regions] == [(form.kind, "reuse")], str(report)
    assert "the hook's adjoint solve is taken over" in report.regions[0].notes[0]
    assert len(solves) == 1
    assert solves[0].vjps is not None
    assert largest_error(found, expected(form, x)) < 1e-3


def test_a_hooks_own_tolerance_is_the_default_and_an_option_beats_it() -> None:
    """The loop in the hook has a count only, which stands for 1e-4."""
    for options, low, high in (({"backward_tol": None}, 1e-6, 1e-4), ({"backward_tol": 1e-6}, 0.0, 1e-6)):
        model, x = HOOKS["hook, loop"].make()
        with record_solves() as solves:
            compiled(model, **options)[0](x).sum().backward()
        assert solves[0].adjoint_residual_batch is not None
        assert low <= solves[0].adjoint_residual_batch <= high
        torch._dynamo.reset()


# torch's own: at a graph break, and (2.11) where it traces a hook
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("hooks", ["take", "keep"])
def test_hooks_that_stay(hooks: str) -> None:
    """A hook that scales, and one that would be taken but for `hooks="keep"`: the solve before them is still taken."""
    form = solvers.Form(solvers.HookedScaling) if hooks == "take" else HOOKS["hook, loop"]
    model, x = form.make()
    run, report = compiled(model, fullgraph=False, hooks=hooks)
    found = value_and_grads(run, model, x)
    assert [r.backward for r in report.regions] == ["-"], str(report)
    assert largest_error(found, reference(model, x)) < 1e-4


class OtherStep(solvers.HookedLoop):
    """The hook differentiates something else than the step it is registered on."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.solve(x)
        z = self.f(z, x)
        z0 = z.detach().clone().requires_grad_()
        f0 = self.f(z0, 2 * x)

        def backward_hook(grad: Tensor) -> Tensor:
            w = grad
            for _ in range(100):
                w = torch.autograd.grad(f0, z0, w, retain_graph=True)[0] + grad
            return w

        z.register_hook(backward_hook)
        return z


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_hook_of_another_step_stays() -> None:
    model, x = solvers.Form(OtherStep).make()
    run, report = compiled(model, fullgraph=False)
    found = value_and_grads(run, model, x)
    assert [s.reason.name for s in report.skipped] == ["HOOK"]
    assert largest_error(found, reference(model, x)) < 1e-4


def test_what_counts_as_an_adjoint_solve() -> None:
    """Read off the source: other maps, other results, and more than one map are none."""
    f = z = torch.zeros(1)
    grad = torch.autograd.grad

    def right(q: Any) -> Any:
        return solvers.anderson(lambda w: grad(f, z, w, retain_graph=True)[0] + q, q)[0]

    def minus(q: Any) -> Any:
        return solvers.anderson(lambda w: grad(f, z, w, retain_graph=True)[0] - q, q)[0]

    def scaled(q: Any) -> Any:
        return 2 * solvers.anderson(lambda w: grad(f, z, w, retain_graph=True)[0] + q, q)[0]

    def swapped(q: Any) -> Any:
        return solvers.anderson(lambda w: q + grad(f, z, grad_outputs=w)[0], q)[0]

    def of_q(q: Any) -> Any:
        return solvers.anderson(lambda w: grad(f, z, q, retain_graph=True)[0] + q, q)[0]

    def sometimes(q: Any) -> Any:
        if q.norm() > 1:
            return q
        return solvers.anderson(lambda w: grad(f, z, w, retain_graph=True)[0] + q, q)[0]

    hooks = (right, minus, scaled, swapped, of_q, sometimes)
    assert [hook.__name__ for hook in hooks if read_hook(hook.__code__)] == ["right", "swapped"]


def test_which_loops_count_as_an_adjoint_solve() -> None:
    """A damped one is another map."""
    f = z = torch.zeros(1)
    grad = torch.autograd.grad

    def damped_loop(q: Any) -> Any:
        w = q
        for _ in range(10):
            new = grad(f, z, w)[0] + q
            w = 0.5 * new + 0.5 * w
        return w

    def two_names(q: Any) -> Any:
        w = q
        for _ in range(10):
            new = grad(f, z, w)[0] + q
            if (new - w).norm() < 1e-7:
                break
            w = new
        return w

    assert read_hook(damped_loop.__code__) is None
    loop = read_hook(two_names.__code__)
    assert loop is not None
    assert loop.loop_tol == 1e-7


def within_no_grad(f: Any, x0: Tensor, tol: float = 1e-6, max_iter: int = 80) -> Tensor:
    with torch.no_grad():
        z = x0
        for _ in range(max_iter):
            new = f(z)
            if (new - z).norm() < tol * new.norm():
                break
            z = new
    return z


@torch.no_grad()
def decorated(f: Any, x0: Tensor, tol: float = 1e-6, max_iter: int = 80) -> tuple[Tensor, list[float]]:
    z, residuals = x0, []
    for _ in range(max_iter):
        new = f(z)
        residuals.append(float((new - z).norm() / new.norm()))
        z = new
        if residuals[-1] < tol:
            break
    return z, residuals


def with_gradients(f: Any, x0: Tensor, tol: float = 1e-6, max_iter: int = 80) -> Tensor:
    z = x0
    for _ in range(max_iter):
        new = f(z)
        if (new - z).norm() < tol * new.norm():
            break
        z = new
    return z


@pytest.mark.parametrize("solver", [within_no_grad, decorated, with_gradients])
def test_a_result_has_a_gradient_where_the_solvers_own_has(solver: Any) -> None:
    """A solver that works under no_grad of its own returns a constant."""
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)

    def model(x: Tensor) -> Tensor:
        found = solver(lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x))
        return (found[0] if isinstance(found, tuple) else found) * layer.bias

    run, report = compiled(model, fullgraph=False, tol=None)
    x = torch.randn(3, 4, requires_grad=True)
    mine = torch.autograd.grad(run(x).sum(), [x, layer.bias], allow_unused=True)
    right = torch.autograd.grad(model(x).sum(), [x, layer.bias], allow_unused=True)
    assert len(report.regions) == 1
    assert (mine[0] is None) == (right[0] is None) == (solver is not with_gradients)
    torch.testing.assert_close(mine[1], right[1], rtol=1e-3, atol=1e-4)


def told(f: Any, x0: Tensor, max_iter: int = 50, tol: float = 1e-6, *, m: int) -> tuple[Any, ...]:
    """Every kind of field, and an argument without a default."""
    z, k, gap, trace, images = x0, 0, torch.tensor(1.0), [], []
    for k in range(max_iter):  # noqa: B007
        new = f(z)
        gap, z = (new - z).norm() / new.norm(), new
        trace.append((gap * new.norm()).item())
        images.append(new.flatten()[:m])
        if gap < tol:
            break
    fields = {"count": k + 1, "gap": gap.item(), "ok": bool(gap < tol), "failed": not gap < tol, "name": "picard", "memory": m}
    return z, fields, trace, torch.cat(images), None


def test_fields_are_found_out_by_trying() -> None:
    family = family_of(told, 2, (("m", 3),))
    assert isinstance(family, Family)
    assert family.shape == (
        "tuple",
        "z",
        ("dict", ("count", ("count", 0)), ("gap", "relative number"), ("ok", "converged"), ("failed", "missed"),
         ("name", ("constant", "picard")), ("memory", ("constant", 3))),
        "absolute floats",
        "untold",
        "none",
    )  # fmt: skip
    assert family_of(told, 2) is None, "it cannot be called without its argument"


def test_what_is_a_python_number_stays_one() -> None:
    """Fields that are known by their names: a list, a residual, a count; each as a tensor too."""
    one, seven = torch.tensor(1.0), torch.tensor(7)
    for name, plain, tensor, what in (
        ("rel_trace", [1.0], [one], ("relative floats", "relative list")),
        ("lowest", 1.0, one, ("residual number", "residual")),
        ("n_iter", 7, seven, ("iterations number", "iterations")),
    ):
        assert (field(name, plain, [], None), field(name, tensor, [], None)) == what
    about = _About(torch.tensor([[1e-5, 4.0, 1.0], [2e-5, 6.0, 1.0]]), None, 1e-4, 50, False)
    filled = {what: _fill(what, torch.ones(2, 3), about) for what in ("iterations number", "residual number", "relative floats")}
    assert filled["iterations number"] == 6
    assert [type(value) for value in filled.values()] == [int, float, list]
    assert type(filled["relative floats"][0]) is float


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("use", ["none", "value", "size"])
def test_a_tensor_that_only_the_solver_has(use: str) -> None:
    """It may be returned and dropped; where it is looked at, or asked for its size, the solver itself runs."""
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)

    def model(x: Tensor) -> Tensor:
        z, fields, _, images, _ = told(lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x), m=2)
        assert fields["name"] == "picard"
        if use == "value":
            return z + images.sum()
        return z * images.shape[0] if use == "size" else z

    run, report = compiled(model, fullgraph=False, tol=None)
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(report.regions) == (1 if use == "none" else 0), str(report)
    assert use == "none" or any("only the solver itself can return" in s.detail for s in report.skipped)
