"""Every way users write a fixed point: a row for each form, with regions, graph breaks, and errors against float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from deq_compile import record_solves
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.exits import FORMS as EXITS
from tests.models.exits import Form
from tests.models.operators import OPERATORS

# torch's own: where it resumes a frame after a graph break, and where it meets an autograd function
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated:DeprecationWarning"
)

MODELS = os.path.join(os.path.dirname(__file__), "models")
FORMS = {**EXITS, **OPERATORS}
SOLVED = [name for name, form in FORMS.items() if form.regions]
LEFT = [name for name, form in FORMS.items() if not form.regions]


def run_form(form: Form, **options: Any) -> tuple[Any, Any, list[Any], list[torch.Tensor], float]:
    model, x = form.make()
    run, report = compiled(model, fullgraph=form.breaks == 0, **{**form.options, **options})
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    return model, report, solves, found, largest_error(found, reference(model, x))


@pytest.mark.parametrize("name", SOLVED)
def test_solved(name: str) -> None:
    form = FORMS[name]
    _, report, solves, _, error = run_form(form)
    assert len(report.regions) == form.regions, str(report)
    assert {r.kind for r in report.regions} == {form.kind}
    assert all(r.status == "solve" and r.location.file.startswith(MODELS) for r in report.regions)
    assert len(solves) >= form.regions
    assert error < 5e-3
    if form.refused is not None:
        assert form.refused in [s.reason for s in report.skipped]


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    """The user's own loop runs, exactly, and the report says why and where."""
    form = FORMS[name]
    model, x = form.make()
    run, report = compiled(model, fullgraph=False)
    found = value_and_grads(run, model, x)
    assert report.regions == []
    assert largest_error(found, value_and_grads(model, model, x)) < 1e-6
    if form.refused is not None:
        assert form.refused in [s.reason for s in report.skipped], str(report)
        assert all(s.location.file.startswith(MODELS) and s.location.line for s in report.skipped)


@pytest.mark.parametrize("name", ["for_break", "while_item", "per_sample_all"])
def test_the_users_own_tolerance(name: str) -> None:
    """Without an explicit tolerance the loop's own test says when it is done, and the cap of its range holds."""
    form = FORMS[name]
    _, report, solves, _, error = run_form(form, tol=None)
    assert len(report.regions) == 1
    assert error < 1e-4
    assert solves[0].residual < 3e-6
