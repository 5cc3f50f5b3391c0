"""Other PyTorch libraries on the same bodies, where they are installed: TorchDEQ and silva-networks."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .methods import Counts, Step

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


class Silva(Step):
    """silva-networks through its general engine, forward and adjoint by the same method, to the tolerances of `TorchDEQ`.

    Fixed-point iteration is tested by the worst sample, as ours, and is not damped. Its Broyden takes the whole batch for one
    vector, so that half the tolerance is what brings the worst sample to TOL; it starts anew where its history is full, and
    is given room for all iterations.
    """

    def __init__(self, case: Case, solver: str) -> None:
        networks = importlib.import_module("silva_networks")
        super().__init__(case)
        assert case.loop is not None
        self.loop = case.loop
        with torch.enable_grad():
            x = case.inputs[0].detach()
            f = self.loop.body(x, self.loop.injection(x).detach())
            used = torch.autograd.grad(f.sum(), list(case.model.parameters()), allow_unused=True)
        # Parameters of the transition only: those of the injection get their gradient through u.
        self.parameters = [p for p, gradient in zip(case.model.parameters(), used, strict=True) if gradient is not None]
        picard = solver == "picard"
        config = networks.SILVADEQConfig(
            forward_solver=solver, forward_tol=TOL if picard else TOL / 2, forward_max_iter=MAX_ITER, stop_mode="relative",
            backward_solver=solver, backward_tol=TOL, backward_max_iter=MAX_ITER, backward_stop_mode="relative",
            backward_mode="implicit", alpha=1.0, history=MAX_ITER, anderson_batch_dims=1 if picard else 0,
        )  # fmt: skip
        self.engine = networks.SILVADEQEngine(config)
        self.result: Any = None

    def forward(self) -> Tensor:
        (x,) = self.case.inputs
        u = self.loop.injection(x)
        start = torch.zeros_like(x, requires_grad=False)
        found = self.engine(lambda z: self.loop.body(z, u), start, params=self.parameters, tensors=(u,), return_result=True)
        self.result = found.solver_result
        z: Tensor = found.state
        return z

    def counts(self) -> Counts:
        self.run()
        vjps = int(self.result.info["backward_iterations"])
        return {"iterations": self.result.iterations, "vjps": vjps + 1, "status": "peer"}  # one more VJP: the parameters'
