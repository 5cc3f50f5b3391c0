"""Solvers of fixed points with the signatures and results that public code has, written here, and models that call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd, nn

from deq_compile import Reason, register_solver

from .form import Form
from .parts import Linear

Map = Callable[[Tensor], Tensor]
TOL, CAP = 1e-6, 120


# ---- solvers: a tutorial's (result, list of residuals)


def forward_iteration(f: Map, x0: Tensor, max_iter: int = 50, tol: float = 1e-2) -> tuple[Tensor, list[float]]:
    z, res = x0, []
    for _ in range(max_iter):
        new = f(z)
        res.append((new - z).norm().item() / (1e-5 + new.norm().item()))
        z = new
        if res[-1] < tol:
            break
    return z, res


def anderson(
    f: Map, x0: Tensor, m: int = 5, lam: float = 1e-8, max_iter: int = 50, tol: float = 1e-2, beta: float = 1.0
) -> tuple[Tensor, list[float]]:
    batch, d = x0.shape[0], x0[0].numel()
    xs, fs, res = [], [], []  # type: ignore[var-annotated]
    z = x0
    for _ in range(max_iter):
        image = f(z)
        xs, fs = (xs + [z.reshape(batch, d)])[-m:], (fs + [image.reshape(batch, d)])[-m:]
        res.append((image - z).norm().item() / (1e-5 + image.norm().item()))
        if res[-1] < tol:
            break
        G = torch.stack([a - b for a, b in zip(fs, xs, strict=True)], 1)
        n = G.shape[1]
        H = torch.bmm(G, G.mT) + lam * torch.eye(n, dtype=z.dtype)
        alpha = torch.linalg.solve(H, torch.ones(batch, n, 1, dtype=z.dtype))
        alpha = alpha / alpha.sum(1, keepdim=True)
        mixed = beta * torch.bmm(alpha.mT, torch.stack(fs, 1)) + (1 - beta) * torch.bmm(alpha.mT, torch.stack(xs, 1))
        z = mixed.view_as(x0)
    return z, res


# ---- solvers copied between research repositories: a dictionary with "result", traces, and the step of the best iterate


def broyden(
    f: Map, x0: Tensor, threshold: int, eps: float = 1e-3, stop_mode: str = "rel", ls: bool = False, name: str = "unknown"
) -> dict[str, Any]:
    shape, z = x0.shape, x0.reshape(1, -1)
    H = -torch.eye(z.shape[1], dtype=z.dtype)
    g = f(z.view(shape)).reshape(1, -1) - z
    trace: dict[str, list[float]] = {"abs": [], "rel": []}
    best, lowest, nstep = z, float("inf"), 0
    for k in range(threshold):
        step = -(g @ H.T)
        new = z + step
        g_new = f(new.view(shape)).reshape(1, -1) - new
        trace["abs"].append(g_new.norm().item())
        trace["rel"].append(g_new.norm().item() / ((g_new + new).norm().item() + 1e-9))
        if trace[stop_mode][-1] < lowest:
            best, lowest, nstep = new, trace[stop_mode][-1], k
        y = (g_new - g)[0]
        s = step[0]
        denominator = s @ H @ y
        if lowest < eps or denominator.abs().item() < 1e-30:
            break
        H = H + torch.outer(s - H @ y, s @ H) / denominator
        z, g = new, g_new
    return {
        "result": best.view(shape), "lowest": lowest, "nstep": nstep, "prot_break": False, "abs_trace": trace["abs"],
        "rel_trace": trace["rel"], "eps": eps, "threshold": threshold,
    }  # fmt: skip


def damped(f: Map, z0: Tensor, max_iter: int = 50, tol: float = 1e-3) -> Tensor:
    """An absolute tolerance, and nothing but the fixed point returned."""
    z = z0
    for _ in range(max_iter):
        step = f(z) - z
        z = z + 0.9 * step
        if step.norm() < tol:
            break
    return z


def newton_root(f: Map, x0: Tensor, max_iter: int = 50, tol: float = 1e-6) -> Tensor:
    """Looks like a fixed-point solver, and finds a root."""
    z = x0
    for _ in range(max_iter):
        with torch.enable_grad():
            start = z.detach().requires_grad_()
            value = f(start)
            (slope,) = autograd.grad(value.sum(), start)
        z = z - value.detach() / slope
        if value.norm() < tol:
            break
    return z


def with_odd_names(start: Tensor, accuracy: float, update: Map, rounds: int = 60) -> tuple[int, Tensor]:
    k, z = 0, start
    for k in range(rounds):  # noqa: B007
        new = update(z)
        moved = (new - z).norm()
        z = new
        if moved < accuracy:
            break
    return k, z


register_solver(
    with_odd_names, f="update", z0=0, tol="accuracy", max_iter="rounds", stop_mode="abs",
    result=lambda z, info: (info.iterations.max(), z),
)  # fmt: skip


# ---- models


class Model(nn.Module):
    """no_grad solve, then one attached step: the Jacobian-free gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Linear()

    def solve(self, x: Tensor) -> Tensor:
        return forward_iteration(lambda z: self.f(z, x), torch.zeros_like(x), max_iter=CAP, tol=TOL)[0]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.solve(x)
        return self.f(z, x)


