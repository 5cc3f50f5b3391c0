"""Products with the transposed factors, sample by sample, against the explicit product of rank-one updates."""

from __future__ import annotations

import math

import pytest
import torch

from deq_compile.kernels.broyden import Factors, factors_of, new_state, step
from deq_compile.kernels.reuse import apply_multisecant, apply_transpose, multisecant
from deq_compile.kernels.reuse.multisecant import RIDGE, RIDGE_FAR
from deq_compile.kernels.reuse.reference import apply_transpose_reference, dense_inverse, multisecant_reference


def random_factors(
    B: int,
    M: int,
    D: int,
    n: list[int],
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype = torch.float64,
) -> Factors:
    """Factors of random steps, C from the product form; unused slots hold zeros up to the highest in use, then NaN."""
    g = torch.Generator().manual_seed(B + 10 * M + 100 * D)
    high = max(n, default=0)
    S = torch.full((B, M + 1, D), math.nan, dtype=torch.float64)
    C = torch.zeros(B, M, M, dtype=torch.float64)
    for i, count in enumerate(n):
        S[i, :high] = 0
        S[i, :count] = (torch.randn(count, D, generator=g, dtype=torch.float64) / D**0.5).to(factor_dtype)
        kappa = torch.rand(max(count - 1, 0), generator=g, dtype=torch.float64)
        if count > 2:
            kappa[1] = 0  # a skipped update
        for j in range(count - 1):
            C[i, j, :j] = kappa[j] * (S[i, j] @ S[i, 1 : j + 1].T) @ C[i, :j, :j]
            C[i, j, j] = kappa[j]
    return factors_of(S.to(factor_dtype), C.to(dtype), torch.tensor(n, dtype=torch.int32))


@pytest.mark.parametrize("D", [1, 127, 128, 129, 31])
@pytest.mark.parametrize("n", [[], [0], [1], [2], [9], [9, 0, 1, 2, 5], [3, 3, 3, 3, 3]])
def test_equals_the_product_form(n: list[int], D: int) -> None:
    factors = random_factors(len(n), 8, D, n)
    x = torch.randn(len(n), D, dtype=torch.float64)
    before = x.clone()
    y = apply_transpose(factors, x)
    torch.testing.assert_close(y, apply_transpose_reference(factors.S, factors.C, factors.n, x))
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr() or x.numel() == 0


