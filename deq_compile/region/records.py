"""What each solve did: one record a forward, completed by its backward."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator

from torch import Tensor

from .adjoint import AdjointSolution


@dataclasses.dataclass
class SolveRecord:
    """One forward of one region, and its backward once that has run.

    region         key of the region
    status         "solve": z is a fixed point; "follow": the one that the loop's own iterates lead to; "kept": the loop's own
                   iterations were run
    message        the solver's word on the worst sample (tolerance reached, stagnated at the precision's floor, ...)
    iterations     evaluations of the body until a sample stopped, mean over samples; `iterations_max` the largest
    evaluations    evaluations of the body on the whole batch, those of verification and probes included
    residual       stopping residual of the returned iterate, max over samples; `residual_mean` the mean
    converged      share of samples that reached the tolerance (or the precision's floor), 0 to 1
    vjps           vector-Jacobian products of the backward; None until it has run
    adjoint_residual        |q + J^T w - w| / |q|, max over samples; `adjoint_residual_mean` the mean,
    adjoint_residual_batch  and the same with norms over the whole batch: the quantity refinement stops on
    adjoint_message the adjoint solver's word
    reused         whether the backward made use of the forward's factors; None until it has run
    adjoint_error  estimate of |w - w*| / |w| over the batch, from the adjoint's own iteration; None where it made none
    gradient_error relative error of the operands' gradients when it was last measured, against a tenth of the tolerance
    bytes          held from forward to backward for the stored steps and coefficients
    seconds        only with record_solves(timing=True): host time inside the region by part, forward and backward together:
                   "body" (evaluations), "vjp", "solver" (all else of a solve), "overhead" (the rest). On a GPU: to enqueue it
    z, cotangent, w  flat (B, D) tensors, only with record_solves(tensors=True)
    """

    region: str
    status: str
    message: str = ""
    iterations: float = 0.0
    iterations_max: int = 0
    evaluations: int = 0
    residual: float = 0.0
    residual_mean: float = 0.0
    converged: float = 1.0
    vjps: int | None = None
    adjoint_residual: float | None = None
    adjoint_residual_mean: float | None = None
    adjoint_residual_batch: float | None = None
    adjoint_message: str = ""
    reused: bool | None = None
    adjoint_error: float | None = None
    gradient_error: float | None = None
    bytes: int = 0
    seconds: dict[str, float] | None = None
    z: Tensor | None = None
    cotangent: Tensor | None = None
    w: Tensor | None = None


@dataclasses.dataclass
class _Recorder:
    solves: list[SolveRecord]
    tensors: bool
    timing: bool = False


_lock = threading.Lock()
_active: list[_Recorder] = []
_open: dict[int, list[tuple[SolveRecord, bool]]] = {}
_serial = itertools.count(1)


@contextlib.contextmanager
def record_solves(tensors: bool = False, timing: bool = False) -> Iterator[list[SolveRecord]]:
    """Collect a `SolveRecord` for every region that runs inside the block, in order of the forwards.

    Process-wide, since autograd runs backwards in threads of its own. With `tensors=True` the records also hold the
    fixed point, the cotangent and the adjoint estimate, flat (B, D), detached; with `timing=True` where the time of each
    region went. Example::

        with record_solves() as solves:
            model(x).sum().backward()
        print(solves[0].iterations, solves[0].adjoint_residual)
    """
    recorder = _Recorder([], tensors, timing)
    with _lock:
        _active.append(recorder)
    try:
        yield recorder.solves
    finally:
        with _lock:
            _active.remove(recorder)
            mine = {id(record) for record in recorder.solves}
            for serial in [s for s, entries in _open.items() if all(id(r) in mine for r, _ in entries)]:
                del _open[serial]


def recording() -> bool:
    return bool(_active)


def wants_tensors() -> bool:
    return any(recorder.tensors for recorder in _active)


def wants_timing() -> bool:
    return bool(_active) and any(recorder.timing for recorder in _active)


def add_seconds(serial: int, seconds: dict[str, float]) -> None:
    """Add what a forward or a backward took to the records of a solve."""
    for record, _ in _open.get(serial, []):
        before = record.seconds or {}
        record.seconds = {part: before.get(part, 0.0) + spent for part, spent in seconds.items()}


def open_record(record: SolveRecord) -> int:
    """Hand a record to all active recorders; the serial number finds it again in the backward. 0: nobody listens."""
    with _lock:
        if not _active:
            return 0
        serial = next(_serial)
        entries = []
        for recorder in _active:
            copy = dataclasses.replace(record)
            if not recorder.tensors:
                copy.z = None
            recorder.solves.append(copy)
            entries.append((copy, recorder.tensors))
        _open[serial] = entries
        return serial


def complete_adjoint(serial: int, q: Tensor, found: AdjointSolution, gradient_error: float | None = None) -> None:
    """Fill in what an adjoint solve for the cotangents q (B, D) came to."""
    complete(
        serial,
        cotangent=q,
        w=found.w,
        vjps=found.vjps,
        adjoint_residual=float(found.residuals.max()),
        adjoint_residual_mean=float(found.residuals.mean()),
        adjoint_residual_batch=float(found.residual),
        adjoint_message=found.status.message,
        reused=found.reused,
        adjoint_error=found.error,
        gradient_error=gradient_error,
    )


def complete(serial: int, *, cotangent: Tensor, w: Tensor, **measured: object) -> None:
    """Fill in what the backward measured. A second backward through the same forward overwrites the first."""
    for record, tensors in _open.get(serial, []):
        for name, value in measured.items():
            setattr(record, name, value)
        if tensors:
            record.cotangent, record.w = cotangent.detach().clone(), w.detach().clone()
