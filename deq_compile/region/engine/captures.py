"""Captured forward solves: one for each region, set of shapes, settings and thread; bounded in number."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deq_compile.kernels import device as kernel_device
from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.broyden.gpu import TritonState
from deq_compile.region.body import Runner
from deq_compile.region.forward import FLOOR_EPS, Solution
from deq_compile.region.site import Site

from .device import Device
from .engines import Engine, capture
from .operands import Operands, addresses

log = logging.getLogger("deq_compile.region")

# Captured solves that are held at a time. Each holds a few states and its small operands.
MOST = 32


@dataclass(frozen=True)
class ForwardSettings:
    """What a captured forward solve has built in."""

    tol: float
    stop_mode: str
    max_iter: int
    memory: int
    factor_dtype: torch.dtype
    body_eps: float
    eta: float = 0.1


class CapturedForward:
    """One captured forward solve: buffers, operands, engine."""

    before: Callable[[], None] | None = None

    def __init__(
        self, device: Device, runner: Runner, z0: Tensor, operands: Operands, settings: ForwardSettings, wanted: str
    ) -> None:
        self.device, self.runner, self.operands, self.settings = device, runner, operands, settings
        self.busy = threading.Lock()
        self.launched: Any = None
        self.z = torch.empty_like(z0, memory_format=torch.contiguous_format)
        self.state = TritonState.for_capture(
            z0, settings.memory, settings.factor_dtype, eta=settings.eta, tol=settings.tol,
            relative=settings.stop_mode == "rel", floor=FLOOR_EPS * settings.body_eps, limit=settings.max_iter,
        )  # fmt: skip
        self.own: tuple[Tensor, Tensor] | None = None  # factors of solves that leave none
        self.engine: Engine | None = None
        self.reason = ""
        self.build(z0, wanted)

    @property
    def name(self) -> str:
        return "loop" if self.engine is None else self.engine.name

    def trip(self) -> None:
        self.state.step(self.z, self.runner.apply(self.z, self.operands.tensors))

    def build(self, z0: Tensor, wanted: str) -> None:
        """Warm up in this thread, on the capturing stream, then capture."""
        S, C = self.state.buffers()
        summary = self.device.pinned(3)

        def once() -> None:
            self.state.restart(self.z, z0, S, C)
            self.trip()
            self.state.summarise(summary)

        self.device.warm(once)
        self.engine, self.reason = capture(self.device, self, self.settings.max_iter, wanted)
        if self.device.reads_addresses:
            self.operands.release()

    def _factors(self, S: Tensor | None, C: Tensor | None) -> tuple[Tensor, Tensor]:
        if S is not None and C is not None:
            return S, C
        if self.own is None:
            self.own = self.state.buffers()
        return self.own

    def solve(self, z0: Tensor, operands: Sequence[Tensor], S: Tensor | None, C: Tensor | None) -> Solution | None:
        """Solve from z0 (B, D) with factors in S and C, as `region.forward.solve`. None where this captured solve cannot serve:
        it is busy in another thread, or an operand has moved. The outcome is not waited for, but where an engine has to."""
        if self.engine is None or not self.busy.acquire(blocking=False):
            return None
        try:
            self.device.enter_stream(self.launched)
            if not self.operands.load(operands):
                return None
            S, C = self._factors(S, C)
            state = self.state
            state.restart(self.z, z0.contiguous(), S, C)
            self.engine.launch()
            # The buffers are used again by the next solve.
            n, stop = state.n.clone(), state.done.clone()
            found = Solution(
                z=state.z_best.clone(),
                state=Factors(S=S, C=C, n=n, high=S.shape[1]),
                status=stop,
                iterations=state.iterations.clone(),
                residual=state.best.clone(),
                evaluations=0,
                outcome=self.engine.outcome,
            )
            self.launched = self.launched or self.device.event()
            self.launched.record()
            return found
        finally:
            self.busy.release()

    def finished(self) -> bool:
        """Whether the last launch has ended, so that the buffers may go."""
        return not self.busy.locked() and (self.launched is None or self.launched.query())


class _Seen:
    """A key that has run in the loop once."""

    def __init__(self, at: list[int]) -> None:
        self.addresses = at
        self.copy: frozenset[int] = frozenset()


_found: OrderedDict[Any, CapturedForward | _Seen] = OrderedDict()
_lock = threading.Lock()
device_class: type[Device] = Device


def captured_forward(
    key: tuple[Any, ...], runner: Runner, z0: Tensor, operands: Sequence[Tensor], settings: ForwardSettings, wanted: str
) -> CapturedForward | None:
    """The captured solve for these shapes; None where there is none (yet): the loop serves.

    Args:
        key: the region, and all that is particular about this call beside shapes and settings.
        runner: of the body, for these shapes.
        z0: (B, D) an initial state.
        operands: of this call.
        settings: of the solver.
        wanted: "auto", "while", "chunks", or "loop".
    """
    if wanted == "loop" or not kernel_device.on_gpu(z0.device) or not z0.numel() or settings.factor_dtype is None:
        return None
    full = (
        *key, z0.shape, z0.dtype, z0.device, settings, wanted, threading.get_ident(), device_class.settings(),
        tuple((o.shape, o.stride(), o.dtype) for o in operands),
    )  # fmt: skip
    with _lock:
        entry = _found.get(full)
        if entry is None:
            _make_room()
            _found[full] = _Seen(addresses(operands))
            return None
        _found.move_to_end(full)
    if isinstance(entry, CapturedForward):
        if not entry.operands.hopeless:
            return entry
        again = _Seen(addresses(operands))
        again.copy = frozenset(entry.operands.moved)
        entry = again
    built = CapturedForward(
        device_class(z0.device), runner, z0, Operands(operands, entry.addresses, entry.copy), settings, wanted
    )
    if built.reason:
        log.info("region %s: %s", key[0], built.reason)
    with _lock:
        _found[full] = built
    return built


def under_capture(site: Site, state0: Sequence[Tensor]) -> bool:
    """Whether somebody else captures the caller's stream: then nothing may be asked of the device, and nothing captured.

    Raises:
        RuntimeError: something about the region is still to be decided, which takes a question.
    """
    if not device_class.capturing():
        return False
    coupling_unknown = site.rows is None and all(s.dim() > 0 and s.shape[0] > 1 for s in state0)
    if site.verdict == "pending" or coupling_unknown:
        raise RuntimeError(
            f"fixed-point region at {site.spec.where}: expected a first call outside the capture of a CUDA graph: it decides "
            "whether the solve may stand in for the loop. Fix: run the model once, forward and backward, before you capture it"
        )
    return True


def _make_room() -> None:
    """Drop the captured solve that has been idle longest, if there are too many; one that is still at work stays."""
    if len(_found) < MOST:
        return
    for key, entry in _found.items():
        if isinstance(entry, _Seen) or entry.finished():
            del _found[key]
            return


def used() -> tuple[list[str], list[str]]:
    """The engines of all captured solves that are held, and the reasons why some are not on a better one."""
    held = [entry for entry in _found.values() if isinstance(entry, CapturedForward)]
    return sorted({h.name for h in held}), sorted({h.reason for h in held} - {""})


def clear() -> None:
    """Forget all captured solves; waits for none, so only to be called when the device is idle."""
    with _lock:
        _found.clear()
