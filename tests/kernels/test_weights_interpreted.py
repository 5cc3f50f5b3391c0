"""The weights of the type-II operator in Triton's interpreter, against float64; test_triton.py runs it in its own process."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors, factors_of, new_state, step
from deq_compile.kernels.reuse import gpu
from deq_compile.kernels.reuse import triton_kernels as kernels
from deq_compile.kernels.reuse.multisecant import Multisecant, empty_weights, gram_torch, multisecant_aten

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")


@pytest.fixture(autouse=True)
def _quiet(implementation: str) -> Iterator[None]:
    if implementation != "aten":
        pytest.skip("compares with ATen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def factors(D: int, evaluations: list[int], slots: int, dtype: torch.dtype = torch.float32) -> Factors:
    """Of solves of a tanh body that took `evaluations`, a sample each; poisoned where nothing is stored."""
    B = len(evaluations)
    generator = torch.Generator().manual_seed(D)
    W = torch.randn(D, D, generator=generator) * 0.6 / D**0.5
    b = torch.randn(B, D, generator=generator)
    state, z = new_state(torch.zeros(B, D), slots - 1), torch.zeros(B, D)
    for k in range(max(evaluations)):
        stop = torch.tensor([1.0 if k + 1 < count else 0.0 for count in evaluations])
        step(state, z, torch.tanh(z @ W + b), stop_norm=stop)
    S = torch.full((B, slots, (D + 15) // 16 * 16), math.nan, dtype=dtype)[:, :, :D]
    for i, n in enumerate(state.n.tolist()):
        S[i, :n] = state.S[i, :n].to(dtype)
    C = torch.zeros(B, slots - 1, (slots + 14) // 16 * 16)
    C[:, : state.C.shape[1], : state.C.shape[2]] = state.C[:, : slots - 1, : C.shape[2]]
    return factors_of(S, C, state.n.clone())


def expected(made: Factors, skip: int) -> Tensor:
    """V of each sample alone, with as many steps as it has."""
    k = made.S.shape[1]
    V = torch.zeros(made.S.shape[0], k, k)
    for i, n in enumerate(made.n.tolist()):
        if n >= 2:
            own = Factors(S=made.S[i : i + 1, :n], C=made.C[i : i + 1], n=made.n[i : i + 1], slots_written=n)
            G = gram_torch(own.S.double(), own.n, torch.float64)
            V[i, :n, :n] = multisecant_aten(own, skip, G).V[0, :n, :n]
    return V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("D", "evaluations", "slots", "skip"),
    [(150, [9, 4, 1], 13, 0), (40, [22, 3], 41, 0), (33, [6], 9, 2), (7, [2, 12, 5, 1], 21, 1)],
)
def test_weights_are_those_of_float64(D: int, evaluations: list[int], slots: int, skip: int, dtype: torch.dtype) -> None:
    """Of every sample with its own number of steps, whatever lies in slots that are not in use; n comes along."""
    made = factors(D, evaluations, slots, dtype)
    found = gpu.multisecant(made, skip, kernels)
    assert torch.equal(found.n, made.n)
    want = expected(made, skip)
    for i, n in enumerate(made.n.tolist()):
        torch.testing.assert_close(found.V[i, :n, :n], want[i, :n, :n], rtol=2e-3, atol=1e-4)


def test_one_program_serves_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    made = factors(20, [5, 9, 2, 7, 3], 11)
    alone = gpu.multisecant(made, 0, kernels)
    monkeypatch.setattr(gpu, "WEIGHT_PROGRAMS", 2)
    shared = gpu.multisecant(made, 0, kernels)
    for i, n in enumerate(made.n.tolist()):
        assert torch.equal(shared.V[i, :n, :n], alone.V[i, :n, :n])


def test_slabs_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    made = factors(150, [9], 11)
    whole = gpu.multisecant(made, 0, kernels)
    monkeypatch.setattr(gpu, "GRAM_SLAB", 64)
    n = int(made.n[0])
    torch.testing.assert_close(gpu.multisecant(made, 0, kernels).V[:, :n, :n], whole.V[:, :n, :n], rtol=1e-3, atol=1e-4)


def test_factors_are_found_through_a_table() -> None:
    """Whatever tensors the launch is given; as a captured backward reads its forward's."""
    made = factors(30, [6, 3], 11)
    want = gpu.multisecant(made, 0, kernels)
    S = torch.full((2, 11, 32), math.nan)[:, :, :30]
    elsewhere = Factors(S=S, C=torch.full_like(made.C, math.nan), n=torch.zeros_like(made.n), slots_written=made.slots_written)
    operator = Multisecant(S=made.S, V=empty_weights(made), n=torch.zeros_like(made.n), slots_written=made.slots_written)
    table, room = torch.zeros(3, dtype=torch.int64), gpu.Workspace.like(made.S)
    gpu.point_at(made, table, kernels, gpu.Held())
    assert table.tolist() == [made.S.data_ptr(), made.C.data_ptr(), made.n.data_ptr()]
    gpu.make_weights(elsewhere, operator, 0, kernels, table, room)
    assert torch.equal(operator.n, made.n)
    for i, n in enumerate(made.n.tolist()):
        assert torch.equal(operator.V[i, :n, :n], want.V[i, :n, :n])


def test_a_sample_whose_weights_are_not_finite_has_none() -> None:
    made = factors(30, [6, 5], 11)
    made.S[0, 2] = math.inf
    found = gpu.multisecant(made, 0, kernels)
    n = int(made.n[1])
    assert not found.V[0, : int(made.n[0]), : int(made.n[0])].any()
    assert torch.isfinite(found.V[1, :n, :n]).all()
    assert found.V[1, :n, :n].any()
