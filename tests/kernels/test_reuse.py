"""Products with the transposed factors, sample by sample, against the explicit product of rank-one updates."""

from __future__ import annotations

import math

import pytest
import torch

from deq_compile.kernels.broyden import Factors, factors_of
from deq_compile.kernels.reuse import apply_transpose
from deq_compile.kernels.reuse.reference import apply_transpose_reference, dense_inverse


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
