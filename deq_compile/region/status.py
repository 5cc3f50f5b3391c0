"""How a solve ended: enums whose values are the kernels' codes and whose messages say it in words."""

from __future__ import annotations

import enum

from torch import Tensor

from deq_compile.kernels.iteration import CONVERGED, FLOOR, MAX_ITER, NONFINITE, RUNNING


class _Code(enum.IntEnum):
    """An integer code with a sentence."""

    _message: str

    def __new__(cls, code: int, message: str) -> _Code:  # noqa: PYI034 (Self needs Python 3.11)
        member = int.__new__(cls, code)
        member._value_ = code
        member._message = message
        return member

    @property
    def message(self) -> str:
        """What the code means, for reports and warnings."""
        return self._message


class Status(_Code):
    """How one sample's forward solve ended."""

    RUNNING = (RUNNING, "the solve has not stopped")
    CONVERGED = (CONVERGED, "the residual reached the tolerance")
    FLOOR = (FLOOR, "the residual stagnates at the floor of the body's precision; counts as converged")
    MAX_ITER = (MAX_ITER, "the cap on body evaluations was reached first; the best iterate is returned")
    NONFINITE = (NONFINITE, "the body returned a value that is not finite; the best finite iterate is returned")


class AdjointStatus(_Code):
    """How an adjoint solve ended, for the whole batch. The larger, the worse."""

    CONVERGED = (1, "the adjoint residual reached the tolerance")
    FLOOR = (2, "the adjoint residual stagnates at the floor of the precision")
    MAX_ITER = (3, "the cap on VJPs was reached first; the last estimate is returned")
    FALLBACK_BEST = (4, "a sample's estimate blew up or was not finite; its best one before is returned")
    FALLBACK_COTANGENT = (5, "a sample had no usable estimate; its cotangent is returned, the Jacobian-free gradient")
    NONFINITE = (6, "the adjoint residual of the estimate returned is not finite")


def converged(codes: Tensor) -> Tensor:
    """Bool of the shape of ``codes`` (values of :class:`Status`): reached the tolerance or the precision's floor."""
    return (codes == Status.CONVERGED) | (codes == Status.FLOOR)


def message_of(codes: Tensor) -> str:
    """The worst of ``codes`` (int, values of :class:`Status`, at least one) in words."""
    worst = int(codes.max())
    return next(status.message for status in Status if status == worst)
