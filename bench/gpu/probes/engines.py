"""Do matrix products and convolutions run inside the engines, twice the same; does a compiled model, with its adjoint captured in
autograd's thread; what does making M cost the host."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch import Tensor

from deq_compile.testing import CapturedForward, Factors, ForwardSettings, Operands, addresses, captures, multisecant
from deq_compile.testing import engines as _engines

from ..common import Setting, relative_error
from ..models import engines_that_ran, first_model, moved, options, step_of, steps_first
from .registry import Finding, probe

CHANNELS, SIDE = 16, 16
engines: Any = _engines


class Conv:
    """z = tanh(conv(z) + u), operands W (16, 16, 3, 3), u (B, 16 * side * side)."""

    def __init__(self, side: int) -> None:
        self.side = side

    @torch.no_grad()
    def apply(self, z: Tensor, operands: Any) -> Tensor:
        W, u = operands
        image = z.view(len(z), CHANNELS, self.side, self.side)
        return torch.tanh(torch.conv2d(image, W, padding=1).flatten(1) + u)


class Product:
    """z = tanh(z W + u)."""

    @torch.no_grad()
    def apply(self, z: Tensor, operands: Any) -> Tensor:
        W, u = operands
        return torch.tanh(torch.addmm(u, z, W))


def subject(setting: Setting, conv: bool) -> tuple[Any, Tensor, list[Tensor]]:
    """A runner, z0 and the operands."""
    torch.manual_seed(0)
    side = 2 if setting.dry else SIDE
    B, D = (32, CHANNELS * side**2) if conv else (128, 1024)
    B, D = (2, D if conv else 17) if setting.dry else (B, D)
    W = 0.02 * torch.randn(CHANNELS, CHANNELS, 3, 3) if conv else 0.5 * torch.randn(D, D) / D**0.5
    operands = [W.to(setting.device), torch.randn(B, D).to(setting.device)]
    return Conv(side) if conv else Product(), torch.zeros(B, D, device=setting.device), operands


def solve_twice(setting: Setting, conv: bool, wanted: str) -> Finding:
    """A captured solve on an engine: it must run there, converge, and give the same bits again."""
    runner, z0, operands = subject(setting, conv)
    tol, most = (1e-3, 12) if setting.dry else (1e-4, 40)
    settings = ForwardSettings(tol, "rel", most, most, torch.float32, 1e-7)
    own = Operands(operands, addresses(operands), frozenset({0, 1}))
    begun = time.perf_counter()
    held = CapturedForward(captures.device_class(setting.device), runner, z0, own, settings, wanted)
    setting.sync()
    built = time.perf_counter() - begun
    outcomes = [held.solve(z0, operands, leaves=False) for _ in range(2)]
    setting.sync()
    if outcomes[0] is None or outcomes[1] is None:
        return Finding(False, {"ran": held.name, "reason": held.reason})
    once, again = outcomes[0], outcomes[1]
    same, converged = torch.equal(once.z, again.z), bool((once.status == 1).all())
    error = relative_error(once.z, runner.apply(once.z, operands))
    numbers: dict[str, Any] = {
        "ran": held.name, "reason": held.reason, "iterations": int(once.iterations.max()), "converged": converged,
        "same_again": same, "residual": error, "build_ms": round(1e3 * built, 1),
        "us_host": round(setting.host_us(lambda: held.solve(z0, operands, leaves=False)), 1),
    }  # fmt: skip
    return Finding(held.name == wanted and same and converged and error < 1e-2, numbers)


def _register() -> None:
    for conv in (False, True):
        for wanted in ("while", "chunks"):
            body = "convolution" if conv else "matrix product"

            def ask(setting: Setting, conv: bool = conv, wanted: str = wanted) -> Finding:
                return solve_twice(setting, conv, wanted)

            probe("engines", f"2 a {body} in {wanted}", "runs there, the same bits again")(ask)


_register()


@probe(
    "engines",
    "2 a matrix product in while, its condition set from a flag by a node of the body's own",
    "works: for when 1b fails",
)
def from_a_flag(setting: Setting) -> Finding:
    """The engine's other structure, where it has one."""
    if not hasattr(engines, "STRUCTURE"):
        return Finding(True, {"skipped": "this engine has one structure only"})
    before = engines.STRUCTURE
    engines.STRUCTURE = "flag"
    try:
        return solve_twice(setting, False, "while")
    finally:
        engines.STRUCTURE = before


@probe(
    "engines", "11 a convolution in while under TF32, torch's default", "ends near 1e-4, maybe at the floor", needs_device=True
)
def under_tf32(setting: Setting) -> Finding:
    """Not converging to 1e-4 is no fault here: the numbers say whether users of convolutions have to loosen `tol`."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        found = solve_twice(setting, True, "while")
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return Finding(found.numbers.get("residual", 1.0) < 1e-3 and found.numbers["ran"] == "while", found.numbers)


@probe("engines", "3 and 5 a compiled model, its adjoint captured in autograd's thread", "both as WHILE graphs")
def compiled(setting: Setting) -> Finding:
    model, inputs = first_model(setting.dry)
    own, given = moved(model, inputs, setting.device, torch.float32)
    expected = step_of(own, own, given)
    setting.forget()
    call = torch.compile(own, backend="deq", options=options(setting))
    for _ in range(steps_first(setting.dry)):
        found = step_of(call, own, given)
    setting.sync()
    ran, errors = engines_that_ran(), [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    ok = max(errors) < 2e-2 and ran["forward"] == ["while"] and ran["adjoint"] == ["while"]
    return Finding(ok, {**ran, "value_error": errors[0], "gradient_error": errors[1], "main_thread": threading.get_ident()})


@probe("engines", "8 host cost of making M: B128 D1024, 41 slots, n 11", "two launches: 20 to 40 µs of host, 10 to 25 of device")
def making_m(setting: Setting) -> Finding:
    B, D, slots = (2, 17, 5) if setting.dry else (128, 1024, 41)
    generator = torch.Generator(device=setting.device).manual_seed(0)
    S = torch.randn(B, slots, D, generator=generator, device=setting.device)
    C = 0.02 * torch.randn(B, slots - 1, 48, generator=generator, device=setting.device).tril()
    n = torch.full((B,), min(11, slots - 1), dtype=torch.int32, device=setting.device)
    factors = Factors(S=S, C=C, n=n, slots_written=slots)
    used = int(n[0])
    finite = bool(torch.isfinite(multisecant(factors).V[:, :used, :used]).all())  # only n rows and columns are in use
    timing = setting.timed(lambda: multisecant(factors))
    numbers = {"us_host": round(setting.host_us(lambda: multisecant(factors)), 1), "us_device": round(timing.device, 1)}
    return Finding(finite, {**numbers, "host_hidden": timing.covered})
