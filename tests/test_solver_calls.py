"""Calls of a solver: recognised by signature and behaviour, with what they return built anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import record_solves, register_solver
from deq_compile.capture.solver_family import Family, family_of
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models import solvers
from tests.models.solvers import SOLVERS

SOLVED = [name for name, form in SOLVERS.items() if form.regions]


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("options", [{}, {"tol": None, "backward_tol": None}], ids=["ours", "theirs"])
def test_taken(name: str, options: dict[str, Any]) -> None:
    form = SOLVERS[name]
    model, x = form.make()
    run, report = compiled(model, **options)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert [r.kind for r in report.regions] == [form.kind], str(report)
    assert len(solves) == 1
    assert largest_error(found, reference(model, x)) < 1e-4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_root_finder_is_not_taken() -> None:
    form = SOLVERS["root"]
    model, x = form.make()
    run, report = compiled(model, fullgraph=False)
    found = value_and_grads(run, model, x)
    assert report.regions == []
    assert largest_error(found, value_and_grads(model, model, x)) < 1e-5


def test_families() -> None:
    """What is learnt from trying a function out."""
    assert family_of(solvers.newton_root, 2) is None
    assert family_of(value_and_grads, 2) is None
    for function, absolute, shape in (
        (solvers.forward_iteration, False, ("tuple", "z", "relative list")),
        (solvers.anderson, False, ("tuple", "z", "relative list")),
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
        def forward(self, x: Tensor) -> dict[str, Any]:
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
    torch.testing.assert_close(result["lowest"], residual, rtol=5e-3, atol=0)
    torch.testing.assert_close(result["rel_trace"][-1], result["lowest"])
    assert result["lowest"] <= 1e-3
    assert int(result["nstep"]) == solves[0].iterations_max
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
    ],
)
def test_bad_registration(options: dict[str, Any], error: type[Exception], message: str) -> None:
    def solver(f: Any, z0: Tensor) -> Tensor:
        return f(z0)

    with pytest.raises(error, match=message):
        register_solver(solver, **options)
    with pytest.raises(TypeError, match="plain Python function"):
        register_solver(torch.nn.Linear(2, 2))
