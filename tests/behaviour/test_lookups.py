"""A body that looks up by what its state says runs where an index out of bounds is an error, and not the end of the process."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from deq_compile.region import lookups
from deq_compile.region.verdict import RegionWarning
from deq_compile.testing import Backend
from tests.fresh import python

TABLE = torch.linspace(0, 0.01, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "unsafe"),
    [
        (lambda z, t, i: z + t[(10 * z).long()], True),
        (lambda z, t, i: z + F.embedding((10 * z).int(), t[:, None])[..., 0], True),
        (lambda z, t, i: z + t.gather(0, (10 * z[0]).long() + i), True),
        (lambda z, t, i: z + t[(10 * z.max(1, keepdim=True).values).long()], True),
        (lambda z, t, i: z.index_add(1, (z[0] * 2).long(), z), True),
        (lambda z, t, i: z + t[(10 * z).long().clamp(0, 15)], False),
        (lambda z, t, i: z + t[(10 * z).clamp(0, 1.5).long()], False),
        (lambda z, t, i: z + t[z.argmax(1, keepdim=True)], False),
        (lambda z, t, i: z.gather(1, z.topk(2).indices).sum() + z, False),
        (lambda z, t, i: z + t[i], False),
        (lambda z, t, i: z + t[torch.where(z < 1.5, (10 * z).long(), 0)], False),
        (lambda z, t, i: z.cummax(1).values + t[z.cummax(1).indices], False),
        (lambda z, t, i: torch.tanh(z), False),
    ],
)
def test_such_lookups_are_told(f: Callable[..., Tensor], unsafe: bool) -> None:
    graph = make_fx(f, tracing_mode="fake")(torch.rand(4, 3, dtype=torch.float64), TABLE, torch.arange(3))
    assert lookups.by_state(graph) is unsafe


def loop(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = z + 0.3 * (1 + x - z**3) + TABLE[(z.detach() * 10).long()]
    return z


def inputs(batch: int = 4) -> Tensor:
    return 0.3 * torch.rand(batch, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_result_is_the_loops_by_inductor_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegionWarning)
        compiled = torch.compile(loop, backend=Backend({"solver": "broyden"}))
        with torch.no_grad():
            for _ in range(2):
                assert torch.allclose(compiled(inputs()), loop(inputs()), rtol=1e-3)


@pytest.mark.thorough
def test_the_process_goes_on_with_two_threads() -> None:
    program = """
import torch
from tests.behaviour.test_lookups import inputs, loop
torch.set_num_threads(2)
compiled = torch.compile(loop, backend="deq")
with torch.no_grad():
    for _ in range(2):
        assert torch.allclose(compiled(inputs(256)), loop(inputs(256)), rtol=1e-3)
print("done")
"""
    done = python(program, "torch")
    assert "done" in done.stdout, done.stdout + done.stderr
