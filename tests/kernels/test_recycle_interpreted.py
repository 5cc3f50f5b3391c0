"""The thin products of a shared inverse in Triton's interpreter, against float64: odd shapes, all ranks, frozen samples, repeats.

Needs TRITON_INTERPRET=1 from the start: test_triton.py runs it in a process of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from deq_compile.kernels import device
from deq_compile.kernels.broyden import gpu as broyden_gpu
from deq_compile.kernels.device import rehearsal
from deq_compile.kernels.recycle import Products, Shared, Sketch, compress, products
from deq_compile.kernels.recycle.gpu import Cut
from deq_compile.kernels.tiles import Tiles
from deq_compile.region.forward import solve

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> Iterator[None]:
    if implementation != "aten":
        pytest.skip("compares with ATen")
    with warnings.catch_warnings(), rehearsal():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy on the inf and NaN that are masked away
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def shared_of(D: int, rank: int, dtype: torch.dtype) -> Shared:
    g = torch.Generator().manual_seed(rank)
    A, Y = (torch.randn(rank, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return Shared(A, Y.T.contiguous(), torch.ones(rank, dtype=torch.float64))


def made(shared: Shared, like: Tensor, cut: Cut | None = None) -> Products:
    from deq_compile.kernels.recycle import triton_kernels

    return Products.of(shared, like, triton_kernels, cut)


def right(shared: Shared, g: Tensor) -> Tensor:
    """P g in float64."""
    A, Yt, g = shared.A.double(), shared.Yt.double(), g.double()
    return g - g @ Yt @ A


def running(B: int) -> Tensor:
    return torch.zeros(B, dtype=torch.int32)


@pytest.mark.parametrize("rank", range(1, 17))
def test_all_ranks_in_float64(rank: int) -> None:
    f, z = torch.randn(2, 5, 67).double()
    found, out = made(shared_of(67, rank, f.dtype), z), torch.full_like(z, math.nan)
    squares = found.residual(f, z, running(5), out)
    torch.testing.assert_close(out, right(shared_of(67, rank, f.dtype), f - z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squares[0, :5], (f - z).square().sum(1), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(squares[1, :5], f.square().sum(1), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("B", "D"), [(0, 8), (1, 1), (1, 127), (3, 128), (2, 129), (9, 40)])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_and_lower_precisions_of_f(B: int, D: int, low: torch.dtype) -> None:
    """The error is that of the sum, and no more."""
    shared = shared_of(D, min(16, max(1, D // 4)), torch.float32)
    f, z = torch.randn(B, D).to(low), torch.randn(B, D)
    out = torch.full_like(z, math.nan)
    made(shared, z).residual(f, z, running(B), out)
    torch.testing.assert_close(out.double(), right(shared, f.float() - z), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_several_programs_a_row_add_up_and_repeat(samples: int) -> None:
    """Partial sums in a fixed order: another cut gives the same numbers, an equal one the same bits."""
    D, shared = 150, shared_of(150, 11, torch.float64)
    f, z = torch.randn(2, 7, D).double()
    cut = Cut(samples, 16, (32, 16), 4, 48)
    outs = []
    for _ in range(2):
        outs.append(torch.full_like(z, math.nan))
        squares = made(shared, z, cut).residual(f, z, running(7), outs[-1])
    assert torch.equal(*outs)
    torch.testing.assert_close(outs[0], right(shared, f - z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squares[0, :7], (f - z).square().sum(1), rtol=1e-12, atol=0.0)


def test_strides_of_f_and_of_the_inverse() -> None:
    z, f = torch.randn(4, 33).double(), torch.randn(33, 4).double().T
    shared = shared_of(33, 6, z.dtype)
    for given in (shared, Shared(shared.A.T.contiguous().T, shared.Yt.T.contiguous().T, shared.sigma)):
        out = torch.empty_like(z)
        made(given, z).residual(f, z, running(4), out)
        torch.testing.assert_close(out, right(shared, f - z), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="contiguous"):
        made(shared, z).residual(f, f, running(4), torch.empty_like(z))


def test_stopped_samples_are_neither_read_nor_written() -> None:
    f, z = torch.randn(2, 6, 20).double()
    done, shared = running(6), shared_of(20, 4, z.dtype)
    done[1], done[4:] = 1, 3
    f[1] = math.nan
    out = torch.full_like(z, 7.0)
    made(shared, z, Cut(2, 4, (16, 16), 1, 32)).residual(f, z, done, out)
    expected = right(shared, f - z)
    expected[done != 0] = 7.0
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_residual_that_is_not_finite_gives_f_itself() -> None:
    f, z = torch.randn(2, 3, 20).double()
    f[1, 3], f[2, 5] = math.nan, math.inf
    out, shared = torch.empty_like(z), shared_of(20, 4, z.dtype)
    squares = made(shared, z).residual(f, z, running(3), out)
    torch.testing.assert_close(out[1:], f[1:], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out[0], right(shared, f - z)[0], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(squares[0, :3]).tolist() == [True, False, False]


@pytest.mark.parametrize("slab", [16, 48])
def test_a_trial_goes_through_it_in_place(slab: int) -> None:
    w, x = torch.randn(2, 5, 40).double()
    shared, done = shared_of(40, 7, w.dtype), running(5)
    done[2] = 1
    expected = x + right(shared, w - x)
    expected[2] = w[2]
    made(shared, w, Cut(2, 8, (16, 16), -(-40 // slab), slab)).onto(x, w, done)
    torch.testing.assert_close(w, expected, rtol=1e-12, atol=1e-12)


def test_triton_serves_a_gpu_and_ranks_that_fit() -> None:
    like = torch.zeros(2, 80)
    assert products(shared_of(80, 16, like.dtype), like) is not None
    assert products(shared_of(80, 17, like.dtype), like) is None, "its sums would not lie in registers"


@pytest.mark.parametrize(("B", "D"), [(1, 1), (1, 100_000), (32, 4096), (128, 1024), (4096, 64), (5, 3_000_000)])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_a_cut_covers_all_of_it(B: int, D: int, rank: int) -> None:
    for size in (4, 8):
        cut = Cut.of(B, D, rank, size)
        assert (cut.slabs - 1) * cut.slab < D <= cut.slabs * cut.slab
        assert cut.rows >= rank
        assert all(c & (c - 1) == 0 and c >= 16 for c in cut.columns)
        assert cut.samples * cut.rows * cut.columns[0] * size <= 32768


def body(D: int) -> Callable[[Tensor], Tensor]:
    g = torch.Generator().manual_seed(D)
    Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    W = Q @ torch.diag(torch.linspace(-0.4, 0.95, D).double()) @ Q.T
    x = torch.randn(1, D, generator=g, dtype=torch.float64)
    return lambda z: torch.tanh(z @ W.to(z.dtype) + x.to(z.dtype))


def learnt(f: Callable[[Tensor], Tensor], z0: Tensor) -> Shared:
    sketch = Sketch(4, 4, 0)
    solve(f, z0, tol=1e-8, max_iter=30, sketch=sketch)
    rows = sketch.rows()
    assert rows is not None
    found = compress(*rows, 6)
    assert found is not None
    return found


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """ATen in place of Triton."""
    before, device._rehearsing = device._rehearsing, False
    try:
        yield
    finally:
        device._rehearsing = before


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
def test_a_preconditioned_solve_is_atens(form: str, stop_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, codes, residuals and iterates, in float64; and fewer evaluations than without."""
    monkeypatch.setattr(broyden_gpu, "tiles", lambda B, D, *_: small_tiles(B, D, form))
    D, f = 40, body(40)
    z0 = 0.1 * torch.randn(3, D, dtype=torch.float64)
    with on_the_cpu():
        shared = learnt(f, z0)
        theirs = solve(f, z0, tol=1e-8, shared=shared, stop_mode=stop_mode)
        plain = solve(f, z0, tol=1e-8, stop_mode=stop_mode)
    mine = solve(f, z0, tol=1e-8, shared=shared, stop_mode=stop_mode)
    assert mine.iterations.tolist() == theirs.iterations.tolist()
    assert mine.status.tolist() == theirs.status.tolist()
    assert int(mine.iterations.max()) < int(plain.iterations.max())
    torch.testing.assert_close(mine.z, theirs.z, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mine.residual, theirs.residual, rtol=1e-4, atol=1e-12)


