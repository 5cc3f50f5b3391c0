"""Why a loop is kept, in words: what `explain` says below its table."""

from __future__ import annotations

START = "the body has several fixed points, and its initial state, which says which one, needs a gradient"
STEPS = "the body has several fixed points, and backward='reversible' is the gradient of steps that may end in another one"
BLANK = "its results have had no finite sample since the first call"
GRADIENT = "its gradient is not that of the fixed point: after so many iterations the state still remembers where it started"
DEAR = "a solve costs more than its iterations, by count"
ELSEWHERE = "another process of the group found that its own loop is to be kept"


def misses(count: int, what: str) -> str:
    """`count` solves, of the forward or the adjoint, one after the other."""
    return f"{count} {what} in a row missed the tolerance"


def apart(distance: float, allowed: float, converged: bool, raised: str = "") -> str:
    """The loop's result is not the fixed point, or none was found to judge it by; maybe for what the body has `raised`."""
    if raised:
        return f"the body raised {raised} at an iterate of the solver's, where the loop itself does not come"
    if not converged:
        return "the solver reached no fixed point by which its result could be judged; raise max_iter, or make the body contract"
    return (
        f"its result is {distance:.0e} from the fixed point, more than verify_tol={allowed:.0e}; "
        'with semantics="equilibrium", or more iterations, it is solved'
    )
