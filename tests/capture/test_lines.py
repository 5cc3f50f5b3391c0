"""Loops that print, log or show a bar are solved, and say it once; where that would not be true they are left alone."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from deq_compile import explain, record_solves
from tests.helpers import compiled, reference, value_and_grads
from tests.models import bars, lines
from tests.models.observations import Told

CALLS = 30


def name_of(kind: Any) -> str:
    return str(kind.__name__)


def said(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines since the last question."""
    found = [*capsys.readouterr().out.splitlines(), *(r.message for r in caplog.records if r.name == lines.log.name)]
    caplog.clear()
    return found


@pytest.mark.parametrize("kind", lines.SERVED, ids=name_of)
def test_one_line_a_solve(kind: type[Told], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """In one graph, for thirty calls; its numbers are the solve's, written as the user's are."""
    torch.manual_seed(0)
    model = kind()
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=None)
    for _ in range(CALLS):
        x = torch.randn(4, 16)
        twin(x)
        (*_, usual) = said(capsys, caplog)
        with record_solves() as solves:
            run(x)
        (line,) = said(capsys, caplog)
        usual = re.sub(r", grad_fn=<\w+>", "", usual)
        assert re.sub(r"[\d.e+-]+", "#", line) == re.sub(r"[\d.e+-]+", "#", usual)
        numbers = [float(number) for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", line)]
        assert any(abs(number - (solves[0].iterations_max or 0)) <= 1 or number < 1e-6 for number in numbers), line
    assert report.graphs == 1
    assert [region.status for region in report.regions] == ["solve"], str(report)
    assert any("said once, after the loop" in note for note in report.regions[0].notes)


@pytest.mark.parametrize("kind", lines.SERVED, ids=name_of)
def test_value_and_gradients(kind: type[Told]) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(4, 16)
    right = reference(model, x)
    run, _ = compiled(model)
    for a, b in zip(value_and_grads(run, model, x), right, strict=True):
        assert float((a - b).norm()) <= 2e-3 * float(b.norm())


@pytest.mark.parametrize("kind", lines.LEFT_ALONE, ids=name_of)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_left_alone(kind: type[Told], capsys: pytest.CaptureFixture[str]) -> None:
    """All its lines, in their order, and its own result; `explain` names a line."""
    torch.manual_seed(0)
    model = kind()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 16)
    run, report = compiled(model, tol=None, fullgraph=False)
    with torch.no_grad():
        for _ in range(2):
            wanted, found = twin(x), run(x)
            torch.testing.assert_close(found, wanted)
    assert not report.regions
    eager, ours = (re.sub(r"\d\.\d+(e-\d+)?", "#", text) for text in _halves(capsys.readouterr().out))
    assert eager == ours
    torch._dynamo.reset()
    assert explain(twin, inner="eager")(x).skipped


def test_a_branch_is_the_users_where_no_line_comes_of_it() -> None:
    """Ten iterations and ten more, with what a function of that name does between them."""
    torch.manual_seed(0)
    model, x = lines.OftenAFunctionOfThatName(), torch.randn(4, 16)
    twin = copy.deepcopy(model)
    run, _ = compiled(model, fullgraph=False)
    with torch.no_grad():
        wanted = twin(x)
        assert float((run(x) - wanted).norm()) < 1e-3 * float(wanted.norm())


def _halves(text: str) -> tuple[str, str]:
    """What was said by the first and by the second of two that take turns."""
    said = text.splitlines()
    turn = len(said) // 4
    assert len(said) == 4 * turn
    return "\n".join(said[:turn] + said[2 * turn : 3 * turn]), "\n".join(said[turn : 2 * turn] + said[3 * turn :])


@pytest.mark.parametrize("kind", bars.SHOW_NOTHING, ids=name_of)
def test_bars_that_show_nothing(kind: type[Told]) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(4, 16)
    right = reference(model, x)
    run, report = compiled(model)
    for a, b in zip(value_and_grads(run, model, x), right, strict=True):
        assert float((a - b).norm()) <= 2e-3 * float(b.norm())
    assert [region.status for region in report.regions] == ["solve"]
    assert any("shows nothing" in note for note in report.regions[0].notes)
    for _ in range(CALLS):
        run(torch.randn(4, 16))
    assert report.graphs <= 2  # with and without gradients


@pytest.mark.parametrize("kind", bars.STAY, ids=name_of)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_bars_that_stay(kind: type[Told], capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(4, 16)
    run, report = compiled(model, fullgraph=False)
    torch.testing.assert_close(run(x), copy.deepcopy(model)(x))
    assert not report.regions
    assert report.skipped
    if kind is bars.BarOverLayers:
        assert capsys.readouterr().err.count("8/8") == 2
    else:
        assert any("tqdm" in skipped.detail for skipped in report.skipped)
