"""What each solve did: one record a forward, completed by its backward."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Iterator

from torch import Tensor

from .adjoint import AdjointSolution
from .forward import Solution
from .status import converged, message_of


@dataclasses.dataclass
class SolveRecord:
    """One forward of one region, and its backward once that has run.

    region                  key of the region
    where                   the user's file and line
    status                  "solve": z is a fixed point; "follow": the one that the loop's own iterates lead to; "kept": the
                            loop's own iterations were run
    message                 the solver's word on the worst sample (tolerance reached, stagnated at the precision's floor, ...)
    iterations              evaluations of the body until a sample stopped, mean over samples; `iterations_max` the largest
    evaluations             evaluations of the body on the whole batch, those of verification and probes included
    residual                stopping residual of the returned iterate, max over samples; `residual_mean` the mean
    converged               share of samples that reached the tolerance (or the precision's floor), 0 to 1
    vjps                    vector-Jacobian products of the backward; None until it has run
    adjoint_residual        |q + J^T w - w| / |q|, max over samples; `adjoint_residual_mean` the mean
    adjoint_residual_batch  the same with norms over the whole batch: the quantity refinement stops on
    adjoint_message         the adjoint solver's word
    reused                  whether the backward made use of the forward's factors; None until it has run
    recycled                whether the solve began with what earlier batches had left; `recycled_adjoint` whether the adjoint did
    adjoint_error           estimate of |w - w*| / |w| over the batch, from the adjoint's own iteration; None where it made none
    gradient_error          relative error of the operands' gradients when it was last measured, against a tenth of the tolerance
    bytes                   held from forward to backward for the stored steps and coefficients
    seconds                 only with record_solves(timing=True): host time inside the region by part, forward and backward
                            together: "body" (evaluations), "vjp", "solver" (all else of a solve), "overhead" (the rest). On a
                            GPU: to enqueue it
    z, cotangent, w         flat (B, D) tensors, only with record_solves(tensors=True)
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
    recycled: bool = False
    recycled_adjoint: bool | None = None
    adjoint_error: float | None = None
    gradient_error: float | None = None
    bytes: int = 0
    seconds: dict[str, float] | None = None
    z: Tensor | None = None
    cotangent: Tensor | None = None
    w: Tensor | None = None
    where: str = ""

    def describe(self, solution: Solution) -> None:
        """Fill in what a solve of at least one sample came to."""
        self.iterations = float(solution.iterations.double().mean())
        self.iterations_max = int(solution.iterations.max())
        self.residual = float(solution.residual.max())
        self.residual_mean = float(solution.residual.mean())
        self.converged = float(converged(solution.status).double().mean())
        self.message = message_of(solution.status)
        self.recycled = solution.state is not None and solution.state.shared is not None


@dataclasses.dataclass(eq=False)  # two recorders with equal contents are two
class _Recorder:
    solves: list[SolveRecord]
    tensors: bool
    timing: bool


_lock = threading.RLock()  # a block that nobody left ends where the collector finds it, maybe in the middle of one of ours
_active: list[_Recorder] = []
# Records that a backward may complete, by serial number and recorder, as long as somebody keeps them.
_open: weakref.WeakValueDictionary[tuple[int, _Recorder], SolveRecord] = weakref.WeakValueDictionary()
_serial = itertools.count(1)


def record_solves(tensors: bool = False, timing: bool = False) -> contextlib.AbstractContextManager[list[SolveRecord]]:
    """Collect a `SolveRecord` for every region that runs inside the block, in order of the forwards.

    Process-wide, since autograd runs backwards in threads of its own: blocks may be nested, and entered in several threads,
    and each gets all that runs as long as it is open. A long block may drop records from its list as it goes. Example::

        with record_solves() as solves:
            model(x).sum().backward()
        print(solves[0].iterations, solves[0].adjoint_residual)

    Args:
        tensors: whether the records also hold the fixed point, the cotangent and the adjoint estimate, flat (B, D), detached.
        timing: whether they hold where the time of each region went.

    Raises:
        TypeError: an argument that is no bool.
    """
    for name, value in (("tensors", tensors), ("timing", timing)):
        if not isinstance(value, bool):
            raise TypeError(f"record_solves: expected {name} to be True or False, got {value!r}")
    return _recording(tensors, timing)


@contextlib.contextmanager
def _recording(tensors: bool, timing: bool) -> Iterator[list[SolveRecord]]:
    recorder = _Recorder([], tensors, timing)
    with _lock:
        _active.append(recorder)
    try:
        yield recorder.solves
    finally:
        with _lock:
            _active.remove(recorder)
            for key in [key for key in list(_open.keys()) if key[1] is recorder]:
                _open.pop(key, None)


def recording() -> bool:
    return bool(_active)


def wants_tensors() -> bool:
    return any(recorder.tensors for recorder in tuple(_active))


def wants_timing() -> bool:
    return bool(_active) and any(recorder.timing for recorder in tuple(_active))


def _records(serial: int) -> list[tuple[SolveRecord, _Recorder]]:
    """The records of one forward that are still wanted."""
    found = ((_open.get((serial, recorder)), recorder) for recorder in tuple(_active))
    return [(record, recorder) for record, recorder in found if record is not None]


def add_seconds(serial: int, seconds: dict[str, float]) -> None:
    """Add what a forward or a backward took to the records of a solve that ask for it."""
    for record, recorder in _records(serial):
        if recorder.timing:
            before = record.seconds or {}
            record.seconds = {part: before.get(part, 0.0) + spent for part, spent in seconds.items()}


def open_record(record: SolveRecord) -> int:
    """Hand a record to all active recorders; the serial number finds it again in the backward. 0: nobody listens."""
    with _lock:
        if not _active:
            return 0
        serial = next(_serial)
        for recorder in tuple(_active):
            copy = dataclasses.replace(record)
            if not recorder.tensors:
                copy.z = None
            elif copy.z is None:  # the block was entered in the middle of this forward
                continue
            recorder.solves.append(copy)
            _open[serial, recorder] = copy
        return serial


def complete_adjoint(serial: int, q: Tensor, found: AdjointSolution, gradient_error: float | None = None) -> None:
    """Fill in what an adjoint solve for the cotangents q (B, D) came to; of no samples, a residual of zero."""
    some = found.residuals.numel() > 0
    complete(
        serial,
        cotangent=q,
        w=found.w,
        vjps=found.vjps,
        adjoint_residual=float(found.residuals.max()) if some else 0.0,
        adjoint_residual_mean=float(found.residuals.mean()) if some else 0.0,
        adjoint_residual_batch=float(found.residual),
        adjoint_message=found.status.message,
        reused=found.reused,
        recycled_adjoint=found.recycled,
        adjoint_error=found.error,
        gradient_error=gradient_error,
    )


def complete(serial: int, *, cotangent: Tensor, w: Tensor, **measured: object) -> None:
    """Fill in what the backward measured. A second backward through the same forward overwrites the first."""
    for record, recorder in _records(serial):
        for name, value in measured.items():
            setattr(record, name, value)
        if recorder.tensors:
            record.cotangent, record.w = cotangent.detach().clone(), w.detach().clone()
