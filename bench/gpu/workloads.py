"""What is stepped: the problems of the CPU tables, larger ones of their forms, and models at the shapes of public ones.

Every workload is an :class:`Equilibrium`: injection, body and reading apart, so that peers may call them, and a plain loop over
the body as its forward, which is all that torch.compile gets to see. Weights are random, scaled so that the body contracts.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench import problems

State = tuple[Tensor, ...]


class Layout:
    """Several state tensors as one (B, D), and back, in the dtypes that the state began with."""

    def __init__(self, z: State) -> None:
        self.shapes, self.dtypes = [t.shape for t in z], [t.dtype for t in z]
        self.sizes = [t[0].numel() for t in z]

    def pack(self, z: State) -> Tensor:
        flat = [t.to(dtype).flatten(1) for t, dtype in zip(z, self.dtypes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def unpack(self, flat: Tensor) -> State:
        pieces = flat.split(self.sizes, 1)
        return tuple(t.reshape(shape) for t, shape in zip(pieces, self.shapes, strict=True))


class Equilibrium(nn.Module, abc.ABC):
    """z = body(z, u), u = inject(inputs), for tensors z_i (B, ...); a plain loop of `n_iter` from zero."""

    n_iter: int

    @abc.abstractmethod
    def inject(self, *inputs: Tensor) -> State: ...

    @abc.abstractmethod
    def start(self, u: State) -> State: ...

    @abc.abstractmethod
    def body(self, z: State, u: State) -> State: ...

    def read(self, z: State) -> Tensor:
        """What the loss sees: the state itself, its tensors flattened and side by side."""
        return z[0] if len(z) == 1 else torch.cat([t.flatten(1) for t in z], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        u = self.inject(*inputs)
        z = self.start(u)
        for _ in range(self.n_iter):
            z = self.body(z, u)
        return self.read(z)


class OfProblem(Equilibrium):
    """A problem of `bench.problems`, x entering before the loop."""

    def __init__(self, loop: problems.Loop) -> None:
        super().__init__()
        self.loop, self.n_iter = loop, loop.n_iter

    def inject(self, *inputs: Tensor) -> State:
        return (self.loop.injection(inputs[0]),)

    def start(self, u: State) -> State:
        return (torch.zeros_like(u[0]),)

    def body(self, z: State, u: State) -> State:
        return (self.loop.body(z[0], u[0]),)


@dataclass
class Workload:
    """A model with its inputs, and how it is run.

    source    where the shapes come from
    tol       relative residual per sample that every solver is given
    autocast  dtype of autocast around forward and backward; None: none
    """

    name: str
    model: Equilibrium
    inputs: tuple[Tensor, ...]
    source: str
    tol: float = 1e-4
    autocast: torch.dtype | None = None
    cotangent: Tensor | None = field(default=None, repr=False)

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def loss(self, out: Tensor) -> Tensor:
        """(out · c) / B, c drawn once from a seed of its own; in the dtype of `out`, float32 at least."""
        if self.cotangent is None:
            self.cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
        wide = out if out.dtype == torch.float64 else out.float()
        return (wide * self.cotangent.to(wide.dtype)).sum() / out.shape[0]

    def to(self, device: torch.device) -> Workload:
        self.model.to(device)
        self.inputs = tuple(t.to(device) for t in self.inputs)
        return self


def of_problem(name: str, dry: bool, n_iter: int = 30) -> Workload:
    """mlp128, mlp1024, conv, transformer as on the CPU; mlp1024wide: 128 x 1024."""
    torch.manual_seed(0)
    if dry:
        small, shape = small_problem(name)
        return Workload(name, OfProblem(small), (torch.randn(shape),), "rehearsal", tol=1e-3)
    if name == "mlp1024wide":
        return Workload(name, OfProblem(problems.MLP(1024, n_iter, "before")), (torch.randn(128, 1024),), "bench/problems.py")
    loop, x, _ = problems.make(name, n_iter, "before")
    return Workload(name, OfProblem(loop), (x.detach(),), "bench/problems.py")


def small_problem(name: str) -> tuple[problems.Loop, tuple[int, ...]]:
    """The same body for two samples of about twenty unknowns, and the shape of x: at its fixed point after twelve iterations."""
    if name == "conv":
        conv = problems.Conv(2, 3, 12, "before")
        with torch.no_grad():
            conv.c1.weight.mul_(0.5)
            conv.c2.weight.mul_(0.5)
        return conv, (2, 2, 3, 3)
    if name == "transformer":
        transformer = problems.Transformer(8, 2, 12, "before")
        for layer in (transformer.o, transformer.f2):
            problems.scale_spectral_norm(layer.weight, 0.1)
        return transformer, (2, 3, 8)
    mlp = problems.MLP(17, 12, "before")
    problems.scale_spectral_norm(mlp.W.weight, 0.25)
    return mlp, (2, 17)


def make(name: str, dry: bool) -> Workload:
    """A workload by name, freshly drawn from seed 0, on the CPU; `dry`: the same form in a size for the interpreter.

    Raises:
        KeyError: an unknown name.
    """
    from . import workload_models as large

    makers: dict[str, Callable[[bool], Workload]] = {
        "lm": large.language_model, "mdeq": large.mdeq_cifar, "flow": large.deq_flow, "graph": large.graph_net,
    }  # fmt: skip
    if name in makers:
        torch.manual_seed(0)
        return makers[name](dry)
    if name not in (*problems.PROBLEMS, "mlp1024wide"):
        raise KeyError(f"expected a problem of bench.problems, mlp1024wide, or one of {', '.join(makers)}; got {name!r}")
    return of_problem(name, dry)
