"""Are the counters of the fused step read and written without a barrier between? Many resident blocks, many repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_compile.testing import new_state, step

from ..common import Setting
from ..correct import TOL, toy
from .registry import Finding, probe

EVALUATIONS = 12


@probe("race", "6 the fused step's counters: 300 solves, 4096 rows, equal", "differ now and then without the barrier")
def counters(setting: Setting) -> Finding:
    """A warp that is late reads what another has stored: other codes, other best iterates, or a launch that never ends."""
    B, D, times = (3, 64, 2) if setting.dry else (4096, 64, 300)
    body, start = toy(B, D)
    z0 = start.to(setting.device, torch.float32)
    first: list[Tensor] = []
    different = done = 0
    for _ in range(times):
        if setting.left < 3:
            break
        state, z = new_state(z0, 10, None, eta=0.125, tol=TOL), z0.clone()
        state.unwatched()
        for evaluation in range(EVALUATIONS):
            step(state, z, body(z), last=evaluation + 1 == EVALUATIONS)
        now = [t.clone() for t in (state.done, state.iterations, state.n, state.z_best)]
        first = first or now
        different += not all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
        done += 1
    return Finding(different == 0 and done > 1, {"different": different, "of": done, "rows": B})
