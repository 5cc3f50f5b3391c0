"""What several test files share: compile with a report, and gradients of a fixed linear loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deq_compile import Report
from deq_compile.backend import Backend

# One body evaluation more or less does not change a test's verdict: tight enough that 2e-3 is far away.
TIGHT: dict[str, Any] = {"tol": 1e-6, "backward_tol": 1e-5, "inner": "eager"}


def compiled(
    model: Callable[..., Any], fullgraph: bool = True, dynamic: bool | None = None, **options: Any
) -> tuple[Any, Report]:
    """The model under the backend with TIGHT options, and the report its compilations fill."""
    report = Report()
    backend = Backend({**TIGHT, **options}, report)
    return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic), report


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def value_and_grads(run: Callable[..., Any], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of x, gradients of all parameters (zeros where there is none), in float64; loss (z * c).sum()."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = tensor_of(run(x))
    c = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * c.to(out.dtype)).sum().backward()
    grads = [x.grad, *(p.grad for p in module.parameters())]
    like = [x, *module.parameters()]
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)]
    return [out.detach().double(), *(g.double() for g in filled)]


def reference(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The same in float64 through the user's own loop, in eager mode."""
    double = copy.deepcopy(module).double()
    return value_and_grads(double, double, x.double())


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error of value and gradients; where the reference is 0 the error is absolute."""
    errors = [float((a - b).norm() / (b.norm() if float(b.norm()) > 0 else 1.0)) for a, b in zip(found, expected, strict=True)]
    return max(errors)
