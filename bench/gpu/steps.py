"""Whole training steps: the user's loop, torch.compile of it, an eager Broyden, and ours on each engine and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import problems
from deq_compile import record_solves
from deq_compile.region.engine import captures

from . import peer
from .common import Row, Setting

# (problem, iterations of the user's loop): as on the CPU, and larger ones of the same forms, which a GPU is used for.
CASES = [("mlp1024", 30), ("conv", 30), ("transformer", 30), ("mlp1024wide", 30), ("convlarge", 30), ("mlp128", 30)]
INF = float("inf")


def make(name: str, loop: int, dry: bool) -> tuple[problems.Loop, Tensor]:
    torch.manual_seed(0)
    if dry:
        toy = problems.MLP(17, 12, "before")
        problems.scale_spectral_norm(toy.W.weight, 0.25)
        return toy, torch.randn(2, 17)
    if name == "mlp1024wide":
        return problems.MLP(1024, loop, "before"), torch.randn(128, 1024)
    if name == "convlarge":
        return problems.Conv(64, 32, loop, "before"), torch.randn(32, 64, 32, 32)
    model, x, _ = problems.make(name, loop, "before")
    return model, x.detach()


class PeerLoop(nn.Module):
    """The same model, its loop replaced by the eager solver."""

    def __init__(self, model: problems.Loop) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        u = self.model.injection(x)
        return peer.solve(lambda z: self.model.body(z, u), torch.zeros_like(x), 1e-4, 40)


def ways(model: problems.Loop, dry: bool) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Each way to run the step: the module that owns the parameters, and the call."""
    inner = "aot_eager" if dry else "inductor"

    def deq(**options: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        own = copy.deepcopy(model)
        tol: dict[str, Any] = {"tol": 1e-3} if dry else {}
        return own, torch.compile(own, backend="deq", options={"inner": inner, **tol, **options})

    eager, inductor, theirs = copy.deepcopy(model), copy.deepcopy(model), PeerLoop(copy.deepcopy(model))
    found: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "eager loop": (eager, eager),
        "eager Broyden, implicit": (theirs, theirs),
        "deq while": deq(engine="while"),
        "deq chunks": deq(engine="chunks"),
        "deq loop": deq(engine="loop"),
        "deq while, raw reuse": deq(engine="while", backward_tol=INF),
        "deq while, adjoint 1e-4": deq(engine="while", backward_tol=1e-4),
    }
    if not dry:
        found["torch.compile of the loop"] = (inductor, torch.compile(inductor))
    return found


def gradient(owner: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in owner.parameters() if p.grad is not None])


def run(setting: Setting) -> None:
    for name, loop in [("toy", 12)] if setting.dry else CASES:
        with setting.guarded("step", problem=name):
            one_problem(setting, name, loop)


def one_problem(setting: Setting, name: str, loop: int) -> None:
    torch._dynamo.reset()
    captures.clear()
    model, x = make(name, loop, setting.dry)
    model, x = model.to(setting.device), x.to(setting.device)
    exact = copy.deepcopy(model).double()
    exact.n_iter = 150
    c = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    problems.loss(exact(x.double()), c.double()).backward()
    truth = gradient(exact)
    baseline: float | None = None
    for label, (owner, call) in ways(model, setting.dry).items():
        if setting.left < 15:
            setting.row("stopped: out of time", problem=name, at=label)
            return

        def once(owner: nn.Module = owner, call: Callable[[Tensor], Tensor] = call) -> None:
            owner.zero_grad(set_to_none=True)
            problems.loss(call(x), c).backward()

        with setting.guarded("step", problem=name, way=label):
            for _ in range(2 if setting.dry else 4):
                once()
            row: Row = {"gradient_error": float((gradient(owner) - truth).norm() / truth.norm())}
            with record_solves() as solves:
                once()
            if solves:
                row |= {"iterations": solves[0].iterations, "vjps": solves[0].vjps, "status": solves[0].status}
            ms = setting.wall_us(once, repeats=15) / 1e3
            baseline = ms if baseline is None else baseline
            setting.row("step", problem=name, way=label, ms=round(ms, 4), against_eager=round(baseline / ms, 2), **row)
