"""A call with a wrong shape or dtype does not get past the checks that these tests run under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deq_compile.kernels import broyden, gcr, reuse
from deq_compile.kernels.reuse.reference import multisecant_reference

TypeCheckError = pytest.importorskip("jaxtyping").TypeCheckError
SHAPES = pytest.importorskip("tests.kernels.shapes").SHAPES

B, D = 3, 5


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def test_every_entry_point_is_checked() -> None:
    for module, name in SHAPES:
        assert hasattr(getattr(module, name), "__checked__"), name
    for place in (broyden, gcr, reuse):
        for name in set(place.__all__) & {name for _, name in SHAPES}:
            assert hasattr(getattr(place, name), "__checked__"), name


WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "another batch": lambda state, _: broyden.step(state, zeros(B, D), zeros(B + 1, D)),
    "another width": lambda state, _: broyden.advance(state, zeros(B, D), zeros(B, D + 1)),
    "one norm for all": lambda state, _: broyden.step(state, zeros(B, D), zeros(B, D), stop_norm=zeros(1)),
    "integers": lambda state, _: broyden.step(state, zeros(B, D), zeros(B, D, dtype=torch.int64)),
    "half precision": lambda state, _: broyden.step(state, zeros(B, D, dtype=torch.float16), zeros(B, D)),
    "a vector": lambda _, adjoint: gcr.move(adjoint, zeros(D)),
    "another number of iterates": lambda *_: multisecant_reference(zeros(4, D), zeros(3, D), 0.0, 0.0),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_calls(call: Callable[[Any, Any], Any]) -> None:
    state, adjoint = broyden.new_state(zeros(B, D), 4), gcr.new_state(torch.ones(B, D), None, 4, tol=1e-3)
    with pytest.raises(TypeCheckError):
        call(state, adjoint)


def test_right_calls() -> None:
    state, z = broyden.new_state(zeros(B, D), 4), zeros(B, D)
    broyden.step(state, z, torch.ones(B, D, dtype=torch.bfloat16), stop_norm=torch.ones(B))
    assert z.abs().sum() > 0
