"""Fixed points in operators and autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd, nn

from deq_compile import Reason

from .form import CAP, TOL, Cell, Form
from .parts import Linear
from .solvers import forward_iteration


class WhileLoop(Cell):
    def forward(self, x: Tensor) -> Tensor:
        def go_on(z: Tensor, err: Tensor, k: Tensor) -> Tensor:
            return (err > TOL) & (k < CAP)

        def step(z: Tensor, err: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z_new = self.f(z, x)
            return z_new, (z_new - z).norm(), k + 1

        with torch.no_grad():
            z, _, _ = torch.while_loop(go_on, step, (torch.zeros_like(x), x.new_tensor(1e9), torch.tensor(0)))
        return self.f(z, x)


class WhileLoopTwoIterates(Cell):
    def forward(self, x: Tensor) -> Tensor:
        def go_on(old: Tensor, new: Tensor) -> Tensor:
            return (new - old).abs().max() > TOL

        with torch.no_grad():
            start = torch.zeros_like(x)
            _, z = torch.while_loop(go_on, lambda old, new: (new.clone(), self.f(new, x)), (start, self.f(start, x)))
        return self.f(z, x)


class WhileLoopCounted(WhileLoop):
    """The count is used after the loop."""

    def forward(self, x: Tensor) -> Tensor:
        def go_on(z: Tensor, err: Tensor, k: Tensor) -> Tensor:
            return (err > TOL) & (k < CAP)

        def step(z: Tensor, err: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z_new = self.f(z, x)
            return z_new, (z_new - z).norm(), k + 1

        with torch.no_grad():
            z, _, k = torch.while_loop(go_on, step, (torch.zeros_like(x), x.new_tensor(1e9), torch.tensor(0)))
        return self.f(z, x) + 0 * k


class Implicit(autograd.Function):
    """The identity, with a backward that solves the adjoint equation."""

    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(z)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            f = ctx.f(z)
        w, _ = forward_iteration(lambda y: autograd.grad(f, z, y, retain_graph=True)[0] + grad, grad, max_iter=CAP, tol=TOL)
        return None, w


class Identity(Cell):
    """Form B: a no-grad solve, an attached step, and an identity function with the implicit backward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, _ = forward_iteration(lambda z: self.f(z, x), torch.zeros_like(x), max_iter=CAP, tol=TOL)
        return Implicit.apply(lambda z: self.f(z, x), self.f(z, x))


class Solve(autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, u: Tensor) -> Tensor:
        z = torch.zeros_like(u)
        for _ in range(CAP):
            z_new = torch.tanh(z @ W.T + u)
            if (z_new - z).norm() < TOL:
                break
            z = z_new
        ctx.save_for_backward(W, u, z_new)
        return z_new

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            W, u, z = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            f = torch.tanh(z @ W.T + u)
        w = grad
        for _ in range(100):
            w = autograd.grad(f, z, w, retain_graph=True)[0] + grad
        return autograd.grad(f, (W, u), w)


class WholeSolve(nn.Module):
    """Form C: all of it in an autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Linear()

    def forward(self, x: Tensor) -> Tensor:
        return Solve.apply(self.f.W.weight, self.f.W.bias + self.f.U(x))


class ShortCycles(Cell):
    """As HRM and TRM: a few steps without gradients, then one with."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(3):
            with torch.no_grad():
                for _ in range(4):
                    z = self.f(z, x)
            z = self.f(z, x)
        return z


OPERATORS: dict[str, Form] = {
    "while_loop": Form(WhileLoop, kind="while_loop until a test"),
    "while_loop, two iterates": Form(WhileLoopTwoIterates, kind="while_loop until a test"),
    "while_loop, counted": Form(WhileLoopCounted, 0, 0, Reason.COUNTER),
    "autograd.Function, identity": Form(Identity, 1, 1, Reason.AUTOGRAD_FUNCTION, kind="call of forward_iteration"),
    "autograd.Function, whole solve": Form(WholeSolve, 1, 1, Reason.AUTOGRAD_FUNCTION),
    "short cycles": Form(ShortCycles, 0, 0, Reason.TOO_SHORT),
}
