"""Forward-mode AD of a fixed point: its tangent dz = df + J dz is a fixed point as well, df being what f's inputs carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .forward import solve
from .layout import Layout
from .op import once
from .site import Site
from .solvers import SOLVERS, Problem
from .status import converged
from .surroundings import any_tangent
from .verdict import warn_of_tangent


def primals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without their tangents."""
    return [forward_ad.unpack_dual(t).primal for t in tensors]


def with_tangents(
    f: Callable[[list[Tensor]], Sequence[Tensor]], states: Sequence[Tensor], site: Site, layout: Layout
) -> list[Tensor]:
    """The states of the fixed point of `f`, with the tangents that they have where what f reads has any; those to the adjoint's
    tolerance. Nobody can differentiate the tangents in turn: that raises."""
    values = [s.detach() for s in states]
    with torch.no_grad():
        images = f(values)
        if not any_tangent(images):
            return list(states)

        def equation(dz: Tensor) -> Tensor:
            duals = [forward_ad.make_dual(v, t) for v, t in zip(values, layout.unflatten(dz), strict=True)]
            tangents = [forward_ad.unpack_dual(image).tangent for image in f(duals)]
            return layout.flatten([torch.zeros_like(v) if t is None else t for v, t in zip(values, tangents, strict=True)])

        config = site.spec.config
        most = max(config.max_iter, config.backward_max_iter)
        problem = Problem(tol=site.backward_tol, max_iter=most, body_eps=site.spec.body_eps)
        zero = layout.flatten([torch.zeros_like(v) for v in values])
        found = solve(equation, zero, problem, solver=SOLVERS[config.solver])
        warn_of_tangent(site, bool(converged(found.status).all()), float(found.residual.max()))
    tangents = layout.outputs(found.z, fresh=True)
    if torch.is_grad_enabled():
        tangents = once(tangents, (*primals(f(values)), *states), "reverse mode alone, derivatives=2")
    return [forward_ad.make_dual(s, t) for s, t in zip(states, tangents, strict=True)]
