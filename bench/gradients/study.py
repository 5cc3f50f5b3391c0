"""The quality of each backward on a trained body, against float64."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from deq_compile.testing import factors_of, solve, spectral_radius

from .bodies import RECIPES, TRAINING_SAMPLES
from .modes import MODES
from .train import train

SEEDS = (0, 1, 2)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SAMPLES = 32
FORWARD_CAP = 60
REFERENCE_TOL = 1e-11


@dataclass(frozen=True)
class Row:
    """One mode on one body.

    cosine, error        of the parameter gradient of the batch with the exact one at z*
    w_cosine             median over samples of the cosine of w with the exact adjoint at z*
    w_cosine_here, error_here   the same two against the exact adjoint at the iterate the forward returned
    residual             adjoint residual of the batch, as reported
    products             VJPs; `state_products` those without operand gradients
    seconds              CPU time of the backward, median of 3
    samples              that reached the forward tolerance, and whose fixed point the reference found; of SAMPLES
    radius               largest spectral radius of the Jacobian at z*
    """

    body: str
    seed: int
    tol: float
    mode: str
    cosine: float
    error: float
    w_cosine: float
    error_here: float
    w_cosine_here: float
    residual: float
    products: int
    seconds: float
    samples: int
    iterations: float
    radius: float


@dataclass
class Exact:
    """In float64: adjoint (B, D) and parameter gradient."""

    w: Tensor
    gradient: Tensor


def jacobian(module: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """(B, D, D), sample by sample."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())

    def one(z: Tensor, x: Tensor) -> Tensor:
        return functional_call(module, parameters, (z[None], x[None]))[0]

    with torch.no_grad():
        return torch.cat([vmap(jacrev(one))(z[i : i + 1], x[i : i + 1]) for i in range(len(z))])


def exact(module: nn.Module, z: Tensor, x: Tensor, q: Tensor) -> Exact:
    J = jacobian(module, z, x)
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    w = torch.stack([torch.linalg.solve(eye - j.T, c) for j, c in zip(J, q, strict=True)])
    return Exact(w, gradient(module, z, x, w))


def gradient(module: nn.Module, z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The parameters' part of w^T df, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(module(z, x), list(module.parameters()), w)])


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def fixed_point(module: nn.Module, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """From z to REFERENCE_TOL in float64, and which samples got there: Broyden, then Newton with dense Jacobians."""
    found = solve(lambda z: module(z, x), z, tol=REFERENCE_TOL, max_iter=120)
    z = found.z
    if not bool((found.status <= 2).all()) and z.shape[1] <= 256:
        eye = torch.eye(z.shape[1], dtype=z.dtype)
        for _ in range(8):
            with torch.no_grad():
                z = z + torch.linalg.solve(eye - jacobian(module, z, x), (module(z, x) - z)[:, :, None])[:, :, 0]
    with torch.no_grad():
        residual = (module(z, x) - z).norm(dim=1) / module(z, x).norm(dim=1)
    return z, residual <= 10 * REFERENCE_TOL


def rows(body: str, seed: int, tol: float, weights: Path, modes: list[str]) -> list[dict[str, Any]]:
    trained = train(body, seed, weights)
    module, head = trained.module, trained.head
    i = torch.arange(TRAINING_SAMPLES, TRAINING_SAMPLES + SAMPLES)
    width = RECIPES[body].width
    solution = solve(lambda z: module(z, trained.x[i]), torch.zeros(SAMPLES, width), tol=tol, max_iter=FORWARD_CAP)
    module64, head64 = copy.deepcopy(module).double(), copy.deepcopy(head).double()
    z64, reached = fixed_point(module64, solution.z.double(), trained.x[i].double())
    # A reference that wandered off to another fixed point says nothing about the gradient at this one.
    near = (z64 - solution.z).norm(dim=1) <= 0.1 * z64.norm(dim=1)
    keep = ((solution.status <= 2) & reached & near).nonzero()[:, 0]
    if not len(keep):
        return []
    x, y, z, z_star = trained.x[i[keep]], trained.y[i[keep]], solution.z[keep], z64[keep]
    state = solution.state
    assert state is not None
    factors = factors_of(state.S[keep].contiguous(), state.C[keep].contiguous(), state.n[keep].contiguous())
    q = _cotangent(head, z, y)
    there = exact(module64, z_star, x.double(), _cotangent(head64, z_star, y))
    here = exact(module64, z.double(), x.double(), q.double())
    radius = float(spectral_radius(lambda z: module64(z, x.double()), z_star).max())
    linear = z.clone().requires_grad_()
    fz = module(linear, x)
    parameters = list(module.parameters())

    def vjp(w: Tensor) -> Tensor:
        return torch.autograd.grad(fz, linear, w, retain_graph=True)[0]

    def vjp_full(w: Tensor) -> tuple[Tensor, Tensor]:
        jw, *grads = torch.autograd.grad(fz, [linear, *parameters], w, retain_graph=True)
        return jw, torch.cat([g.flatten() for g in grads])

    found = []
    for name in modes:
        mode = MODES[name]()
        times = []
        for _ in range(4):  # the first one teaches the mode how many products to expect
            begin = time.process_time()
            done = mode(vjp, vjp_full, q, factors)
            times.append(time.process_time() - begin)
        g, w = done.payload.double(), done.w.double()
        row = Row(
            body=body, seed=seed, tol=tol, mode=name, cosine=cosine(g, there.gradient),
            error=float((g - there.gradient).norm() / there.gradient.norm()), w_cosine=_median_cosine(w, there.w),
            error_here=float((g - here.gradient).norm() / here.gradient.norm()), w_cosine_here=_median_cosine(w, here.w),
            residual=done.residual, products=done.vjps, seconds=sorted(times[1:])[1], samples=len(keep),
            iterations=float(solution.iterations[keep].double().mean()), radius=radius,
        )  # fmt: skip
        found.append(dataclasses.asdict(row))
    return found


def _cotangent(head: Callable[[Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    z = z.detach().clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(head(z), y), z)[0]


def _median_cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=1).median())
