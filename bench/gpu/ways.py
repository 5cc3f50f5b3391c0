"""The ways to run one training step of a workload: the user's loop, torch.compile of it, ours on each engine, and peers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import peer_jax
from .common import Setting
from .peer_torchdeq import TorchDEQ
from .peer_while import TorchWhile, in_graphs
from .reference import gradient
from .workloads import Workload

INF = float("inf")
EAGER, INDUCTOR, PEER = "eager loop", "torch.compile of the loop", "TorchDEQ's formulation, eager"
OURS, RAW = "deq while", "deq while, raw reuse"
FULL, REUSED = "deq while, adjoint 1e-4 without reuse", "deq while, adjoint 1e-4"
TORCH_WHILE = "torch while_loop"
# Options of the backend, in the order in which the ways run; the user's loop, its compilation and the peer run in between.
DEQ: dict[str, dict[str, Any]] = {
    OURS: {"engine": "while"},
    RAW: {"engine": "while", "backward_tol": INF},
    REUSED: {"engine": "while", "backward_tol": 1e-4},
    FULL: {"engine": "while", "backward_tol": 1e-4, "reuse": "never"},
    "deq chunks": {"engine": "chunks"},
    "deq loop": {"engine": "loop"},
}
RUN_DRY: dict[str, Any] = {"inner": "aot_eager", "verify": "never"}
ORDER = (EAGER, INDUCTOR, OURS, PEER, RAW, REUSED, FULL, TORCH_WHILE, *peer_jax.WAYS, "deq chunks", "deq loop")
# In a rehearsal: one of each kind that runs without a compiler, on the stand-in for graphs.
DRY = (EAGER, OURS, PEER, RAW, TORCH_WHILE, *peer_jax.WAYS)


class Skipped(Exception):
    """Why a way has no row here."""


@dataclass
class Way:
    """One way, ready to run.

    step      a training step from fresh gradients; enqueued, not waited for where torch runs it
    halves    the forward with its loss, and the backward from that; None where they cannot be told apart
    read      value and gradient of all parameters after a step, float64
    deq       whether it is ours
    note      what has to be known about it
    """

    step: Callable[[], object]
    halves: tuple[Callable[[], Tensor], Callable[[Tensor], object]] | None
    read: Callable[[], tuple[Tensor, Tensor]]
    deq: bool = False
    note: str = ""


def make(setting: Setting, name: str, workload: Workload) -> Way:
    """A way on a workload, with a model of its own.

    Raises:
        Skipped: it does not run here.
    """
    if name in peer_jax.WAYS:
        return _jax(setting, name, workload)
    model: nn.Module = copy.deepcopy(workload.model)
    call: Any = model
    note = ""
    if name in DEQ:
        options: dict[str, Any] = {"tol": workload.tol, **DEQ[name], **(RUN_DRY if setting.dry else {})}
        call = torch.compile(model, backend="deq", options=options)
    elif name == INDUCTOR:
        if setting.dry:
            raise Skipped("a rehearsal compiles nothing")
        call = torch.compile(model)
    elif name == PEER:
        call = model = TorchDEQ(copy.deepcopy(workload.model), workload.tol)
    elif name == TORCH_WHILE:
        call = model = TorchWhile(copy.deepcopy(workload.model), workload.tol, setting.dry)
        note = "" if in_graphs() else f"torch {torch.__version__} has no CUDA graphs of it: the host asks once an iteration"
    return _torch(setting, workload, model, call, name in DEQ, note)


def _torch(setting: Setting, workload: Workload, owner: nn.Module, call: Any, deq: bool, note: str) -> Way:
    last: dict[str, Tensor] = {}

    def forward() -> Tensor:
        owner.zero_grad(set_to_none=True)
        with workload.context(setting.device):
            out = call(*workload.inputs)
        last["value"] = out.detach()
        return workload.loss(out)

    def backward(loss: Tensor) -> None:
        loss.backward()

    def read() -> tuple[Tensor, Tensor]:
        return last["value"].double(), gradient(owner)

    return Way(lambda: backward(forward()), (forward, backward), read, deq, note)


def _jax(setting: Setting, name: str, workload: Workload) -> Way:
    try:
        peer_jax.ready(name, workload, setting.dry)
    except peer_jax.Missing as missing:
        raise Skipped(str(missing)) from None
    step = peer_jax.JaxStep(name, copy.deepcopy(workload))
    return Way(step, None, step.read, note="float32 products; waits for its end")
