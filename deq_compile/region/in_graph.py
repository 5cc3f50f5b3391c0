"""A region as a loop that is itself part of a graph: the solver in torch's own operations, for programs that run where nobody has
this package.

No question to the host, buffers of one size for all iterations, and nothing that is learnt from call to call: no comparison, no
verdict. So a loop of a fixed count keeps the user's own iterates and ends early where they have converged; what declares a fixed
point is solved by Broyden's method, and where that misses, the user's iterations follow in the same call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Steps, advance_padded
from deq_compile.kernels.iteration import (
    CONVERGED,
    FALL,
    FLOOR,
    MAX_ITER,
    NORM_EPS,
    RESOLUTION,
    RUNNING,
    Progress,
    observe_by_masks,
    progress_fields,
    solve_info_of,
)

from .backward import of_steps
from .layout import Layout
from .outputs import Outputs
from .run import OPEN_CAP
from .site import RegionSpec
from .solvers import SOLVERS, Problem
from .stop import StopTest, ends_well_as_tensor
from .surroundings import NotHere

Carried = tuple[Any, ...]
# (condition, turn, what is carried from turn to turn, what is read in every turn) -> what was carried last. Both functions are
# given both, as one list of arguments.
Loop = Callable[[Callable[..., Tensor], Callable[..., Carried], Carried, Carried], Carried]


def run_in_graph(
    spec: RegionSpec, rows: bool, loop: Loop, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[Any]
) -> list[Tensor]:
    """What `deq::solve` returns, by operations of torch's alone.

    Args:
        spec: of the region.
        rows: whether dimension 0 of the state is a batch of independent samples.
        loop: the graph's loop.
        state0, operands, sizes: as the operator is given them; sizes may be symbols.
    """
    if of_steps(spec.config):
        raise NotHere(
            f"an export of the fixed-point region at {spec.where}: expected a solver whose result does not hang on its steps, "
            "got solver='reversible'. Fix: solver='broyden' or 'picard' for the export, which end at the same one within tol"
        )
    region = _Region(spec, rows, state0, operands, sizes)
    z0 = region.layout().flatten(state0).clone()
    if _follows(spec):
        own = _own_loop(region, loop, z0, torch.ones((), dtype=torch.bool, device=z0.device), early=not spec.own_tests)
        given, info = own.z, own.info()
    else:
        given, info = _solved(region, loop, z0)
    count = state0[0].shape[0] if state0[0].dim() else 1
    if not rows:
        info = info[:1].expand(count, -1)
    held = [given.reshape(-1)] if spec.grad else []
    return Outputs(region.states(given), torch.zeros(4, dtype=torch.int64), info, held).flat


def _follows(spec: RegionSpec) -> bool:
    """Whether the user's own iterates have to be taken: a solve may end elsewhere, and nobody would compare it."""
    if spec.own_loop_cap is None:
        return False
    counted = spec.iterations is not None and spec.config.verify != "never"
    return counted or spec.suspect or SOLVERS[spec.config.solver].plain


