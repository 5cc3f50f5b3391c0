"""One call of a region: its flat state, how to evaluate the body on it, how to solve from it, and the user's own loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from deq_compile.kernels.device import on_gpu
from deq_compile.kernels.recycle import Shared, Sketch

from . import graphs, records
from .agree import look
from .backward import BACKWARDS, of_steps
from .body import EagerRunner, Runner
from .choice import choice_of, solve_chosen
from .forward import Solution, solve
from .kept import OwnLoop, own_loop
from .layout import Layout
from .modes import without_grad
from .pool import Recycled
from .recycling import pool_of, solve_recycled
from .runners import runner_for
from .site import Site
from .solvers import PLAIN, SOLVERS, Problem, Solver
from .stop import any_of
from .stopwatch import Stopwatch
from .verdict import decide_rows, settle
from .warm import solve_warm, warm_of


@dataclasses.dataclass(frozen=True)
class Prepared:
    """How the state of a call lies, and what runs the body on it.

    rows    whether dimension 0 of the state is a batch of independent samples
    layout  of the flat state
    runner  of the body for these shapes
    """

    rows: bool
    layout: Layout
    runner: Runner


class Call:
    """One call of a region: its flat state, how to evaluate the body on it, and how to solve from it.

    inside  whether somebody captures the caller's stream: nothing may be asked of the device
    z0      (B, D) where the iteration begins; own_z0: as the user gave it
    recycled  what earlier batches have left for the backward
    """

    def __init__(
        self, site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int],
        prepared: Prepared | None = None,
    ) -> None:  # fmt: skip
        """`prepared`: where the body is no graph; else it is made of the state and the operands, and remembered."""
        spec = site.spec
        self.site, self.sizes = site, sizes
        self.inside = graphs.under_capture(site, state0)
        self.watch = Stopwatch() if records.wants_timing() else None
        if not self.inside:
            settle(site)
            look(site)
        self.operands = operands = spec.arranged(operands)
        prepared = prepared or prepare(site, state0, operands, sizes)
        self.rows, self.layout, self.runner = prepared.rows, prepared.layout, prepared.runner
        z0 = self.layout.matrix(state0)
        self.z0 = self.own_z0 = z0.detach() if z0.requires_grad else z0
        self.solver = PLAIN if site.follows else SOLVERS[spec.config.solver]
        self.evaluations = self.runner.evaluations(operands, _saved_for(site, self.solver, z0))
        self.body: Callable[[Tensor], Tensor] = self.evaluations
        self.stop = any_of(spec.stop, self.layout, (*operands, *sizes))
        self.own_stop = any_of(spec.own_tests, self.layout, (*operands, *sizes))
        self._solve = solve
        self.recycled: Recycled | None = None
        if self.watch is not None:
            self.body, self._solve = self.watch.timed("body", self.body), self.watch.timed("solver", solve)

    def solved(
        self, start: Tensor, tol: float, *, solver: Solver | None = None, max_iter: int | None = None, tested: bool = True,
        shared: Shared | None = None, sketch: Sketch | None = None,
    ) -> Solution:  # fmt: skip
        """A solve from `start` (B, D) with the region's settings, but for those given; by `tol` alone without `tested`."""
        site = self.site
        problem = problem_of(site, tol=tol, watched=not self.inside, stop=self.stop if tested else None)
        if shared is not None or sketch is not None:
            problem = dataclasses.replace(problem, shared=shared, sketch=sketch)
        if max_iter is not None:
            problem = dataclasses.replace(problem, max_iter=max_iter)
        found = self._solve(
            self.body,
            start,
            problem,
            solver=solver or SOLVERS[site.spec.config.solver],
            raising=raising_of(site, self.inside, own=start is self.own_z0),
        )
        if found.state is not None:
            site.note_length(found.evaluations)
        return found

    def first(self, due: bool) -> Solution:
        """The solve that stands in for the loop, or the loop's own iterates to where they converge. `due`: it is compared."""
        warm = warm_of(self, due)
        return self._first() if warm is None else solve_warm(self, warm, self._first)

    def _first(self) -> Solution:
        site = self.site
        if site.follows:
            followed = self.solved(self.z0, site.tol, solver=PLAIN, max_iter=site.spec.own_loop_cap)
            if site.spec.own_loop_cap is not None or not followed.missed():
                return followed
            return self.solved(followed.z, site.tol)  # the user's solver would be faster than plain iterations, too
        pool = pool_of(self)
        return self.usual() if pool is None else solve_recycled(self, pool)

    def captured(self, shared: Shared | None = None) -> Solution | None:
        """The solve by a captured graph, from H_0 = -I or a shared inverse; None where none serves (yet)."""
        found = None if self.inside else self._captured(shared)
        return None if found is None else found.solve(self.z0, self.operands, leaves=self.site.spec.stores_steps, shared=shared)

    def usual(self) -> Solution:
        """The solve with nothing recycled: by a captured graph, by the region's solver, or by the one that it has chosen."""
        if (found := self.captured()) is not None:
            return found
        choice = choice_of(self)
        return self.solved(self.z0, self.site.tol) if choice is None else solve_chosen(self, choice)

    def own(self, linearised: bool) -> OwnLoop:
        """The user's own loop. `linearised`: with the body linearised at each iterate, as the loop itself would save it."""
        spec = self.site.spec
        stop = None if self.inside else self.own_stop
        if not linearised or not spec.grad or spec.needs is None or spec.config.loop_memory is not None:
            return own_loop(spec, self.body, self.z0, stop)
        work = own_loop if self.watch is None else self.watch.timed("body", own_loop)
        needs = spec.needs
        found = work(spec, lambda z: self.runner.evaluate_and_linearise(z, self.operands, needs), self.z0, stop, linearise=True)
        self.evaluations.count += len(found.linears)
        return found

    def host_driven(self) -> bool:
        """Whether no graph is to serve such calls. A test of the user's own is a question to the host in every iteration."""
        spec = self.site.spec
        return not self.solver.captures or spec.config.engine == "loop" or bool(spec.stop) or not on_gpu(self.z0.device)

    def _captured(self, shared: Shared | None) -> graphs.CapturedForward | graphs.Declined | None:
        """The captured solve of this region for these shapes, on a GPU and from the second call on."""
        site, spec, config = self.site, self.site.spec, self.site.spec.config
        if self.host_driven():
            return None
        settings = graphs.ForwardSettings(
            site.tol, config.stop_mode, config.max_iter, config.memory, spec.factor_dtype, spec.body_eps
        )
        graphs.end_with(site)
        key = (site.key, *self.sizes)
        found = graphs.captured_forward(key, self.runner, self.z0, self.operands, settings, config.engine, shared)
        if found is not None:
            site.note_engine(found.name, found.reason)
        return found


