"""Kernels and compiled models on the device, against float64; a group for the step, one for adjoints, one for models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deq_compile.testing import (
    Factors,
    TritonState,
    apply_transpose,
    apply_transpose_reference,
    new_state,
    recycle,
    solve_adjoint,
    step,
)

from . import models
from .common import Setting, relative_error

TOL = 2.0**-13
DTYPES = {"fp32": (torch.float32, None), "fp64": (torch.float64, None), "bf16 factors": (torch.float32, torch.bfloat16)}
# Either side of the tiles' edges, primes, both forms, many rows.
SHAPES = [(1, 1), (3, 127), (128, 128), (5, 129), (7, 1021), (4, 8192), (3, 8200), (2, 65537), (129, 9000)]
ADJOINT_SHAPES = [(1, 1), (3, 127), (32, 1024), (5, 8200)]


def toy(B: int, D: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A body whose rows converge at different times, in float64 on the CPU; it computes in its argument's dtype and device."""
    generator = torch.Generator().manual_seed(B * 1000 + D)
    a = 0.6 * torch.rand(D, generator=generator, dtype=torch.float64)
    b = torch.randn(B, D, generator=generator, dtype=torch.float64) * torch.linspace(0.02, 1.5, B, dtype=torch.float64)[:, None]

    def body(z: Tensor) -> Tensor:
        return torch.tanh(a.to(z) * z + 0.3 * z.roll(1, 1) + b.to(z))

    return body, torch.zeros(B, D, dtype=torch.float64)


def solved(z0: Tensor, body: Callable[[Tensor], Tensor], memory: int, factor: torch.dtype | None, tol: float = TOL) -> Any:
    """The state after a solve, on buffers that start as NaN."""
    state = new_state(z0, memory, factor, eta=0.125, tol=tol)
    state.S.fill_(float("nan"))
    if isinstance(state, TritonState):
        state.C.fill_(float("nan"))
    z = z0.clone()
    while state.running:
        step(state, z, body(z), last=state.evaluations + 1 == 40)
    return state


def kernels(setting: Setting) -> None:
    """Solves on edge shapes: the fixed point, and -H^T x from the very factors in float64. fp32 everywhere before the others."""
    shapes = [(2, 17)] if setting.dry else SHAPES
    for name in DTYPES:
        for B, D in shapes:
            if not setting.enough(3, f"kernels {name} {B} x {D}"):
                return
            with setting.guarded("kernels", B=B, D=D, dtype=name):
                kernel_case(setting, B, D, name)


def kernel_case(setting: Setting, B: int, D: int, name: str) -> None:
    compute, factor = DTYPES[name]
    body, z0 = toy(B, D)
    reference = solved(z0, body, 30, None, 1e-12).z_best
    start = z0.to(setting.device, compute)
    state = solved(start, body, 30, factor)
    f = body(state.z_best)
    residual = float(((f - state.z_best).norm(dim=1) / f.norm(dim=1)).max())
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1)).to(setting.device, compute)
    n = int(state.n.max())
    S, C = (t.cpu().double().nan_to_num(0.0) for t in (state.S[:, :n], state.C))
    expected = apply_transpose_reference(S, C, state.n.cpu(), x.cpu())
    transposed = relative_error(apply_transpose(Factors(S=state.S, C=state.C, n=state.n, slots_written=n), x), expected)
    thin, same = thin_error(start, x)
    most = 1e-11 if name == "fp64" else 1e-4
    good = residual <= 1.01 * TOL and transposed <= most and thin <= most and same
    setting.row(
        "kernels", B=B, D=D, dtype=name, ok=good and bool((state.done == 1).all()), residual=residual, n=n,
        value_error=relative_error(state.z_best, reference), transpose_error=transposed, thin_error=thin, thin_repeats=same,
    )  # fmt: skip


