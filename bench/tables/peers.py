"""Other libraries on the same bodies: TorchDEQ, and JAX's jaxopt and optimistix where they are installed."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import problems

from .cases import Case
from .methods import Counts, Reading, Step, clocks

TOL = 1e-4
MAX_ITER = 40


class TorchDEQ(Step):
    """TorchDEQ as its users call it, forward and backward to a relative tolerance of 1e-4, at most 40 iterations."""

    def __init__(self, case: Case, solver: str, phantom: bool) -> None:
        get_deq = importlib.import_module("torchdeq").get_deq
        super().__init__(case)
        assert case.loop is not None
        self.loop = case.loop
        both = dict.fromkeys(("f_solver", "b_solver"), solver) | dict.fromkeys(("f_tol", "b_tol"), TOL)
        both |= dict.fromkeys(("f_max_iter", "b_max_iter"), MAX_ITER) | dict.fromkeys(("f_stop_mode", "b_stop_mode"), "rel")
        self.deq = get_deq(core="sliced", ift=not phantom, grad=1, **both)
        self.body: Callable[[Tensor, Tensor], Tensor] = self.loop.body

    def forward(self) -> Tensor:
        (x,) = self.case.inputs
        if self.loop.inject_inside:
            found, _ = self.deq(lambda z: self.body(z, self.loop.injection(x)), torch.zeros_like(x))
        else:
            u = self.loop.injection(x)
            found, _ = self.deq(lambda z: self.body(z, u), torch.zeros_like(x))
        z: Tensor = found[-1]
        return z

    def counts(self) -> Counts:
        gradients: Any = importlib.import_module("torchdeq.grad")
        solving = vjps = 0

        def body(z: Tensor, u: Tensor) -> Tensor:
            nonlocal solving
            solving += not torch.is_grad_enabled()
            return self.loop.body(z, u)

        def grad(*args: Any, **kwargs: Any) -> Any:
            nonlocal vjps
            vjps += 1
            return torch.autograd.grad(*args, **kwargs)

        original = gradients.autograd
        gradients.autograd = types.SimpleNamespace(grad=grad)
        self.body = body
        try:
            self.run()
        finally:
            gradients.autograd = original
            self.body = self.loop.body
        return {"iterations": solving, "vjps": vjps + 1, "status": "peer"}  # one more VJP: the attached step's


def silva(case: Case) -> Step:
    raise NotImplementedError("silva-networks is installed, but nobody has written its row yet")


class _Jax(Step):
    """A jitted forward and backward; both are timed as one, as the backward."""

    def __init__(self, case: Case) -> None:
        jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
        super().__init__(case)
        assert case.loop is not None
        names = [name for name, _ in case.model.named_parameters()]
        self.values = {n: jnp.asarray(p.detach().numpy()) for n, p in zip(names, case.model.parameters(), strict=True)}
        self.x = jnp.asarray(case.inputs[0].detach().numpy())
        c = jnp.asarray(case.cotangents[0].numpy())
        injection, body = _jax_body(case.loop)

        def loss(values: Any, x: Any) -> Any:
            u = injection(values, x)
            z = self.solve(lambda z, operands: body(operands[0], z, operands[1]), jnp.zeros_like(x), (values, u))
            return (z * c).sum() / c.shape[0], z

        self.step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        self.block = jax.block_until_ready

    def solve(self, fn: Callable[[Any, Any], Any], z0: Any, operands: Any) -> Any:
        raise NotImplementedError

    def run(self) -> tuple[Reading, Reading, Reading]:
        start = clocks()
        (_, z), (values, x) = self.block(self.step(self.values, self.x))
        end = clocks()
        self.outputs = torch.tensor(z.tolist())
        for name, parameter in self.case.model.named_parameters():
            parameter.grad = torch.tensor(values[name].tolist())
        self.case.inputs[0].grad = torch.tensor(x.tolist())
        return start, start, end

    def counts(self) -> Counts:
        return {"status": "peer"}


class Jaxopt(_Jax):
    def solve(self, fn: Callable[[Any, Any], Any], z0: Any, operands: Any) -> Any:
        jaxopt = importlib.import_module("jaxopt")
        solver = jaxopt.FixedPointIteration(fn, maxiter=10 * MAX_ITER, tol=TOL, implicit_diff=True)
        return solver.run(z0, operands).params


class Optimistix(_Jax):
    def solve(self, fn: Callable[[Any, Any], Any], z0: Any, operands: Any) -> Any:
        optimistix = importlib.import_module("optimistix")
        solver = optimistix.FixedPointIteration(rtol=TOL, atol=TOL)
        return optimistix.fixed_point(fn, solver, z0, operands, max_steps=10 * MAX_ITER, throw=False).value


def _jax_body(loop: Any) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any, Any], Any]]:
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
