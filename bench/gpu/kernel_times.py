"""Every kernel at the shapes of real workloads: time, bytes, share of the copy bandwidth, launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deq_compile.testing import Factors, TritonGcr, TritonState, apply_transpose, move, multisecant, new_adjoint, recycle, tiles

from .clocks import Timing
from .common import Setting
from .facts import copy_rate

MEMORY = 40
# (what, B, D): MDEQ CIFAR-10 LARGE, MDEQ ImageNet SMALL, DEQ-Transformer, DEQ-Flow, and states of MLPs
SHAPES = [
    ("mdeq cifar", 32, 61440),
    ("mdeq imagenet", 32, 188160),
    ("deq transformer", 14, 105000),
    ("deq flow", 3, 585000),
    ("large", 32, 65536),
    ("mlp128", 128, 128),
    ("mlp1024", 32, 1024),
    ("mlp1024 wide", 128, 1024),
]
DRY_SHAPES = [("fused", 2, 50), ("split", 1, 8200)]
# What was expected before anything ran on a device (a model of launches and bytes): µs of one step.
PREDICTED = {("large", 10): 75, ("large", 30): 187}


def filled(setting: Setting, B: int, D: int, n: int, dtype: torch.dtype, memory: int) -> tuple[TritonState, Tensor, Tensor]:
    """A state with n random steps, and z and f for one more."""
    device = setting.device
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) / D**0.5

    state = TritonState.for_capture(
        normal(B, D), memory, dtype, eta=0.1, tol=0.0, relative=True, floor=0.0, limit=2**30
    )  # fmt: skip
    out = state.outputs()
    S, C = out.S, out.C
    for j in range(n):
        S[:, j] = normal(B, D).to(dtype)
    S[:, n - 1] *= 2
    C.copy_(0.02 * torch.randn(C.shape, generator=generator, device=device).tril())
    z = normal(B, D)
    f = z + normal(B, D)
    state.restart(z.clone(), z, out)
    state.S, state.C, state.z_best, state.table = S, C, out.z_best, None  # as the loop passes them
    state.n.fill_(n)
    return state, z, f


def step_bytes(B: int, D: int, n: int, element: int) -> int:
    """Steps read twice and one written; f and z read twice, z and the best iterate written; the last step read once more."""
    return B * D * ((2 * n + 1) * element + 6 * 4)


def transpose_bytes(B: int, D: int, n: int, element: int) -> int:
    """Two reads of n - 1 steps; x read twice, the result written."""
    return B * D * (2 * (n - 1) * element + 3 * 4)


def adjoint_bytes(B: int, D: int, k: int, n: int, element: int) -> int:
    """Images read twice and directions once, steps read twice; 22 words of vectors in the three launches."""
    return B * D * (3 * k * 4 + 2 * n * element + 22 * 4)


def thin_bytes(B: int, D: int, rank: int) -> int:
    """f and z read twice, the result written; what the samples share once."""
    return (5 * B + 2 * rank) * D * 4


class Case(NamedTuple):
    """Name of the shape, B, D, steps stored, dtype of the factors, and room for how many steps."""

    what: str
    B: int
    D: int
    n: int
    dtype: torch.dtype
    memory: int


def cases(dry: bool) -> Iterator[Case]:
    """float32 everywhere before bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for what, B, D in DRY_SHAPES if dry else SHAPES:
            for n in (4,) if dry else (10, 30):
                yield Case(what, B, D, n, dtype, 6 if dry else MEMORY)


def run(setting: Setting) -> None:
    bandwidth = copy_rate(setting, 1 << (20 if setting.dry else 32))  # the same minute as what it is held against
    setting.row("copy bandwidth of this group", GB_per_s=round(bandwidth, 1))
    for case in cases(setting.dry):
        if not setting.enough(4, f"{case.what}, n {case.n}"):
            return
        with setting.guarded(case.what, B=case.B, D=case.D, n=case.n):
            one_shape(setting, bandwidth, case)
        if not setting.dry:
            torch.cuda.empty_cache()