class _Region:
    """The body on the flat state, and the user's tests. Operands, sizes and symbolic shapes come as `others` with each call,
    since a loop of a graph has to be given all that it reads."""

    def __init__(
        self, spec: RegionSpec, rows: bool, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[Any]
    ) -> None:
        self.spec, self.rows, self.operands = spec, rows, len(operands)
        self.shapes = [tuple(s.shape) for s in state0]
        self.symbols = [size for shape in self.shapes for size in shape if not isinstance(size, int)]
        *given, count = sizes if spec.outside is not None else (*sizes, None)
        self.sizes = len(given)
        # a count that comes with the call goes last
        self.others: Carried = (*operands, *given, *self.symbols, *(() if spec.outside is None else (count - spec.outside,)))

    def cap(self, others: Carried) -> Any:
        """The most iterations of the user's own loop: a number, or the count that comes with the call."""
        return self.spec.own_loop_cap if self.spec.outside is None else others[-1]

    def layout(self, others: Carried | None = None) -> Layout:
        """With the symbols as `others` brings them."""
        symbols = iter((self.others if others is None else others)[self.operands + self.sizes :])
        shapes = tuple(tuple(size if isinstance(size, int) else next(symbols) for size in shape) for shape in self.shapes)
        return Layout(shapes, self.spec.dtypes, self.spec.orders, self.rows)

    def f(self, z: Tensor, others: Carried) -> Tensor:
        """The body, (B, D) -> (B, D)."""
        operands, sizes = others[: self.operands], others[self.operands : self.operands + self.sizes]
        return self.spec.body.flat(self.layout(others), z, operands, sizes).to(z.dtype)

    def ended(self, tests: Sequence[StopTest], z: Tensor, f: Tensor, others: Carried) -> Tensor:
        """Whether any of the tests ends the loop here, a bool tensor of no dimensions."""
        given = others[: self.operands + self.sizes]
        found = [test.as_tensor(self.layout(others), z, f, given) for test in tests]
        return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=z.device)

    def states(self, z: Tensor) -> list[Tensor]:
        """Tensors of the strides that the operator's have."""
        layout = self.layout()
        parts = [part.contiguous() for part in z.split(layout.widths, 1)]
        alone = [Layout((shape,), (dtype,), (order,), self.rows) for shape, dtype, order in zip(
            layout.shapes, layout.dtypes, layout.orders, strict=True)]  # fmt: skip
        found = [one.unflatten(part)[0] for one, part in zip(alone, parts, strict=True)]
        inverses = [sorted(range(len(order)), key=order.__getitem__) for order in layout.orders]
        return [
            state.permute(order).contiguous().permute(inverse)
            for state, order, inverse in zip(found, layout.orders, inverses, strict=True)
        ]


# ---- the user's own iterations


class _Own(NamedTuple):
    """z (B, D); iterations () int64; passed (B,) whether a test, or the tolerance, ended it; residual, norm, size, first (B,):
    the stopping residual, |f - z| and |f| at the last evaluation, and |f - z| at the first."""

    z: Tensor
    iterations: Tensor
    passed: Tensor
    residual: Tensor
    norm: Tensor
    size: Tensor
    first: Tensor

    def info(self) -> Tensor:
        code = torch.where(self.passed, CONVERGED, MAX_ITER)
        return solve_info_of(self.residual, self.iterations.expand_as(code), code)


def _own_loop(region: _Region, loop: Loop, z0: Tensor, wanted: Tensor, *, early: bool) -> _Own:
    """The user's own loop from z0, where `wanted` () says so: until one of its tests or its cap ends it. With `early` also where
    what is left of the way is within the tolerance, as the last two residuals foretell it: |g| r / (1 - r) with r their ratio."""
    spec, config = region.spec, region.spec.config
    assert spec.own_loop_cap is not None

    def condition(k: Tensor, z: Tensor, ended: Tensor, *others: Any) -> Tensor:
        return (k < region.cap(others)) & ~ended

    def turn(k: Tensor, z: Tensor, ended: Tensor, norm: Tensor, size: Tensor, first: Tensor, *others: Any) -> Carried:
        f = region.f(z, others)
        here, size = torch.linalg.vector_norm(f - z, dim=1), torch.linalg.vector_norm(f, dim=1)
        ended = region.ended(spec.own_tests, z, f, others)
        if early:
            ratio = here / norm
            left = torch.maximum(here, here * ratio / (1 - ratio))
            goal = config.tol * (size + NORM_EPS) if config.stop_mode == "rel" else torch.full_like(size, config.tol)
            ended = ended | (((ratio < 1) & (left <= goal)) | (here == 0)).all()
        return k + 1, f.clone(), ended, here, size, torch.where(k == 0, here, first)

    zero = z0.new_zeros(z0.shape[0])
    start = (torch.zeros((), dtype=torch.int64, device=z0.device), z0.clone(), ~wanted, zero, zero.clone(), zero.clone())
    k, z, ended, norm, size, first = loop(condition, turn, start, region.others)
    residual = norm / (size + NORM_EPS) if config.stop_mode == "rel" else norm
    return _Own(z, k, ended.expand_as(norm), residual, norm, size, first)


