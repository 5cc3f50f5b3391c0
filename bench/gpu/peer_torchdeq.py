"""An eager Broyden solver with an implicit gradient, in the formulation that TorchDEQ has made the usual one.

Good Broyden with two stored vectors an iteration, H = -I + Σ u_j v_j^T, all in plain tensor operations with one question to the
device an iteration; the backward solves the adjoint equation by the same method, from nothing. Written here from the formulas
(Bai, Kolter & Koltun 2019, arXiv 1909.01377), since the package itself is not on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .workloads import Equilibrium, Layout


def broyden(f: Callable[[Tensor], Tensor], z: Tensor, tol: float, max_iter: int) -> tuple[Tensor, int]:
    """Solve z = f(z) for z (B, D). Returns the iterate of the smallest residual, max over samples, and the evaluations."""
    B, D = z.shape
    U, V = z.new_zeros((B, max_iter, D)), z.new_zeros((B, max_iter, D))

    def apply(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bmd,bm->bd", left, torch.einsum("bmd,bd->bm", right, x)) - x

    fz = f(z)
    g, best, best_at = fz - z, float("inf"), z
    step, evaluations = g, 1
    for k in range(max_iter - 1):
        worst = float((g.norm(dim=1) / (fz.norm(dim=1) + 1e-9)).max())
        if worst < best:
            best, best_at = worst, z
        if worst <= tol:
            break
        moved = z + step
        fz = f(moved)
        evaluations += 1
        change_g = fz - moved - g
        v = apply(V[:, :k], U[:, :k], step)
        u = (step - apply(U[:, :k], V[:, :k], change_g)) / torch.einsum("bd,bd->b", v, change_g)[:, None]
        U[:, k], V[:, k] = u.nan_to_num(0.0), v.nan_to_num(0.0)
        z, g = moved, fz - moved
        step = -apply(U[:, : k + 1], V[:, : k + 1], g)
    return best_at, evaluations


class Implicit(torch.autograd.Function):
    """Passes z on; its cotangent is replaced by the adjoint w = q + J^T w."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, pull: Callable[[Tensor], Tensor], tol: float, max_iter: int) -> Tensor:
        ctx.pull, ctx.tol, ctx.max_iter = pull, tol, max_iter
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, q: Tensor) -> tuple[Tensor | None, ...]:
        shape, flat = q.shape, q.flatten(1)
        w, _ = broyden(lambda w: flat + ctx.pull(w.view(shape)).flatten(1), torch.zeros_like(flat), ctx.tol, ctx.max_iter)
        return w.view(shape), None, None, None


def solve(body: Callable[[Tensor], Tensor], z0: Tensor, tol: float, max_iter: int) -> Tensor:
    """The fixed point of a body on tensors of any shape, dimension 0 the batch, with its implicit gradient."""
    shape = z0.shape
    with torch.no_grad():
        z, _ = broyden(lambda z: body(z.view(shape)).flatten(1), z0.flatten(1), tol, max_iter)
    state = z.view(shape).detach().requires_grad_()
    out = body(state)

    def pull(w: Tensor) -> Tensor:
        return torch.autograd.grad(out, state, w, retain_graph=True)[0]

    found: Tensor = Implicit.apply(body(z.view(shape)), pull, tol, max_iter)
    return found


class TorchDEQ(nn.Module):
    """A workload whose loop is replaced by this solver."""

    def __init__(self, model: Equilibrium, tol: float, max_iter: int = 40) -> None:
        super().__init__()
        self.model, self.tol, self.max_iter = model, tol, max_iter

    def forward(self, *inputs: Tensor) -> Tensor:
        u = self.model.inject(*inputs)
        start = self.model.start(u)
        layout = Layout(start)
        z = solve(lambda z: layout.pack(self.model.body(layout.unpack(z), u)), layout.pack(start), self.tol, self.max_iter)
        return self.model.read(layout.unpack(z))