def test_closed_form_equals_the_dense_inverse() -> None:
    factors = random_factors(1, 8, 17, [9])
    S, C = factors.S[0], factors.C[0]
    H = -(torch.eye(17, dtype=torch.float64) + S[1:].T @ C @ S[:-1])
    torch.testing.assert_close(dense_inverse(S, C.diagonal()), H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_are_cast_on_read(dtype: torch.dtype) -> None:
    factors = random_factors(3, 6, 65, [7, 2, 4], torch.float32, dtype)
    assert factors.S.dtype == dtype
    x = torch.randn(3, 65)
    y = apply_transpose(factors, x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, apply_transpose_reference(factors.S, factors.C, factors.n, x).float())


def test_one_samples_nan_stays_its_own() -> None:
    factors = random_factors(3, 6, 33, [7, 5, 4])
    x = torch.randn(3, 33, dtype=torch.float64)
    clean = apply_transpose(factors, x)
    x[1, 0] = math.nan
    poisoned = apply_transpose(factors, x)
    assert torch.isnan(poisoned[1]).any()
    assert torch.equal(clean[[0, 2]], poisoned[[0, 2]])


def solved(
    D: int, iterations: list[int], memory: int = 40, eta: float = 0.1, dtype: torch.dtype = torch.float64
) -> tuple[Factors, list[torch.Tensor], list[torch.Tensor]]:
    """Broyden on a tanh body, sample i for iterations[i] evaluations; the factors, all z_k and all g_k of each sample."""
    generator = torch.Generator().manual_seed(D)
    B = len(iterations)
    W = torch.randn(D, D, generator=generator, dtype=torch.float64) * 1.2 / D**0.5
    b = torch.randn(B, D, generator=generator, dtype=torch.float64)
    state = new_state(torch.zeros(B, D, dtype=dtype), memory, eta=eta)
    z = torch.zeros(B, D, dtype=dtype)
    zs, gs = [z.clone()], []
    for k in range(max(iterations, default=0)):
        f = torch.tanh(z.double() @ W.T + b).to(dtype)
        gs.append(f - z)
        stop = torch.tensor([0.0 if count == k + 1 else 1.0 for count in iterations], dtype=dtype)
        step(state, z, f, stop_norm=stop)
        zs.append(z.clone())
    factors = factors_of(state.S, state.C, state.n)
    at = [c - 1 for c in iterations]  # the step of the last evaluation is not taken
    own = [[torch.stack(all_k)[: n + 1, i] for i, n in enumerate(at)] if at else [] for all_k in (zs, gs)]
    return factors, own[0], own[1]


@pytest.mark.parametrize("D", [2, 31, 127, 128, 129])
@pytest.mark.parametrize("iterations", [[], [1], [2], [3], [17, 1, 2, 3, 9], [12] * 3])
def test_type_ii_operator_equals_its_formula(iterations: list[int], D: int) -> None:
    if D == 2:
        iterations = [min(i, 3) for i in iterations]  # later steps are rounding
    factors, zs, gs = solved(D, iterations)
    operator = multisecant(factors)
    x = torch.randn(len(iterations), D, dtype=torch.float64)
    before = x.clone()
    y = apply_multisecant(operator, x)
    assert torch.equal(x, before)
    for i, (z, g) in enumerate(zip(zs, gs, strict=True)):
        # the pair of the last step needs the residual after it, which the steps do not hold
        expected = multisecant_reference(z[:-1], g[:-1], RIDGE, RIDGE_FAR) @ x[i] if len(z) > 2 else x[i]
        torch.testing.assert_close(y[i], expected, rtol=1e-6, atol=1e-8)  # residuals are reconstructed from steps


def test_type_ii_operator_leaves_out_the_first_pairs() -> None:
    factors, zs, gs = solved(33, [12, 7])
    x = torch.randn(2, 33, dtype=torch.float64)
    y = apply_multisecant(multisecant(factors, skip=2), x)
    for i in range(2):
        expected = multisecant_reference(zs[i][2:-1], gs[i][2:-1], RIDGE, RIDGE_FAR) @ x[i]
        torch.testing.assert_close(y[i], expected, rtol=1e-6, atol=1e-8)


def test_type_ii_operator_in_float32() -> None:
    factors, zs, gs = solved(64, [11, 8, 4], dtype=torch.float32)
    x = torch.randn(3, 64)
    y = apply_multisecant(multisecant(factors), x)
    for i in range(3):
        expected = multisecant_reference(zs[i][:-1], gs[i][:-1], RIDGE, RIDGE_FAR) @ x[i].double()
        torch.testing.assert_close(y[i], expected.float(), rtol=1e-4, atol=1e-4)  # residuals are reconstructed from steps


def test_type_ii_operator_of_useless_steps_is_finite() -> None:
    """Steps of zeros, equal and NaN ones (which no solve leaves): no sample harms another."""
    factors, *_ = solved(33, [9, 9, 9, 9, 9])
    clean = apply_multisecant(multisecant(factors), torch.ones(5, 33, dtype=torch.float64))
    factors.S[1, :] = 0
    factors.S[2, 1:8] = factors.S[2, :1]
    factors.S[3, 4, 0] = math.nan
    y = apply_multisecant(multisecant(factors), torch.ones(5, 33, dtype=torch.float64))
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    assert torch.equal(y[1], torch.ones(33, dtype=torch.float64))
    assert torch.isfinite(y[2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_type_ii_operator_of_low_precision_factors(dtype: torch.dtype) -> None:
    factors, *_ = solved(65, [9, 5, 3], dtype=torch.float32)
    stored = torch.arange(factors.S.shape[1]) < factors.n[:, None]
    S = torch.where(stored[:, :, None], factors.S, 0.0).to(dtype)
    low = Factors(S=S, C=factors.C, n=factors.n, slots_written=factors.slots_written)
    x = torch.randn(3, 65)
    y = apply_multisecant(multisecant(low), x)
    exact = apply_multisecant(multisecant(factors), x)
    assert float((y - exact).norm() / exact.norm()) < 0.1
