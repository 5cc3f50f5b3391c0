"""``warm_start="previous"``: a solve that begins from the last fixed point, and its adjoint from the last w.

For calls that resemble the one before: full-batch graph networks, one image at a time, video; and where the fixed point itself
is meant (`fixed_point`, ``semantics="equilibrium"``). If it is the only one, the start changes how long a solve takes and not
what it finds; of several the one that was found last is followed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .adjoint import AdjointProblem, AdjointSolution, certified_at, solve_adjoint
from .backward import BACKWARDS
from .domain import or_nan
from .status import AdjointStatus

if TYPE_CHECKING:
    from deq_compile.config import Config
    from deq_compile.kernels.broyden import Factors

    from .body import Linearised
    from .call import Call
    from .forward import Solution
    from .site import Site

# Calls between two that look at both starts, at two evaluations.
CHECK_EVERY = 8


class Start(NamedTuple):
    """An adjoint w (B, D) to begin from, and the products that are expected from there: equal for all backwards of a forward."""

    w: Tensor
    expected: int


class Warm:
    """What one region remembers of its last call.

    z       (B, D) its fixed point; shapes: those of the states
    last    its adjoint
    better  whether z was the better start when both were looked at last
    calls   since then
    length  evaluations of the last solve that began from a start that had been looked at
    """

    def __init__(self) -> None:
        self.z: Tensor | None = None
        self.last: Start | None = None
        self.shapes: Any = None
        self.better = False
        self.calls = self.length = 0


def warm_for(config: Config) -> Warm | None:
    """Where a new region remembers its calls; None where the option is off."""
    return None if config.warm_start == "never" else Warm()


def warm_of(call: Call, due: bool) -> Warm | None:
    """What a call may begin from: only where the fixed point is meant, since of several ones the user's loop, or solver, has that
    which its own start leads to; nor where the gradient is that of the iterates."""
    site, warm = call.site, call.site.warm
    if warm is None or BACKWARDS[site.spec.config.backward].gradient not in ("implicit", "approximate"):
        return None
    theirs = site.spec.own_loop_cap is not None or site.spec.solver_call or site.follows
    return None if due or theirs or call.inside else warm


def solve_warm(call: Call, warm: Warm, solve: Callable[[], Solution]) -> Solution:
    """What `solve` gives from the better start, for each sample of its own where both are looked at; from the call's own start
    where that misses the tolerance."""
    own = call.z0
    seen = warm.z if warm.z is not None and warm.shapes == call.layout.shapes and _alike(warm.z, own) else None
    checks = seen is not None and (warm.calls % CHECK_EVERY == 0 or not warm.better)
    if seen is not None and (checks or warm.better):
        call.z0 = _better(call, warm, seen) if checks else seen
    found = solve()
    moved, call.z0 = call.z0 is not own, own
    if moved and not found.all_converged() and found.missed():
        warm.better = False
        return solve()
    warm.calls = 1 if checks else warm.calls + 1
    if checks:
        warm.length = found.evaluations
    elif found.evaluations > warm.length:  # another kind of call: look at both at the next
        warm.calls = 0
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def begins_from(start: Start | None, q: Tensor) -> bool:
    """Whether an adjoint for cotangents q (B, D) can begin there."""
    return start is not None and q.numel() > 0 and _alike(start.w, q)


def _better(call: Call, warm: Warm, seen: Tensor) -> Tensor:
    """(B, D) for each sample the start whose residual is lower: the call's own, or what was seen last."""
    own, other = _residuals(call, call.z0), _residuals(call, seen, or_nan(call.body))
    take = other < own
    warm.better = bool(take.any())
    return torch.where(take[:, None], seen, call.z0) if warm.better else call.z0


def _residuals(call: Call, z: Tensor, body: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(B,) |f(z) - z|; NaN where that is not finite, which no comparison prefers."""
    with torch.no_grad():
        norms = torch.linalg.vector_norm((body or call.body)(z).to(z.dtype) - z, dim=1)
    return torch.where(torch.isfinite(norms), norms, math.nan)


def remember(site: Site, call: Call, z: Tensor) -> None:
    """Note the fixed point z (B, D) of a call."""
    if site.warm is not None and not call.inside:
        if site.warm.shapes != call.layout.shapes:
            site.warm.last, site.warm.calls = None, 0
        site.warm.z, site.warm.shapes = z.detach().clone(), call.layout.shapes  # the user may change his own in place


@dataclasses.dataclass
class _Shifted:
    """A linearised body as an adjoint that begins at `start` sees it: products at d, those with the operands' gradients at
    start + d. `image` is J^T start."""

    linear: Linearised
    start: Tensor
    image: Tensor

    def vjp_full(self, d: Tensor) -> tuple[Tensor, Any]:
        jw, payload = self.linear.vjp_full(self.start + d)
        return jw.to(d.dtype) - self.image, payload


def adjoint_from(
    begin: Start, linear: Linearised, q: Tensor, factors: Factors | None, problem: AdjointProblem
) -> AdjointSolution:
    """w = q + J^T w from an earlier w, where that is nearer than 0: for each sample of its own. The difference d
    solves d = r + J^T d, r being the residual at the start. One product more than counted there."""
    start = begin.w
    image = linear.vjp(start).to(q.dtype)
    r = q + image - start
    nearer = torch.linalg.vector_norm(r, dim=1) < torch.linalg.vector_norm(q, dim=1)  # NaN is not
    start, image = (torch.where(nearer[:, None], t, 0.0) for t in (start, image))
    r = torch.where(nearer[:, None], r, q)
    size, whole = float(torch.linalg.vector_norm(r)), float(torch.linalg.vector_norm(q))
    if size <= problem.tol * whole:
        return dataclasses.replace(certified_at(linear.vjp_full, q, start, AdjointStatus.CONVERGED), vjps=2, needed=1)
    shifted = _Shifted(linear, start, image)
    asked = dataclasses.replace(problem, tol=problem.tol * whole / size, expected=begin.expected)
    found = solve_adjoint(linear.vjp, shifted.vjp_full, r, factors, asked)
    norms = torch.linalg.vector_norm(q, dim=1)
    residuals = found.residuals * torch.linalg.vector_norm(r, dim=1) / torch.where(norms > 0, norms, 1.0)
    return dataclasses.replace(
        found, w=start + found.w, vjps=found.vjps + 1, residual=found.residual * size / whole, residuals=residuals,
        reused=factors is not None,
    )  # fmt: skip
