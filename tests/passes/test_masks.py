"""Masks that freeze what has converged are folded away; masks that do more are left alone."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers import compiled, value_and_grads
from tests.models.masks import DO_MORE, FREEZE, Masked

# Dynamo asks a tensor that it takes over behind a graph break for its gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.mark.parametrize("kind", FREEZE)
def test_a_frozen_sample_is_a_converged_one(kind: type[Masked]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 8)
    twin = copy.deepcopy(model).double()
    run, report = compiled(model, tol=1e-7, backward_tol=1e-7)
    found, right = value_and_grads(run, model, x), value_and_grads(twin, twin, x.double())
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    (region,) = report.regions
    assert region.status == "solve"
    assert len(region.states) == 1


@pytest.mark.parametrize("kind", DO_MORE)
def test_a_mask_that_does_more_is_left_alone(kind: type[Masked]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 8)
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=None, fullgraph=False)
    for a, b in zip(value_and_grads(run, model, x), value_and_grads(twin, twin, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not report.regions
    assert report.skipped
