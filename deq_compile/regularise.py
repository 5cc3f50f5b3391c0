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
        z: state, any floating shape; its dimension 0 may be a batch.
        samples: random vectors to average over, at least 1; each costs a VJP and, in the backward, a second derivative.

    Returns:
        A scalar of z's dtype.

    Raises:
        ValueError: ``samples`` < 1, or a body that changes the shape.
    """
    if samples < 1:
        raise ValueError(f"expected samples >= 1, got {samples}")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        out = _evaluate(f, z)
        total = out.new_zeros(())
        for _ in range(samples):
            (vj,) = torch.autograd.grad(out, z, torch.randn_like(out), create_graph=True)
            total = total + vj.square().sum()
    return total / (samples * max(z.numel(), 1))


def spectral_radius(f: Callable[[Tensor], Tensor], z: Tensor, iterations: int = 100) -> Tensor:
    """Spectral radius of the Jacobian at z for each sample, by power iteration on its transpose.

    The geometric mean of the growth over the later half of the iterations is taken, which is right for complex pairs of
    eigenvalues too. Plain iteration of `f` converges near z where this is below 1.

    Args:
        f: body, (B, ...) -> (B, ...), rows independent.
        z: (B, ...) state.
        iterations: VJPs, at least 2.

    Returns:
        (B,) estimates, no gradient.

    Raises:
        ValueError: ``iterations`` < 2, a state without dimensions, or a body that changes the shape.
    """
    if iterations < 2:
        raise ValueError(f"expected iterations >= 2, got {iterations}")
    if z.dim() == 0:
        raise ValueError("expected a state of shape (B, ...), got a tensor without dimensions")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        out = _evaluate(f, z)
    v = torch.randn_like(out)
    v = v / _norms(v)
    growth = []
    for _ in range(iterations):
        (v,) = torch.autograd.grad(out, z, v, retain_graph=True)
        size = _norms(v)
        growth.append(size.flatten())
        v = v / size.clamp_min(torch.finfo(size.dtype).tiny)
    return torch.stack(growth[iterations // 2 :]).log().mean(0).exp()


def _evaluate(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    out = f(z)
    if out.shape != z.shape:
        raise ValueError(f"expected a body that maps {tuple(z.shape)} to itself, got {tuple(out.shape)}")
    return out


def _norms(v: Tensor) -> Tensor:
    """|v| of each sample, in a shape that divides v."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (v.dim() - 1))
