"""Every way users write a fixed point: a row for each form, with regions, graph breaks, and errors against float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import Reason, RegionWarning, explain, fixed_point, record_solves
from tests.forms import DOCUMENT, MODELS, document, forms, measure
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.exit_tests import FrozenSamples
from tests.models.exits import FORMS as EXITS
from tests.models.form import Form

# torch's own: where it resumes a frame after a graph break, and where it meets an autograd function
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated:DeprecationWarning"
)

TABLE = {f"{section}: {name}": form for section, name, form in forms()}
SOLVED = [name for name, form in TABLE.items() if form.regions]
LEFT = [name for name, form in TABLE.items() if not form.regions]


@pytest.mark.parametrize("name", SOLVED)
def test_solved(name: str) -> None:
    form = TABLE[name]
    row = measure(form, **form.options)
    assert row.regions == form.regions, row.report
    assert row.kinds == [form.kind]
    assert row.solves >= form.regions
    assert all(place.startswith(MODELS) for place in row.places)
    assert row.value_error < 1e-4
    assert not row.gradient_error > 5e-4  # NaN in evaluation
    if form.refused is not None:
        assert form.refused in row.reasons, row.report


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    """The user's own code runs, and the report says why and where."""
    form = TABLE[name]
    model, x = form.make()
    run, report = compiled(model, fullgraph=form.breaks == 0, **form.options)
    found = value_and_grads(run, model, x)
    assert report.regions == []
    assert largest_error(found, value_and_grads(model, model, x)) < 1e-5
    if form.refused is not None:
        places = [s.location for s in report.skipped if s.reason is form.refused]
        assert any(place.file.startswith(MODELS) and place.line for place in places), str(report)


def test_there_are_twenty_of_torchdeq() -> None:
    assert sum(name.startswith("TorchDEQ") for name in SOLVED) >= 20


def test_the_document_is_up_to_date() -> None:
    """All but the measured numbers. To write it anew: python -m tests.forms"""

    def plain(text: str) -> str:
        return re.sub(r"\| (\de-\d\d|–|0e\+00) ", "| ", text)

    with open(DOCUMENT, encoding="utf-8") as file:
        assert plain(file.read()) == plain(document())


@pytest.mark.parametrize("name", ["for_break", "while_item", "per_sample_all"])
def test_the_users_own_tolerance(name: str) -> None:
    """Without an explicit tolerance the loop's own test says when it is done."""
    model, x = EXITS[name].make()
    run, report = compiled(model, tol=None)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert len(report.regions) == 1
    assert largest_error(found, value_and_grads(model, model, x)) < 1e-4
    assert solves[0].residual < 3e-6


@pytest.mark.parametrize("name", ["for_break_item", "two_states", "allclose"])
def test_dynamic_shapes(name: str) -> None:
    model, x = EXITS[name].make()
    run, report = compiled(model, dynamic=True, tol=None)
    for batch in (4, 7):
        x = x[:1].repeat(batch, 1) + 0.1
        assert largest_error(value_and_grads(run, model, x), value_and_grads(model, model, x)) < 1e-4
    assert len(report.regions) == 1


def test_a_body_that_freezes_samples_keeps_its_own_gradient() -> None:
    """The adjoint residual tells: the fixed point is right and the implicit gradient is nothing, so the loop's is used."""
    model, x = Form(FrozenSamples).make()
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert len(report.regions) == 1
    assert largest_error(found, reference(model, x)) < 1e-4


def test_a_missed_adjoint_is_said_where_no_loop_may_stand_in() -> None:
    model, x = Form(FrozenSamples).make()
    run, _ = compiled(model, verify="never")
    with pytest.warns(RegionWarning, match="missed backward_tol"):
        value_and_grads(run, model, x)


def test_a_missed_adjoint_is_said() -> None:
    def run(x: Tensor) -> Tensor:
        return fixed_point(lambda z: z + 0 * x, torch.zeros(2, 3), max_iter=5)  # every point is fixed

    x = torch.randn(2, 3, requires_grad=True)
    with pytest.warns(RegionWarning, match="missed backward_tol"):
        run(x).sum().backward()
    with pytest.warns(RegionWarning, match="missed backward_tol"):
        compiled(run, tol=None, backward_tol=None)[0](x).sum().backward()


def test_explain_names_the_line(capsys: Any) -> None:
    model, x = EXITS["statistics_kept"].make()
    report = explain(model, inner="eager")(x)
    (skipped,) = report.skipped
    assert skipped.reason is Reason.SIDE_EFFECT
    assert "stats" in skipped.detail
    with open(skipped.location.file, encoding="utf-8") as file:
        assert file.read().splitlines()[skipped.location.line - 1].strip() == "if res < TOL:"
