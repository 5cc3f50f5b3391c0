"""JAX on the same bodies, jitted, where it is installed: jaxopt and optimistix (the extra `bench-jax`).

Both stop on the absolute change of the whole batch, so that a relative 1e-4 a sample has to be translated: `tolerance` is the
loosest with which plain iteration returns what counts as converged. Adjoints are solved to 1e-4 of the cotangent, not by the
libraries' defaults: jaxopt's are conjugate gradients on the normal equations, BiCGStab is up to twice as fast; optimistix's
builds the Jacobian (1 GB for 128 x 128 unknowns), and lineax's BiCGStab refuses cotangents as small as these ("breakdown" is
any product below 1e-16, negative ones included), so GMRES, started anew every 5 products, which was the best of 3, 5, 7, 10.
"""

from __future__ import annotations

import abc
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import problems

from .cases import Case
from .methods import Counts, Reading, Step, clocks
from .peers import TOL

MAX_ITER = 400  # plain iteration takes as long as it takes: 180 steps on the symmetric problems


def start_jax() -> tuple[Any, Any]:
    """jax and jax.numpy, with as many threads as torch has.

    XLA takes the cores that the thread which starts it may use, once, and its idle threads burn time of their own, which
    a process's clock would count. With one core its work runs in the caller's thread (dispatch is not asynchronous).
    """
    jax = importlib.import_module("jax")
    threads = torch.get_num_threads()
    if threads == 1:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not hasattr(os, "sched_setaffinity"):
        jax.devices()
        return jax, jax.numpy
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, sorted(cores)[:threads])
        jax.devices()
    finally:
        os.sched_setaffinity(0, cores)
    return jax, jax.numpy


class _Jax(Step, abc.ABC):
    """A jitted forward and backward; both are timed as one, as the backward. Nothing is converted while the clock runs."""

    def __init__(self, case: Case) -> None:
        jax, jnp = start_jax()
        super().__init__(case)
        assert case.loop is not None
        self.values = {name: jnp.asarray(p.detach().numpy()) for name, p in case.model.named_parameters()}
        self.x = jnp.asarray(case.inputs[0].detach().numpy())
        c = jnp.asarray(case.cotangents[0].numpy())
        injection, body = jax_body(case.loop)
        self.tolerance = tolerance(case)
        self.adjoint_tolerance = TOL * float(case.cotangents[0].norm()) / len(case.cotangents[0])

        def loss(values: Any, x: Any) -> Any:
            u = injection(values, x)
            start = jnp.zeros_like(x)
            z, iterations = self.solve(lambda z, operands: body(operands[0], z, operands[1]), start, (values, u))
            return (z * c).sum() / c.shape[0], (z, iterations)

        self.step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        self.block = jax.block_until_ready
        self.iterations = 0

    @abc.abstractmethod
    def solve(self, fn: Callable[[Any, Any], Any], z0: Any, operands: Any) -> tuple[Any, Any]:
        """The fixed point of ``fn(z, operands)`` from z0, and the number of iterations."""

    def run(self) -> tuple[Reading, Reading, Reading]:
        self.case.clear()
        start = clocks()
        (_, (z, iterations)), (values, x) = self.block(self.step(self.values, self.x))
        end = clocks()
        self.iterations = int(iterations)
        self.outputs = to_torch(z)
        for name, parameter in self.case.model.named_parameters():
            parameter.grad = to_torch(values[name])
        self.case.inputs[0].grad = to_torch(x)
        return start, start, end

    def counts(self) -> Counts:
        self.run()
        return {"iterations": self.iterations, "status": "peer"}  # products: inside a loop that XLA runs


class Jaxopt(_Jax):
    def solve(self, fn: Callable[[Any, Any], Any], z0: Any, operands: Any) -> tuple[Any, Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
            jaxopt = importlib.import_module("jaxopt")

        def adjoint(matvec: Any, b: Any) -> Any:
            return jaxopt.linear_solve.solve_bicgstab(matvec, b, tol=TOL, maxiter=MAX_ITER)

        solver = jaxopt.FixedPointIteration(fn, maxiter=MAX_ITER, tol=self.tolerance, implicit_diff_solve=adjoint)
        params, state = solver.run(z0, operands)
        return params, state.iter_num


class Optimistix(_Jax):
    def solve(self, fn: Callable[[Any, Any], Any], z0: Any, operands: Any) -> tuple[Any, Any]:
        optimistix, lineax = importlib.import_module("optimistix"), importlib.import_module("lineax")
        norm = optimistix.two_norm
        solver = optimistix.FixedPointIteration(rtol=0.0, atol=self.tolerance, norm=norm)
        linear = lineax.GMRES(rtol=0.0, atol=self.adjoint_tolerance, norm=norm, max_steps=MAX_ITER, restart=5)
        adjoint = optimistix.ImplicitAdjoint(linear_solver=linear)
        found = optimistix.fixed_point(fn, solver, z0, operands, max_steps=MAX_ITER, adjoint=adjoint, throw=False)
        return found.value, found.stats["num_steps"]


def to_torch(array: Any) -> Tensor:
    return torch.from_numpy(importlib.import_module("numpy").array(array))


def tolerance(case: Case) -> float:
    """The largest |f(z) - z| over the batch at which plain iteration may stop and return f(z) as converged."""
    loop = case.loop
    assert loop is not None
    with torch.no_grad():
        u = loop.injection(case.inputs[0])
        z = torch.zeros_like(u)
        f = loop.body(z, u)
        for _ in range(MAX_ITER):
            change, z = float((f - z).norm()), f
            f = loop.body(z, u)
            if float(((f - z).flatten(1).norm(dim=1) / f.flatten(1).norm(dim=1)).max()) <= TOL:
                break
    return 1.0001 * change


def jax_body(loop: Any) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any, Any], Any]]:
    """Injection and body of a problem in jax.numpy, on a dict of the module's parameters."""
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")

    def linear(p: Any, name: str, x: Any) -> Any:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def conv(p: Any, name: str, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(x, p[f"{name}.weight"], (1, 1), "SAME")
        return y + p[f"{name}.bias"][None, :, None, None]

    def transformer(p: Any, z: Any, u: Any) -> Any:
        y = z + u
        batch, length, width = y.shape
        heads = loop.heads
        qkv = linear(p, "qkv", y).reshape(batch, length, 3, heads, width // heads)
        q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))
        attention = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / (width // heads) ** 0.5, -1) @ v
        mixed = jnp.swapaxes(attention, 1, 2).reshape(batch, length, width)
        return linear(p, "o", mixed) + linear(p, "f2", jnp.tanh(linear(p, "f1", y)))

    if isinstance(loop, problems.MLP):
        return lambda p, x: linear(p, "U", x), lambda p, z, u: jnp.tanh(linear(p, "W", z) + u)
    if isinstance(loop, problems.Conv):
        return lambda p, x: conv(p, "c3", x), lambda p, z, u: jnp.tanh(conv(p, "c2", jnp.tanh(conv(p, "c1", z))) + u)
    return lambda p, x: linear(p, "U", x), transformer
