"""Two quantities that training of equilibrium models watches: the Jacobian's size, and its spectral radius.

Both are computed outside of any region, with autograd, in eager mode or under `torch.compile`'s graph breaks; they take the body
`f` and a state `z`, usually the fixed point.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def jac_reg(f: Callable[[Tensor], Tensor], z: Tensor, samples: int = 1) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 / numel(z) at z, the Jacobian regularisation of Bai et al. (arXiv 2106.14342).

    Differentiable in the parameters of `f`: add `weight * jac_reg(f, z)` to the loss. `z` itself is taken as a constant.

    Args:
        f: body, maps a tensor to one of its shape.
        z: state, real floating point, of any shape; its dimension 0 may be a batch.
        samples: random vectors to average over, at least 1; each costs a VJP and, in the backward, a second derivative.

    Returns:
        A scalar of the dtype that `f` gives; 0, without a gradient, where `f` does not depend on its argument.

    Raises:
        ValueError: ``samples`` < 1, or a body that changes the shape.
        TypeError: a state or a result that is no real floating-point tensor, or an f that is not callable.
    """
    _check_count("samples", samples, 1)
    with torch.enable_grad():
        z, out = _evaluate("jac_reg", f, z)
        total = out.new_zeros(())
        for _ in range(samples):
            vj = _product(out, z, torch.randn_like(out), create_graph=True)
            total = total + vj.square().sum()
    return total / (samples * max(z.numel(), 1))


def spectral_radius(f: Callable[[Tensor], Tensor], z: Tensor, iterations: int = 100) -> Tensor:
    """Spectral radius of the Jacobian at z for each sample, by power iteration on its transpose.

    The geometric mean of the growth over the later half of the iterations is taken, which is right for complex pairs of
    eigenvalues too. Plain iteration of `f` converges near z where this is below 1.

    Args:
        f: body, (B, ...) -> (B, ...), rows independent.
        z: (B, ...) state, real floating point; in a (B,) state each sample is one number, and its radius |df/dz|.
        iterations: VJPs, at least 2.

    Returns:
        (B,) estimates, no gradient; 0 where `f` does not depend on its argument.

    Raises:
        ValueError: ``iterations`` < 2, a state without dimensions, or a body that changes the shape.
        TypeError: a state or a result that is no real floating-point tensor, or an f that is not callable.
    """
    _check_count("iterations", iterations, 2)
    if isinstance(z, Tensor) and z.dim() == 0:
        raise ValueError("spectral_radius: expected a state of shape (B, ...), got a tensor without dimensions. Fix: z[None]")
    with torch.enable_grad():
        z, out = _evaluate("spectral_radius", f, z)
    v = torch.randn_like(out)
    v = v / _norms(v)
    growth = []
    for _ in range(iterations):
        v = _product(out, z, v, retain_graph=True)
        size = _norms(v)
        growth.append(size.flatten())
        v = v / size.clamp_min(torch.finfo(size.dtype).tiny)
    return torch.stack(growth[iterations // 2 :]).log().mean(0).exp()


def _check_count(name: str, given: int, least: int) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise ValueError(f"expected {name} >= {least}, an int, got {given!r}")


def _evaluate(caller: str, f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """The state as a leaf, and f of it."""
    if not callable(f):
        raise TypeError(f"{caller}: expected a callable f, got {type(f).__name__}")
    _check_real(caller, "a state that is", z)
    z = z.detach().requires_grad_()
    out = f(z)
    _check_real(caller, "a body that returns", out)
    if out.shape != z.shape:
        raise ValueError(f"{caller}: expected a body that maps {tuple(z.shape)} to itself, got {tuple(out.shape)}")
    return z, out


def _check_real(caller: str, what: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{caller}: expected {what} one real floating-point tensor, got {got}")


def _product(out: Tensor, z: Tensor, v: Tensor, **how: bool) -> Tensor:
    """J^T v; zero where `out` does not depend on z, or on nothing at all."""
    if not out.requires_grad:
        return torch.zeros_like(v)
    (found,) = torch.autograd.grad(out, z, v, allow_unused=True, **how)
    return torch.zeros_like(v) if found is None else found


def _norms(v: Tensor) -> Tensor:
    """|v| of each sample, in a shape that divides v."""
    rows = v.flatten(1) if v.dim() > 1 else v[:, None]
    return torch.linalg.vector_norm(rows, dim=1).view(-1, *[1] * (v.dim() - 1))
