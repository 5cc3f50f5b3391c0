"""What Python chooses in later iterations is known, or the loop is left alone: values never tell another iteration's story."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers import compiled
from tests.models.decisions import ALIKE, HELD, OTHERS_LATER, Called, Loop

# Dynamo asks a tensor that it takes over behind a graph break for its gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.mark.parametrize("name", OTHERS_LATER)
def test_what_comes_later_is_not_lost(name: str) -> None:
    torch.manual_seed(0)
    model = Loop(*OTHERS_LATER[name])
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=None, fullgraph=False)
    x = torch.randn(4, 8)
    with torch._dynamo.config.patch(recompile_limit=1):  # for speed: the loop is left to Dynamo
        torch.testing.assert_close(run(x), twin(x))
    assert not report.regions


@pytest.mark.parametrize("name", ALIKE)
def test_what_stays_the_same_is_solved(name: str) -> None:
    torch.manual_seed(0)
    model = Loop(*ALIKE[name])
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=1e-6)
    x = torch.randn(4, 8)
    torch.testing.assert_close(run(x), twin(x), rtol=1e-4, atol=1e-5)
    assert [region.status for region in report.regions] == ["solve"], str(report)


@pytest.mark.parametrize("name", HELD)
def test_a_function_with_a_state_is_no_map(name: str) -> None:
    """It is traced once and would be called many times."""
    torch.manual_seed(0)
    model = Called(HELD[name])
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=None, fullgraph=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            x = torch.randn(4, 8)
            torch.testing.assert_close(run(x), twin(x))
    assert not report.regions
    assert any("changes whenever f is called" in s.detail for s in report.skipped), str(report)