class AndersonModel(Model):
    def solve(self, x: Tensor) -> Tensor:
        z, self.res = anderson(lambda z: self.f(z, x), torch.zeros_like(x), max_iter=CAP, tol=TOL)
        return z


class BroydenModel(Model):
    def solve(self, x: Tensor) -> Tensor:
        result = broyden(lambda z: self.f(z, x), torch.zeros_like(x), threshold=CAP, eps=TOL, name="forward")
        self.lowest = result["lowest"]
        return result["result"]


class BroydenAbsolute(Model):
    def solve(self, x: Tensor) -> Tensor:
        return broyden(lambda z: self.f(z, x), torch.zeros_like(x), threshold=CAP, eps=TOL, stop_mode="abs")["result"]


class DampedModel(Model):
    def solve(self, x: Tensor) -> Tensor:
        return damped(lambda z: self.f(z, x), torch.zeros_like(x), max_iter=CAP, tol=TOL)


class OddNames(Model):
    def solve(self, x: Tensor) -> Tensor:
        _, z = with_odd_names(torch.zeros_like(x), TOL, lambda z: self.f(z, x), CAP)
        return z


class CallsCounted(Model):
    """The map counts its evaluations."""

    calls = 0

    def solve(self, x: Tensor) -> Tensor:
        def f(z: Tensor) -> Tensor:
            self.calls += 1
            return self.f(z, x)

        return forward_iteration(f, torch.zeros_like(x), max_iter=CAP, tol=TOL)[0]


class StatesLogged(Model):
    """The map writes down what it was called with."""

    def solve(self, x: Tensor) -> Tensor:
        seen = []

        def f(z: Tensor) -> Tensor:
            seen.append(z.norm())
            return self.f(z, x)

        z = forward_iteration(f, torch.zeros_like(x), max_iter=CAP, tol=TOL)[0]
        return z + 0 * torch.stack(seen).sum()


class SolverAttribute(nn.Module):
    """As tutorials write it: the solver and its arguments are attributes of a module."""

    def __init__(self, solver: Callable[..., Any] = anderson, **kwargs: Any) -> None:
        super().__init__()
        self.f, self.solver, self.kwargs = Linear(), solver, {"tol": TOL, "max_iter": CAP, **kwargs}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, self.forward_res = self.solver(lambda z: self.f(z, x), torch.zeros_like(x), **self.kwargs)
        return self.f(z, x)