def _plain(region: _Region, loop: Loop, z0: Tensor, good: Tensor) -> _Own:
    """Plain iterations for the samples that are not `good` (B,), where a fixed point was declared without a loop."""
    spec, config = region.spec, region.spec.config
    cap = max(config.max_iter, spec.iterations or min(spec.own_cap or 1, OPEN_CAP))
    relative, tol = config.stop_mode == "rel", 0.0 if spec.stop else config.tol

    def condition(k: Tensor, z: Tensor, passed: Tensor, *rest: Any) -> Tensor:
        return (k < cap) & ~passed.all()

    def turn(k: Tensor, z: Tensor, passed: Tensor, good: Tensor, residual: Tensor, norm: Tensor, size: Tensor, first: Tensor,
             *others: Any) -> Carried:  # fmt: skip
        f = region.f(z, others)
        norm, size = torch.linalg.vector_norm(f - z, dim=1), torch.linalg.vector_norm(f, dim=1)
        residual = norm / (size + NORM_EPS) if relative else norm
        ended = region.ended(spec.stop, z, f, others) & torch.isfinite(norm)
        passed = good | (residual <= tol) | ended
        return k + 1, f.clone(), passed, good.clone(), residual, norm, size, torch.where(k == 0, norm, first)

    zero = [z0.new_zeros(z0.shape[0]) for _ in range(4)]
    start = (torch.zeros((), dtype=torch.int64, device=z0.device), z0.clone(), good.clone(), good.clone(), *zero)
    k, z, passed, _, residual, norm, size, first = loop(condition, turn, start, region.others)
    return _Own(z, k, passed & ~good, residual, norm, size, first)


# ---- the solver


class _Found(NamedTuple):
    """The iterate of smallest residual (B, D); what the solve came to, (B,) each; and |f(z) - z| there."""

    z: Tensor
    residual: Tensor
    iterations: Tensor
    done: Tensor
    norm: Tensor


def _solved(region: _Region, loop: Loop, z0: Tensor) -> tuple[Tensor, Tensor]:
    """What goes out for the fixed point (B, D), and what the solve came to (B, 3)."""
    spec = region.spec
    found = _solve(region, loop, z0)
    good = (found.done == CONVERGED) | (found.done == FLOOR)
    info = solve_info_of(found.residual, found.iterations, found.done)
    if spec.own_loop_cap is not None:
        missed = ~good.all()
        own = _own_loop(region, loop, z0, missed, early=False)
        given = region.f(found.z, region.others) if spec.attached else found.z
        return torch.where(missed, own.z, given), torch.where(missed, own.info(), info)
    plain = _plain(region, loop, z0, good)
    far = torch.linalg.vector_norm(found.z, dim=1)
    ours = torch.maximum(found.norm, RESOLUTION * torch.finfo(z0.dtype).eps * far)
    reached = far <= 2 * plain.size.nan_to_num(nan=math.inf, posinf=math.inf)
    sound = torch.isfinite(ours) & ~(ours > plain.norm) & ((ours <= FALL * plain.first) | reached)  # as forward.or_plain
    take = (~good & ~sound)[:, None]
    z = torch.where(take, plain.z, found.z)
    code = torch.where(plain.passed, CONVERGED, found.done)
    theirs = solve_info_of(plain.residual.nan_to_num(nan=math.inf), plain.iterations.expand_as(code), code)
    return (region.f(z, region.others) if spec.attached else z), torch.where(take, theirs, info)