def thin_error(z: Tensor, f: Tensor) -> tuple[float, bool]:
    """P (f - z) by a random shared inverse against float64; and whether a second run has the same bits. z, f (B, D)."""
    rank = min(16, max(1, z.shape[1] // 4))
    A, Y = torch.randn(2, rank, z.shape[1], generator=torch.Generator().manual_seed(2)).to(z) / z.shape[1] ** 0.5
    made = recycle.products(recycle.Shared(A, Y.T, torch.ones(rank)), z)
    assert made is not None
    outs = [torch.empty_like(z) for _ in range(2)]
    for out in outs:
        made.residual(f, z, torch.zeros(len(z), dtype=torch.int32, device=z.device), out)
    g, A, Y = ((t.cpu().double()) for t in (f - z, A, Y))
    return relative_error(outs[0], g - g @ Y.T @ A), torch.equal(*outs)


def restarts_and_failures(setting: Setting) -> None:
    """A full memory, and a sample that turns NaN."""
    body, z0 = toy(3, 200)
    z0 = z0.to(setting.device)
    with setting.guarded("restart"):
        state = solved(z0, body, 3, None, 1e-6)
        setting.row("restart", ok=bool((state.done == 1).all()), n=state.n.tolist())
    with setting.guarded("one sample fails"):
        results = []
        for fails in (False, True):
            state, z = new_state(z0, 12, eta=0.125, tol=TOL), z0.clone()
            while state.running:
                out = body(z)
                if fails and state.evaluations == 2:
                    out[1, 3] = float("nan")
                step(state, z, out, last=state.evaluations + 1 == 40)
            results.append((z, state.done.tolist()))
        (healthy, _), (failing, codes) = results
        same = all(torch.equal(healthy[row], failing[row]) for row in (0, 2))
        setting.row("one sample fails", ok=codes == [1, 4, 1] and same and bool(torch.isfinite(failing).all()), status=codes)


def adjoints(setting: Setting) -> None:
    """The adjoint solve with the forward's factors, against the exact one in float64; and the same in fewer VJPs than without."""
    for B, D in [(2, 17)] if setting.dry else ADJOINT_SHAPES:
        if not setting.enough(3, f"adjoint {B} x {D}"):
            return
        with setting.guarded("adjoint", B=B, D=D):
            adjoint_case(setting, B, D)


def adjoint_case(setting: Setting, B: int, D: int) -> None:
    body, z0 = toy(B, D)
    start = z0.to(setting.device, torch.float32)
    state = solved(start, body, 30, None)
    z = state.z_best.detach().requires_grad_()
    f = body(z)
    q = torch.randn(B, D, generator=torch.Generator().manual_seed(2)).to(start)

    def vjp(w: Tensor) -> Tensor:
        return torch.autograd.grad(f, z, w, retain_graph=True)[0]

    def full(w: Tensor) -> tuple[Tensor, None]:
        return vjp(w), None

    factors = Factors(S=state.S, C=state.C, n=state.n, slots_written=state.S.shape[1])
    found = solve_adjoint(vjp, full, q, factors, tol=1e-4, max_iter=40)
    plain = solve_adjoint(vjp, full, q, None, tol=1e-4, max_iter=40)
    r = q.double() + vjp(found.w).double() - found.w.double()
    residual = float(r.norm() / q.double().norm())
    honest = abs(residual - found.residual) <= 1e-3 * residual + 1e-6
    setting.row(
        "adjoint", B=B, D=D, ok=residual <= 1.1e-4 and honest and found.needed <= plain.needed, residual=residual,
        reported=found.residual, vjps=found.needed, vjps_without_factors=plain.needed, status=found.status.name,
    )  # fmt: skip


def compiled_models(setting: Setting) -> None:
    models.repeats(setting)
    for name, make in models.chosen(setting.dry).items():
        if not setting.enough(8, name):
            return
        with setting.guarded("model", model=name):
            models.check(setting, name, make())


def run(setting: Setting) -> None:
    if setting.group == "kernels":
        restarts_and_failures(setting)
        kernels(setting)
    else:
        {"adjoints": adjoints, "models": compiled_models}[setting.group](setting)