def test_a_body_that_is_not_finite_gives_what_the_plain_iteration_has() -> None:
    D, f = 20, body(20)
    z0 = torch.zeros(3, D, dtype=torch.float64)
    z0[:, 0] = torch.tensor([0.0, 1.0, 2.0])

    def spoilt(z: Tensor) -> Tensor:
        image = f(z)
        image[1, 3] = math.nan  # from the first evaluation on
        if float((z[2] - z0[2]).norm()) > 0:
            image[2, 4] = math.inf  # from the second on
        return image

    with on_the_cpu():
        shared = learnt(f, z0)
        theirs = solve(spoilt, z0, tol=1e-8, shared=shared)
    # The same inverse with a rank that is left to ATen's products.
    doubled = Shared(shared.A.repeat(4, 1) / 4, shared.Yt.repeat(1, 4), shared.sigma.repeat(4))
    assert products(doubled, z0) is None
    for given in (shared, doubled):
        mine = solve(spoilt, z0, tol=1e-8, shared=given)
        assert mine.status.tolist() == theirs.status.tolist() == [1, 4, 4]
        torch.testing.assert_close(mine.z[1:], theirs.z[1:], rtol=1e-12, atol=1e-12, equal_nan=True)


def small_tiles(B: int, D: int, form: str) -> Tiles:
    return Tiles(64, 16, 16, 1, D, 2, 4) if form == "fused" else Tiles(64, 16, 16, -(-D // 16), 16, 2, 4)
