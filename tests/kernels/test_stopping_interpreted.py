"""Triton's stopping rule in the interpreter, on the table of test_stopping.py; test_triton.py runs it in a process of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from deq_compile.kernels import gcr
from deq_compile.kernels.broyden import triton_kernels as broyden_kernels
from deq_compile.kernels.broyden.gpu import TritonState
from deq_compile.kernels.broyden.state import new_factors
from deq_compile.kernels.device import rehearsal
from tests.kernels.residual_table import CAP, SETTINGS, TOL, D, Settings, at_random, by_hand, check, drive

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")
TABLE = [*by_hand(), *at_random(3)]  # the interpreter is slow


@pytest.fixture(autouse=True)
def _quiet(implementation: str) -> Iterator[None]:
    if implementation != "aten":
        pytest.skip("compares with the reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize(("form", "settings"), [("fused", s) for s in SETTINGS] + [("split", SETTINGS[1])], ids=str)
def test_broyden(form: str, settings: Settings) -> None:
    z0 = torch.zeros(len(TABLE), D, dtype=torch.float64)
    S, C = new_factors(z0, CAP, torch.float64)
    state = TritonState.create(
        z0, S, C, eta=0.125, tol=TOL, relative=settings.relative, floor=settings.floor, kernels=broyden_kernels
    )
    state.form, state.poll_every = form, 0
    drive(state, z0.clone(), lambda z, f, last: state.step(z, f, last=last), TABLE)
    check(state, [settings.expected(pairs) for pairs in TABLE], TABLE)


def test_adjoint() -> None:
    table = [[(g, 1.0) for g, _ in pairs] for pairs in TABLE] + [[(1e3, 1.0)] * CAP]
    q = torch.zeros(len(table), D, dtype=torch.float64)
    q[:, 0] = 1.0
    with rehearsal():
        state = gcr.new_state(q, None, 2 * CAP, tol=TOL, floor=2.0**-6)
        for k in range(CAP):
            residual = torch.zeros_like(q)
            residual[:, 1] = torch.tensor([pairs[k][0] for pairs in table], dtype=torch.float64)
            gcr.move(state, state.w - q + residual, last=k + 1 == CAP, look=True)
    for i, pairs in enumerate(table):
        want = Settings(2.0**-6, True).expected([(g, 1.0 - 1e-9) for g, _ in pairs], falls=False)
        assert (int(state.done[i]), int(state.iterations[i])) == (want.code, want.evaluations), (i, pairs[:8], want)
