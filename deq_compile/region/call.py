"""One call of a region: its flat state, how to evaluate the body on it, how to solve from it, and the user's own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from deq_compile.kernels.device import on_gpu

from . import engine, records
from .agree import look
from .body import Runner, runner_for
from .forward import Solution, solve
from .kept import OwnLoop, own_loop
from .layout import Layout
from .site import Site
from .stop import any_of
from .stopwatch import Stopwatch
from .verdict import decide_rows, settle


class Call:
    """One call of a region: its flat state, how to evaluate the body on it, and how to solve from it."""

    def __init__(self, site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]) -> None:
        spec, config = site.spec, site.spec.config
        self.site, self.sizes = site, sizes
        self.inside = engine.under_capture(site, state0)
        self.watch = Stopwatch() if records.wants_timing() else None
        if not self.inside:
            settle(site)
            look(site)
        self.operands = operands = spec.arranged(operands)
        self.rows = decide_rows(site, state0, operands, sizes)
        self.layout, self.runner = _prepared(site, state0, self.rows, operands, sizes)
        z0 = self.layout.matrix(state0)
        self.z0 = z0.detach() if z0.requires_grad else z0
        # The last evaluation is at the fixed point: with what it saves the backward need not evaluate once more.
        iterates = site.follows or config.solver == "broyden"
        saves = spec.grad and iterates and config.backward != "unroll" and not spec.stop and not on_gpu(z0.device)
        self.evaluations = self.runner.evaluations(operands, spec.needs if saves else None)
        self.body: Callable[[Tensor], Tensor] = self.evaluations
        self.stop = any_of(spec.stop, self.layout, (*operands, *sizes))
        self.own_stop = any_of(spec.own_tests, self.layout, (*operands, *sizes))
        self._solve = solve_for
        if self.watch is not None:
            self.body, self._solve = self.watch.timed("body", self.body), self.watch.timed("solver", solve_for)

    def solved(
        self, start: Tensor, tol: float, *, solver: str | None = None, max_iter: int | None = None, tested: bool = True
    ) -> Solution:
        return self._solve(
            self.site, self.body, start, tol=tol, solver=solver, max_iter=max_iter, watched=not self.inside,
            stop=self.stop if tested else None,
        )  # fmt: skip

    def first(self) -> Solution:
        """The solve that stands in for the loop, or the loop's own iterates to where they converge."""
        site = self.site
        if site.follows:
            followed = self.solved(self.z0, site.tol, solver="picard", max_iter=site.spec.own_loop_cap)
            if site.spec.own_loop_cap is not None or not followed.missed():
                return followed
            return self.solved(followed.z, site.tol)  # the user's solver would be faster than plain iterations, too
        captured = None if self.inside else _captured(site, self.runner, self.z0, self.operands, self.sizes)
        if captured is not None:
            solution = captured.solve(self.z0, self.operands, leaves=site.spec.stores_steps)
            if solution is not None:
                return solution
        return self.solved(self.z0, site.tol)

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


def solve_for(
    site: Site,
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    tol: float | None = None,
    solver: str | None = None,
    max_iter: int | None = None,
    watched: bool = True,
    stop: Callable[[Tensor, Tensor], bool] | None = None,
) -> Solution:
    """:func:`~.forward.solve` with a region's settings, but for those that are given."""
    config = site.spec.config
    found = solve(
        f,
        z0,
        solver=solver or config.solver,
        tol=site.tol if tol is None else tol,
        stop_mode=config.stop_mode,
        max_iter=max_iter or config.max_iter,
        memory=config.memory,
        factor_dtype=site.spec.factor_dtype,
        body_eps=site.spec.body_eps,
        room=site.room,
        watched=watched,
        anderson_memory=config.anderson_memory,
        anderson_damping=config.anderson_damping,
        stop=stop,
    )
    if found.state is not None:
        site.took(found.evaluations)
    return found


def _prepared(
    site: Site, state0: Sequence[Tensor], rows: bool, operands: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[Layout, Runner]:
    """Layout and runner for these shapes; those of the last call mostly are, and that is seen without hashing them."""
    metas = [(o.shape, o.stride(), o.dtype, o.device) for o in operands]
    facts = [s.shape for s in state0], rows, metas, list(sizes)
    prepared = site.prepared
    if prepared is None or prepared[0] != facts:
        layout = site.spec.layout(facts[0], rows)
        prepared = site.prepared = facts, layout, runner_for(site.spec.body, layout, operands, sizes)
    return prepared[1], prepared[2]


def _captured(
    site: Site, runner: Runner, z0: Tensor, operands: Sequence[Tensor], sizes: Sequence[int]
) -> engine.CapturedForward | engine.Declined | None:
    """The captured solve of this region for these shapes, on a GPU and from the second call on."""
    config = site.spec.config
    # A test of the user's own is a question to the host in every iteration.
    if config.solver != "broyden" or config.engine == "loop" or site.spec.stop or not on_gpu(z0.device):
        return None
    settings = engine.ForwardSettings(
        site.tol, config.stop_mode, config.max_iter, config.memory, site.spec.factor_dtype, site.spec.body_eps
    )
    engine.end_with(site)
    found = engine.captured_forward((site.key, *sizes), runner, z0, operands, settings, config.engine)
    if found is not None:
        site.use(found.name, found.reason)
    return found
