"""JAX on the device: the problems of `bench.problems`, jitted, by optimistix, by jaxopt where it is installed, and by plain JAX.

The plain one is the peer that is sure to run where JAX does: Good Broyden with two stored vectors an iteration (Bai, Kolter &
Koltun 2019, arXiv 1909.01377, as `peer_torchdeq.py`), the whole loop one `lax.while_loop`, and the implicit gradient as a
`custom_vjp` whose adjoint is solved by the same method. Bodies and the libraries' settings are those of `bench.tables.jax_peers`.
Products are in full float32, as torch's are: JAX's default on such devices is TF32.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.tables.cases import Case
from bench.tables.jax_peers import Jaxopt, Optimistix, _Jax

from .workloads import OfProblem, Workload

MAX_ITER = 40


class Missing(Exception):
    """Why JAX has no row here."""


class PlainBroyden(_Jax):
    """Forward and adjoint by Good Broyden in plain JAX, to the workload's tolerance per sample."""

    tol = 1e-4

    def solve(self, fn: Callable[[Any, Any], Any], z0: Any, operands: Any) -> tuple[Any, Any]:
        jax, tol = importlib.import_module("jax"), self.tol

        @jax.custom_vjp
        def fixed_point(z0: Any, operands: Any) -> Any:
            return broyden(lambda z: fn(z, operands), z0, tol)

        def forward(z0: Any, operands: Any) -> Any:
            found = fixed_point(z0, operands)
            return found, (found[0], operands)

        def backward(kept: Any, cotangents: Any) -> Any:
            (z, operands), q = kept, cotangents[0]
            pull = jax.vjp(lambda z: fn(z, operands), z)[1]
            w, _ = broyden(lambda w: q + pull(w)[0], jax.numpy.zeros_like(q), tol)
            return jax.numpy.zeros_like(z), jax.vjp(lambda o: fn(z, o), operands)[1](w)[0]

        fixed_point.defvjp(forward, backward)
        return fixed_point(z0, operands)


def broyden(f: Callable[[Any], Any], z0: Any, tol: float) -> tuple[Any, Any]:
    """Solve z = f(z) from z0 (B, ...). Returns the iterate of the smallest residual, max over samples, and the evaluations."""
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    shape = z0.shape
    B, D = shape[0], z0.size // shape[0]

    def flat(z: Any) -> Any:
        return f(z.reshape(shape)).reshape(B, D)

    def apply(left: Any, right: Any, x: Any) -> Any:
        return jnp.einsum("bmd,bm->bd", left, jnp.einsum("bmd,bd->bm", right, x)) - x

    def worst_of(fz: Any, g: Any) -> Any:
        return (jnp.linalg.norm(g, axis=1) / (jnp.linalg.norm(fz, axis=1) + 1e-9)).max()

    def goes_on(carry: Any) -> Any:
        k, best = carry[0], carry[-1]
        return (k < MAX_ITER - 1) & (best > tol)

    def once(carry: Any) -> Any:
        k, z, fz, U, V, best_at, best = carry
        g = fz - z
        step = -apply(U, V, g)
        moved = z + step
        found = flat(moved)
        change = found - moved - g
        v = apply(V, U, step)
        u = (step - apply(U, V, change)) / jnp.einsum("bd,bd->b", v, change)[:, None]
        U = U.at[:, k].set(jnp.nan_to_num(u))
        V = V.at[:, k].set(jnp.nan_to_num(v))
        worst = worst_of(found, found - moved)
        better = worst < best
        return k + 1, moved, found, U, V, jnp.where(better, moved, best_at), jnp.where(better, worst, best)

    z = z0.reshape(B, D)
    fz = flat(z)
    stored = jnp.zeros((B, MAX_ITER, D), z.dtype)
    k, *_, best_at, _ = jax.lax.while_loop(goes_on, once, (0, z, fz, stored, stored, z, worst_of(fz, fz - z)))
    return best_at.reshape(shape), k + 1


# Name of the row, class, packages that have to be there.
WAYS: dict[str, tuple[type[_Jax], tuple[str, ...]]] = {
    "JAX: Broyden, jitted": (PlainBroyden, ("jax",)),
    "JAX: optimistix, jitted": (Optimistix, ("jax", "optimistix", "lineax")),
    "JAX: jaxopt, jitted": (Jaxopt, ("jax", "jaxopt")),
}


def ready(name: str, workload: Workload, dry: bool) -> None:
    """Whether a way can run here.

    Raises:
        Missing: why not.
    """
    if not isinstance(workload.model, OfProblem):
        raise Missing("its body is not written in JAX")
    if missing := [m for m in WAYS[name][1] if importlib.util.find_spec(m) is None]:
        raise Missing(f"not installed: {', '.join(missing)}")
    jax = importlib.import_module("jax")
    if not dry and jax.default_backend() not in ("gpu", "cuda"):
        raise Missing(f"JAX sees no GPU here, only {jax.default_backend()}")
    jax.config.update("jax_default_matmul_precision", "highest")


class JaxStep:
    """A jitted step on a workload: `call()` waits for its end; then `value` and `gradient` are read."""

    def __init__(self, name: str, workload: Workload) -> None:
        assert isinstance(workload.model, OfProblem)
        loop = workload.model.loop.float().cpu()
        loss_of = workload.cotangent
        assert loss_of is not None
        case = Case(workload.name, "before", loop.n_iter, loop, tuple(t.detach().cpu() for t in workload.inputs), loop)
        case.cotangents = [loss_of.detach().float().cpu()]
        kind = WAYS[name][0]
        if kind is PlainBroyden:
            kind = type("PlainBroyden", (PlainBroyden,), {"tol": workload.tol})
        self.case, self.step = case, kind(case)

    def __call__(self) -> None:
        """A training step, its end waited for."""
        self.step.block(self.enqueue())

    def enqueue(self) -> Any:
        return self.step.step(self.step.values, self.step.x)

    def read(self) -> tuple[Tensor, Tensor]:
        """The value and the gradient of all parameters, float64 on the CPU."""
        self.step.run()
        found = [p.grad for p in self.case.model.parameters()]
        return self.step.outputs.double(), torch.cat([g.flatten().double() for g in found if g is not None])