def one_shape(setting: Setting, bandwidth: float, case: Case) -> None:
    """A row for each kernel at one shape; `bandwidth` of a copy, in GB/s, is what they are held against."""
    what, B, D, n, dtype, memory = case
    state, z, f = filled(setting, B, D, n, dtype, memory)
    form = "fused" if tiles(B, D, memory + 1).slabs == 1 else "split"

    def report(kernel: str, timing: Timing, moved: int, launches: int | None, **more: Any) -> None:
        rate, floor = moved / timing.device / 1e3, moved / bandwidth / 1e3
        setting.row(
            kernel, shape=what, B=B, D=D, n=n, factors=str(dtype)[6:], form=form, **timing.rounded(), MB=round(moved / 1e6, 2),
            GB_per_s=round(rate, 1), us_floor=round(floor, 2), share_of_copy=round(rate / bandwidth, 3),
            times_the_floor=round(timing.device / floor, 2), launches=launches, **more,
        )  # fmt: skip

    at, x = z.clone(), f.contiguous()

    def reset() -> None:
        state.n.fill_(n)
        z.copy_(at)

    predicted = {"predicted_us": PREDICTED.get((what, n)) if dtype == torch.float32 else None}
    timing = setting.timed(lambda: state.step(z, f), reset)
    if bool(state.done.any()):
        raise RuntimeError(f"expected every sample to run on, got status {state.done.tolist()}: no step was timed")
    report("step", timing, step_bytes(B, D, n, dtype.itemsize), 1 if form == "fused" else 2, **predicted)
    reset()
    factors = Factors(S=state.S, C=state.C, n=state.n, slots_written=n)
    timing = setting.timed(lambda: _discard(apply_transpose(factors, x)))
    report("transpose", timing, transpose_bytes(B, D, n, dtype.itemsize), 1 if form == "fused" else 2)
    pairs = min(n, 10)
    timing = adjoint_move(setting, factors, x, pairs)
    report("adjoint move", timing, adjoint_bytes(B, D, pairs, n, dtype.itemsize), 3, pairs=pairs)
    rank = min(16, D // 4)
    report("thin products", thin_products(setting, z, f, state.done, rank), thin_bytes(B, D, rank), 2, rank=rank)
    report("multisecant", setting.timed(lambda: _discard(multisecant(factors).V)), B * D * n * dtype.itemsize, None)


def adjoint_move(setting: Setting, factors: Factors, x: Tensor, pairs: int) -> Timing:
    """One move of the adjoint iteration from `pairs` random pairs, preconditioned with M of the factors; x (B, D)."""
    capacity = 20
    adjoint = new_adjoint(x, multisecant(factors), capacity, tol=0.0)
    assert isinstance(adjoint, TritonGcr)
    adjoint.unwatched()
    adjoint.basis.copy_(torch.randn_like(adjoint.basis[:1]) / x.shape[1] ** 0.5)
    adjoint.gram.copy_(torch.eye(capacity, device=x.device))
    adjoint.squares.fill_(1.0)
    jw, starts = torch.randn_like(x) / x.shape[1] ** 0.5, [t.clone() for t in (adjoint.w, adjoint.x, adjoint.r)]

    def again() -> None:
        adjoint.n.fill_(pairs)
        for t, s in zip((adjoint.w, adjoint.x, adjoint.r), starts, strict=True):
            t.copy_(s)

    timing = setting.timed(lambda: move(adjoint, jw), again)
    if bool(adjoint.done.any()):
        raise RuntimeError(f"expected every sample to run on, got status {adjoint.done.tolist()}: no move was timed")
    return timing


def thin_products(setting: Setting, z: Tensor, f: Tensor, done: Tensor, rank: int) -> Timing:
    """P (f - z) by a random shared inverse of that rank; z, f (B, D)."""
    A, Y = (torch.randn(rank, z.shape[1], device=z.device) / z.shape[1] ** 0.5 for _ in range(2))
    made = recycle.products(recycle.Shared(A, Y.T, torch.ones(rank)), z)
    assert made is not None
    out = torch.empty_like(z)
    return setting.timed(lambda: _discard(made.residual(f, z, done, out)))


def _discard(result: Tensor) -> None:
    del result
