"""When a region is compared with the user's own loop, or its gradient looked at: at calls 0, 1, 2, 4, 8, ... and then every so
many calls, or more seldom where comparisons would take more than a share of a long run. What a call takes is set down, not
measured: all ranks compare at the same call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .site import RegionSpec

VERIFY_EVERY = 200
VERIFY_SHARE = 0.01
UNUSUAL_EVERY = 4  # calls between two comparisons because of a solve that is longer than those before
USUAL_CALL = 12  # evaluations, and as many again for the products of a backward
USUAL_COMPARISON = 20  # evaluations beside the loop's own: the solve from a second start
USUAL_LOOP = 60  # of a loop that a test ends


def due(verify: str, count: int, period: int) -> bool:
    """Whether the `count`-th call from 0 is one of those, by the option `verify`."""
    if verify != "periodic":
        return count == 0 and verify == "first"
    return count & (count - 1) == 0 if count < VERIFY_EVERY else count % period == 0


def period_of(spec: RegionSpec) -> int:
    """Calls between two comparisons of a long run."""
    loop = spec.iterations or min(spec.own_loop_cap or 1, USUAL_LOOP)
    call = USUAL_CALL * (2 if spec.grad else 1)
    share = math.ceil((loop + USUAL_COMPARISON) / (VERIFY_SHARE * call))
    return VERIFY_EVERY * math.ceil(share / 200) if share > 200 else VERIFY_EVERY