def _saved_for(site: Site, solver: Solver, state: Tensor) -> tuple[bool, ...] | None:
    """The operands whose gradients the evaluations of a solve save for; None: they save nothing. The last evaluation is at the
    fixed point: with what it saves the backward need not evaluate once more."""
    spec = site.spec
    implicit = BACKWARDS[spec.config.backward].gradient != "loop"
    return spec.needs if spec.grad and solver.stays and implicit and not on_gpu(state.device) else None


def problem_of(
    site: Site, *, tol: float | None = None, watched: bool = True, stop: Callable[[Tensor, Tensor], bool] | None = None
) -> Problem:
    """What a region asks of its solver; mostly the same as at its last call."""
    spec, config = site.spec, site.spec.config
    tol = site.tol if tol is None else tol
    facts = tol, site.capacity, watched, stop
    known = site.problem
    if known[0] == facts:
        remembered: Problem = known[1]
        return remembered
    found = Problem(
        tol=tol,
        stop_mode=config.stop_mode,
        max_iter=config.max_iter,
        memory=config.memory,
        factor_dtype=spec.factor_dtype,
        body_eps=spec.body_eps,
        capacity=site.capacity,
        watched=watched,
        anderson_memory=config.anderson_memory,
        anderson_damping=config.anderson_damping,
        relaxation=config.relaxation,
        recorded=spec.grad,
        stop=stop,
    )
    if stop is None:  # a test holds the tensors of its call
        site.problem = facts, found
    return found


def raising_of(site: Site, inside: bool, own: bool) -> int | None:
    """Evaluations of a solve whose errors are the user's: that of his `own` state, or all of steps that he asked for."""
    return None if inside or of_steps(site.spec.config) else int(own)


def arranged(site: Site, f: Callable[[list[Tensor]], Sequence[Tensor]], state0: Sequence[Tensor]) -> tuple[bool, Layout]:
    """Whether dimension 0 of the state is a batch, and how the state lies, for a body `f` that is no graph."""

    def body(layout: Layout) -> Callable[[Tensor], Tensor]:
        return without_grad(lambda z: layout.flatten(f(layout.unflatten(z))))

    rows = decide_rows(site, state0, body)
    return rows, site.spec.layout([s.shape for s in state0], rows=rows)


def prepare(site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]) -> Prepared:
    """What runs a graph's body for these shapes; that of the last call mostly does, and that is seen without hashing it."""

    def body(layout: Layout) -> Callable[[Tensor], Tensor]:
        # By the evaluations of the solve to come: its body is compiled anyway.
        solver = PLAIN if site.follows else SOLVERS[site.spec.config.solver]
        return runner_of(site, layout, operands, sizes).evaluations(operands, _saved_for(site, solver, state0[0]))

    rows = decide_rows(site, state0, body)
    metas = [(o.shape, o.stride(), o.dtype, o.device) for o in operands]
    facts = [s.shape for s in state0], rows, metas, list(sizes), site.uncompiled
    known = site.prepared
    if known[0] != facts:
        layout = site.spec.layout(facts[0], rows)
        known = site.prepared = facts, Prepared(rows, layout, runner_of(site, layout, operands, sizes))
    prepared: Prepared = known[1]
    return prepared


def runner_of(site: Site, layout: Layout, operands: Sequence[Tensor], sizes: Sequence[int]) -> Runner:
    """What runs a region's body for these shapes."""
    if site.uncompiled:
        return EagerRunner(site.spec.body, layout, sizes)
    return runner_for(site.spec.body, layout, operands, sizes)
