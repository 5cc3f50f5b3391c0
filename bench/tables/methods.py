"""The rows: each way to run one training step, behind one interface."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Case

Counts = dict[str, Any]
Reading = tuple[float, float, float]


def clocks() -> Reading:
    """Wall time on entering, process CPU time, wall time on leaving, in seconds.

    Asking for CPU time may take milliseconds in a virtual machine that is busy: a wall time must not contain that.
    """
    return time.perf_counter(), time.process_time(), time.perf_counter()


def between(start: Reading, end: Reading) -> dict[str, float]:
    """Seconds from one reading to the next, on both clocks."""
    return {"cpu": end[1] - start[1], "wall": end[0] - start[2]}


class NotApplicable(Exception):
    """A row that says nothing here; its message is the reason that the table shows."""


class Step:
    """One training step, one way. `run` leaves outputs here and gradients in the case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.call: Callable[..., Any] = case.model
        self.outputs: Any = None

    def forward(self) -> Any:
        return self.call(*self.case.inputs)

    def run(self) -> tuple[Reading, Reading, Reading]:
        """Clocks before the forward, between forward and backward, and after the backward."""
        self.case.clear()
        self.outputs = None
        start = clocks()
        self.outputs = self.forward()
        loss = self.case.loss(self.outputs)
        middle = clocks()
        loss.backward()
        return start, middle, clocks()

    def counts(self) -> Counts:
        """Iterations, VJPs and status, from a step of its own that is not timed."""
        return {"iterations": self.case.n_iter, "vjps": self.case.n_iter, "status": "loop"}


class CompiledLoop(Step):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.call = torch.compile(case.model)


class Deq(Step):
    """The product as users call it."""

    def __init__(self, case: Case, **options: Any) -> None:
        super().__init__(case)
        self.call = torch.compile(case.model, backend="deq", options=options)

    def counts(self) -> Counts:
        from deq_compile import record_solves
        from deq_compile.testing import CompiledRunner

        linearised = 0
        original = CompiledRunner.linearise

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal linearised
            linearised += 1
            return original(*args, **kwargs)

        CompiledRunner.linearise = counting  # type: ignore[method-assign]
        try:
            with record_solves() as solves:
                self.run()
        finally:
            CompiledRunner.linearise = original  # type: ignore[method-assign]
        if not solves:
            return {"status": "no region"}
        adjoint = [s.adjoint_residual_batch for s in solves if s.adjoint_residual_batch is not None]
        return {
            "iterations": sum(s.iterations for s in solves),
            "iterations_max": sum(s.iterations_max for s in solves),
            "linearised": linearised,
            "vjps": sum(s.vjps or 0 for s in solves),
            "adjoint_residual": max(adjoint, default=None),
            "reused": any(s.reused for s in solves),
            "regions": len(solves),
            "status": "+".join(sorted({s.status for s in solves})),
        }


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    kind    "loop": the user's own loop; "peer": a solver with an implicit gradient; "cheap": a peer whose gradient is
            not meant to be the implicit one, never a contender; "jax": not PyTorch; "ours"; "bound": no solver at all
    make    builds the step; for "bound" the counts of the deq row that solves come along
    forms   forms of the loop it is timed on by default
    memory  whether its memory is measured
    needs   packages without which the row is skipped
    body    whether it needs the body of the loop as a function, which a real model does not offer
    after   the status that the row "deq" must have for this one to say anything new; None for any
    """

    key: str
    label: str
    kind: str
    make: Callable[..., Step]
    forms: tuple[str, ...] = ("before", "own")
    memory: bool = False
    needs: tuple[str, ...] = ()
    body: bool = False
    after: str | None = None

    def skip(self, case: Case, deq: Counts | None) -> str | None:
        """Why this row is left out, or None. ``deq``: what the default row did, as far as it has run."""
        if self.after is not None and (deq or {}).get("status") != self.after:
            return f"of interest where deq's default ends as {self.after!r} only"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.body and case.loop is None:
            return "the model does not offer its body as a function"
        return None


def all_methods() -> dict[str, Method]:
    from . import jax_peers, peers
    from .bound import Bound

    everywhere = ("before", "inside", "own")
    inf = float("inf")

    def torchdeq(solver: str, phantom: bool = False) -> Callable[[Case], Step]:
        return lambda case: peers.TorchDEQ(case, solver, phantom)

    def silva(solver: str) -> Callable[[Case], Step]:
        return lambda case: peers.Silva(case, solver)

    def deq(**options: Any) -> Callable[[Case], Step]:
        return lambda case: Deq(case, **options)

    broyden, fixed, anderson = torchdeq("broyden"), torchdeq("fixed_point_iter"), torchdeq("anderson")
    phantom, needs = torchdeq("fixed_point_iter", True), ("torchdeq",)
    silva_needs, optimistix = ("silva_networks", "certifi"), ("jax", "optimistix")
    rows = [
        Method("eager", "eager loop", "loop", Step, everywhere, memory=True),
        Method("inductor", "torch.compile of the loop", "loop", CompiledLoop, everywhere, memory=True),
        Method("torchdeq-broyden", "TorchDEQ Broyden, ift", "peer", broyden, everywhere, True, needs, body=True),
        Method("torchdeq-fixed", "TorchDEQ fixed-point, ift", "peer", fixed, everywhere, True, needs, body=True),
        Method("torchdeq-anderson", "TorchDEQ Anderson, ift", "peer", anderson, needs=needs, body=True),
        Method("torchdeq-phantom", "TorchDEQ fixed-point, phantom-1", "cheap", phantom, needs=needs, body=True),
        Method("silva-broyden", "silva-networks Broyden, implicit", "peer", silva("broyden"), needs=silva_needs, body=True),
        Method("silva-fixed", "silva-networks fixed-point, implicit", "peer", silva("picard"), needs=silva_needs, body=True),
        Method("jaxopt", "jaxopt fixed-point, jitted", "jax", jax_peers.Jaxopt, needs=("jax", "jaxopt"), body=True),
        Method("optimistix", "optimistix fixed-point, jitted", "jax", jax_peers.Optimistix, needs=optimistix, body=True),
        Method("deq-raw", "deq, raw reuse", "ours", deq(backward_tol=inf)),
        Method("deq", "deq, default", "ours", deq(), everywhere, memory=True),
        Method("deq-peer-tol", "deq, adjoint 1e-4", "ours", deq(backward_tol=1e-4), everywhere),
        Method("deq-at-tol", "deq, solved to tol and no further", "ours", deq(semantics="equilibrium")),
        Method("deq-exact", "deq, exact", "ours", deq(backward="exact")),
        Method("deq-equilibrium", "deq, semantics='equilibrium'", "ours", deq(semantics="equilibrium"), after="kept"),
        Method("bound", "bound: the bodies of deq alone", "bound", Bound, ("before", "inside"), body=True),
    ]
    return {method.key: method for method in rows}