_PROGRESS = ("done", "best", "z_best", "iterations", "mark", "stall", "ceiling")


def _solve(region: _Region, loop: Loop, z0: Tensor) -> _Found:
    """Broyden's method, or the plain iteration where that was asked for, by the package's stopping rule."""
    spec, config = region.spec, region.spec.config
    tol, relative = 0.0 if spec.stop else config.tol, config.stop_mode == "rel"
    floor = Problem(body_eps=spec.body_eps).floor(z0.dtype)
    plain = SOLVERS[config.solver].plain
    marks = len(_PROGRESS)

    def condition(k: Tensor, z: Tensor, done: Tensor, *_: Any) -> Tensor:
        return (k < config.max_iter) & (done == RUNNING).any()

    def turn(k: Tensor, z: Tensor, *rest: Any) -> Carried:
        (norm_best, g0, f0), rest = rest[marks : marks + 3], (*rest[:marks], *rest[marks + 3 :])
        fields = {name: tensor.clone() for name, tensor in zip(_PROGRESS, rest, strict=False)}
        steps, others = (Steps(*rest[marks : marks + 4]), rest[marks + 4 :]) if not plain else (None, rest[marks:])
        f = region.f(z, others)
        g, k, before = f - z, k + 1, fields["best"].clone()
        norm, size = torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(f, dim=1)
        g0, f0 = torch.where(k == 1, norm, g0), torch.where(k == 1, size, f0)
        here = z.clone()
        running = fields["done"] == RUNNING
        p = Progress(**fields, tol=tol, relative=relative, floor=floor, active=1, evaluations=k.clone() - 1)  # type: ignore[arg-type]
        observe_by_masks(p, here, g, f, last=False)
        fields = {name: getattr(p, name) for name in _PROGRESS}
        norm_best = torch.where(fields["best"] < before, norm, norm_best)
        if spec.stop:
            residual = norm / (size + NORM_EPS) if relative else norm
            holds = region.ended(spec.stop, z, f, others)
            well = holds & ends_well_as_tensor((g0, f0), (norm, size))
            given_up = holds & ~torch.isfinite(norm).all()
            _accept(fields, running & well, z, residual, k, given_up & ~well)
            norm_best = torch.where(running & well, norm, norm_best)
        moved: Carried = ()
        if steps is None:
            z = torch.where((fields["done"] == RUNNING)[:, None], f, here)
        else:
            steps, z = advance_padded(steps, here, g, fields["done"])
            moved = steps
        return k, z, *(fields[name] for name in _PROGRESS), norm_best, g0, f0, *moved

    fields = progress_fields(z0, tol, relative, floor)
    zero = [z0.new_zeros(z0.shape[0]) for _ in range(2)]
    steps: Carried = () if plain else Steps.none(z0, config.memory)
    counter = torch.zeros((), dtype=torch.int32, device=z0.device)
    start = (counter, z0.clone(), *(fields[n] for n in _PROGRESS), fields["best"].clone(), *zero, *steps)
    k, _, done, best, z_best, iterations, _, _, _, norm, *_ = loop(condition, turn, start, region.others)
    left = done == RUNNING
    return _Found(z_best, best, torch.where(left, k, iterations), torch.where(left, MAX_ITER, done), norm)


def _accept(fields: dict[str, Tensor], here: Tensor, z: Tensor, residual: Tensor, k: Tensor, given_up: Tensor) -> None:
    """End the samples `here` (B,) at z, since the user's test holds; where it can hold no more, end all that still run."""
    rest = (fields["done"] == RUNNING) & given_up
    done = torch.where(here, CONVERGED, torch.where(rest, MAX_ITER, fields["done"]))
    fields["done"] = done.to(fields["done"].dtype)
    fields["iterations"] = torch.where(here | rest, k, fields["iterations"])
    fields["best"] = torch.where(here, residual, fields["best"])
    fields["z_best"] = torch.where(here[:, None], z, fields["z_best"])
