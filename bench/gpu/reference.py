"""The value and the gradient that every way is held against: the fixed point and its implicit gradient in float64.

Plain iteration to 1e-11 for the state, and as plain for the adjoint: no memory grows with the iterations, whatever the size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .workloads import Layout, Workload

TOL = 1e-11
MOST = 2000


class NotReached(RuntimeError):
    """Plain iteration did not converge: the workload has no reference, and no row of it says anything."""


def exact(workload: Workload) -> tuple[Tensor, Tensor]:
    """What `read` gives at the fixed point, and the gradient of all parameters as one vector, both float64.

    Raises:
        NotReached: the residual did not come below `TOL` within `MOST` iterations.
    """
    model = copy.deepcopy(workload.model).double()
    inputs = tuple(t.double() if t.is_floating_point() else t for t in workload.inputs)
    model.zero_grad(set_to_none=True)
    u = model.inject(*inputs)
    start = model.start(u)
    layout = Layout(start)
    with torch.no_grad():
        z = _iterate(lambda z: layout.pack(model.body(layout.unpack(z), u)), layout.pack(start), "state")
    z = z.detach().requires_grad_()
    out = model.read(layout.unpack(z))
    (q,) = torch.autograd.grad(workload.loss(out), z)
    f = layout.pack(model.body(layout.unpack(z), u))
    w = _iterate(lambda w: q + torch.autograd.grad(f, z, w, retain_graph=True)[0], torch.zeros_like(q), "adjoint")
    f.backward(w)
    return out.detach(), gradient(model)


def _iterate(f: Callable[[Tensor], Tensor], z: Tensor, what: str) -> Tensor:
    for _ in range(MOST // 10):
        for _ in range(10):
            before, z = z, f(z)
        if float((z - before).norm()) <= TOL * float(z.norm()):
            return z
    raise NotReached(f"expected the {what} to converge to {TOL} in {MOST} plain iterations, got {float((z - before).norm())}")


def gradient(owner: torch.nn.Module) -> Tensor:
    """Gradients of all parameters as one float64 vector; zeros where a parameter has none."""
    found = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in owner.parameters()]
    return torch.cat([g.double() for g in found])