class Hooked(SolverAttribute):
    """... and the backward is a second solve, in a hook."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, self.forward_res = self.solver(lambda z: self.f(z, x), torch.zeros_like(x), **self.kwargs)
        z = self.f(z, x)
        z0 = z.clone().detach().requires_grad_()
        f0 = self.f(z0, x)

        def backward_hook(grad: Tensor) -> Tensor:
            g, self.backward_res = self.solver(
                lambda y: autograd.grad(f0, z0, y, retain_graph=True)[0] + grad, grad, **self.kwargs
            )
            return g

        if z.requires_grad:
            z.register_hook(backward_hook)
        return z


class HookedOnItself(nn.Module):
    """As research code writes it: the hook sits on the step it differentiates, and removes itself first."""

    hook: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.f, self.f_solver, self.b_solver = Linear(), broyden, broyden

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            result = self.f_solver(lambda z: self.f(z, x), torch.zeros_like(x), threshold=CAP, eps=TOL)
            z = result["result"]
        new_z = z
        if self.training:
            new_z = self.f(z.requires_grad_(), x)

            def backward_hook(grad: Tensor) -> Tensor:
                if self.hook is not None:
                    self.hook.remove()
                result = self.b_solver(
                    lambda y: autograd.grad(new_z, z, y, retain_graph=True)[0] + grad,
                    torch.zeros_like(grad), threshold=CAP, eps=1e-6, name="backward",
                )  # fmt: skip
                return result["result"]

            self.hook = new_z.register_hook(backward_hook)
        return new_z


class HookedLoop(Model):
    """The adjoint is iterated in a plain loop of fixed count."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.solve(x)
        z = self.f(z, x)
        z0 = z.detach().clone().requires_grad_()
        f0 = self.f(z0, x)

        def backward_hook(grad: Tensor) -> Tensor:
            w = grad
            for _ in range(100):
                w = autograd.grad(f0, z0, w, retain_graph=True)[0] + grad
            return w

        z.register_hook(backward_hook)
        return z


class HookedWhile(HookedLoop):
    """The forward is a loop with a test, and no call of a solver."""

    def solve(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z_new = self.f(z, x)
        while (z_new - z).norm() > TOL:
            z, z_new = z_new, self.f(z_new, x)
        return z_new


class HookedScaling(Model):
    """A hook that solves nothing stays what it is."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.solve(x)
        z = self.f(z, x)
        z.register_hook(lambda grad: 2 * grad)
        return z


class RootModel(Model):
    def solve(self, x: Tensor) -> Tensor:
        return newton_root(lambda z: torch.tanh(z) + 2 * z - self.f(x, x), torch.zeros_like(x), max_iter=CAP, tol=TOL)


SOLVERS: dict[str, Form] = {
    "forward_iteration": Form(Model, kind="call of forward_iteration"),
    "anderson": Form(AndersonModel, kind="call of anderson"),
    "broyden": Form(BroydenModel, kind="call of broyden"),
    "broyden, absolute": Form(BroydenAbsolute, kind="call of broyden"),
    "damped": Form(DampedModel, kind="call of damped"),
    "registered": Form(OddNames, kind="call of with_odd_names"),
    "solver as attribute": Form(SolverAttribute, kind="call of anderson"),
    "calls counted": Form(CallsCounted, 0, 1, Reason.SIDE_EFFECT),
    "states logged": Form(StatesLogged, 0, 1, Reason.SIDE_EFFECT),
    "root": Form(RootModel, 0, 1),
}
# hooks: the gradient is the implicit one
HOOKS: dict[str, Form] = {
    "hook, anderson": Form(Hooked, kind="call of anderson", implicit=True),
    "hook, forward_iteration": Form(lambda: Hooked(forward_iteration), kind="call of forward_iteration", implicit=True),
    "hook on itself, broyden": Form(HookedOnItself, kind="call of broyden", implicit=True),
    "hook, while": Form(HookedWhile, kind="loop until a test", implicit=True),
    "hook, loop": Form(HookedLoop, kind="call of forward_iteration", implicit=True),
}
