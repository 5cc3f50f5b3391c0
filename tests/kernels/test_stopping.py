"""One stopping rule, on one table of residual sequences: ATen with questions and by masks, C++, and plain iteration.

Triton's is held to the same table in test_stopping_interpreted.py.
"""

from __future__ import annotations

import pytest
import torch

from deq_compile.kernels import broyden, gcr
from deq_compile.region.solvers import SOLVERS, Problem
from tests.kernels.residual_table import CAP, SETTINGS, TABLE, TOL, D, Settings, check, drive


def test_the_table_has_every_ending() -> None:
    codes = {s.expected(pairs).code for s in SETTINGS for pairs in TABLE}
    assert codes == {1, 2, 3, 4}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_broyden(settings: Settings) -> None:
    """ATen and C++, by the fixture `implementation`."""
    z0 = torch.zeros(len(TABLE), D, dtype=torch.float64)
    state = broyden.new_state(z0, CAP, tol=TOL, relative=settings.relative, floor=settings.floor)
    drive(state, z0.clone(), lambda z, f, last: broyden.step(state, z, f, last=last), TABLE)
    check(state, [settings.expected(pairs) for pairs in TABLE], TABLE)


@pytest.mark.parametrize("name", ["picard", "anderson"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_other_solvers(settings: Settings, name: str) -> None:
    solver, z0 = SOLVERS[name], torch.zeros(len(TABLE), D, dtype=torch.float64)
    mode = "rel" if settings.relative else "abs"
    problem = Problem(tol=TOL, stop_mode=mode, max_iter=CAP, body_eps=settings.floor / 50)
    assert problem.floor(z0.dtype) == settings.floor
    progress, z = solver.start(z0, problem)
    drive(progress, z, lambda z, f, last: solver.step(progress, z, f, last=last), TABLE)
    check(progress, [settings.expected(pairs) for pairs in TABLE], TABLE)


@pytest.mark.parametrize("floor", [0.0, 2.0**-6])
def test_adjoint(floor: float) -> None:
    """Residuals relative to q, which say themselves that they have fallen. One more sample keeps the batch from ending."""
    table = [[(g, 1.0) for g, _ in pairs] for pairs in TABLE] + [[(1e3, 1.0)] * CAP]
    q = torch.zeros(len(table), D, dtype=torch.float64)
    q[:, 0] = 1.0
    state = gcr.new_state(q, None, 2 * CAP, tol=TOL, floor=floor)
    for k in range(CAP):
        residual = torch.zeros_like(q)
        residual[:, 1] = torch.tensor([pairs[k][0] for pairs in table], dtype=torch.float64)
        gcr.move(state, state.w - q + residual, last=k + 1 == CAP, look=True)
    expected = [Settings(floor, True).expected([(g, 1.0 - 1e-9) for g, _ in pairs], falls=False) for pairs in table]
    for i, want in enumerate(expected):
        assert (int(state.done[i]), int(state.iterations[i])) == (want.code, want.evaluations), (i, table[i][:8], want)
