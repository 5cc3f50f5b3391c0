"""The verdict on one program: what the compiler did with it, and whether value and gradients are eager's.

Tolerances. What is kept or refused runs the user's own operations in their order, so it may differ by rounding only,
amplified by the program's own sensitivity: that is measured, as the change under a disturbance of 1e-14 of the input. A
solve stands in only where it agrees with the loop to `VERIFY_TOL`; its gradient is the limit of the loop's, hence the
wider margins there. A program that is rewritten wrongly is off by far more: by the size of one iteration.
"""

from __future__ import annotations

import copy
import dataclasses
import linecache
import math
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deq_compile import Report
from deq_compile.testing import Backend

VERIFY_TOL = 1e-6
OPTIONS: dict[str, Any] = {
    "inner": "eager", "tol": 1e-9, "backward_tol": 1e-8, "verify_tol": VERIFY_TOL, "max_iter": 60, "backward_max_iter": 80,
}  # fmt: skip
OPTIONS32: dict[str, Any] = {**OPTIONS, "tol": 1e-6, "backward_tol": 1e-5, "verify_tol": 1e-5}

EXACT, SOLVED, SOLVED_GRADIENT = 1e-9, 1e-4, 1e-3
# The same in float32, whose eps is 1e-7.
EXACT32, SOLVED32, SOLVED_GRADIENT32 = 1e-4, 1e-3, 1e-2
NUDGE = 1e-14

VERDICTS = (
    "rewritten-right", "followed-right", "kept-right", "refused-right", "not-a-loop", "eager-fails", "ill-conditioned", "WRONG",
)  # fmt: skip


@dataclasses.dataclass
class Verdict:
    """`kind` is one of VERDICTS; `reasons` are the names of the compiler's reasons; `detail` says what is wrong."""

    kind: str
    reasons: tuple[str, ...] = ()
    detail: str = ""
    error: float = 0.0

    @property
    def wrong(self) -> bool:
        return self.kind == "WRONG"


@dataclasses.dataclass
class Outcome:
    """Outputs, buffers after the call, and gradients (None where there is none), named."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor | None]


@dataclasses.dataclass
class _Program:
    """A program, what eager makes of each of its calls in float64, and how much a rounding of its inputs may grow."""

    double: nn.Module
    inputs: list[list[Tensor]]
    single: bool
    expected: list[Outcome]
    grown: float = 0.0


def judge(text: str, filename: str = "<program>") -> Verdict:
    """Compile the program in `text`, run it for each of its calls, compare with eager."""
    program = _in_eager_mode(load(text, filename))
    if isinstance(program, Verdict):
        return program
    torch._dynamo.reset()
    model = copy.deepcopy(program.double).float() if program.single else program.double
    if program.single and (why := _rounded(program, model)) is not None:
        return why
    report = Report()
    compiled = torch.compile(model, backend=Backend(OPTIONS32 if program.single else OPTIONS, report))
    for call in range(len(program.inputs)):
        wrong = _compared(program, call, compiled, model, report)
        if wrong is not None:
            return wrong
    reasons = tuple(dict.fromkeys(s.reason.name for s in report.skipped))
    if report.regions:
        if any(region.status == "follow" for region in report.regions):
            return Verdict("followed-right", reasons)
        return Verdict("rewritten-right" if _solved(report) else "kept-right", reasons)
    return Verdict("refused-right" if reasons else "not-a-loop", reasons)


def _in_eager_mode(module: types.ModuleType) -> _Program | Verdict:
    """The program's own results, or why they say nothing."""
    torch.manual_seed(0)
    double, inputs = module.Model().double(), [module.make_inputs(call) for call in module.CALLS]
    single = inputs[0][0].dtype == torch.float32
    expected, sensitivity = [], 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for xs in inputs:
                expected.append(run(double, double, [x.double() for x in xs]))
                if not getattr(double, "info", {"success": True})["success"]:
                    return Verdict("eager-fails", detail="its own solver has found no fixed point")
                nudged = run(double, double, [x.double() * (1 + NUDGE) for x in xs])
                sensitivity = max((sensitivity, *(e for _, e in differences(nudged, expected[-1]))))
    except Exception as error:
        return Verdict("eager-fails", detail=f"{type(error).__name__}: {error}")
    poisoned = not all(bool(torch.isfinite(x).all()) for xs in inputs for x in xs)
    finite = all(bool(torch.isfinite(t).all()) for e in expected for t in [*e.values.values(), *_present(e.grads)])
    if not finite and not poisoned:
        return Verdict("eager-fails", detail="eager's result is not finite")
    if sensitivity > (1e-11 if single else 1e-7):
        return Verdict("ill-conditioned", detail=f"a disturbance of {NUDGE} grows to {sensitivity:.1e}")
    return _Program(double, inputs, single, expected, 100 * sensitivity)


def _rounded(program: _Program, model: nn.Module) -> Verdict | None:
    """Note what eager itself loses in float32; a verdict where that is too much."""
    try:
        own = [run(model, model, xs) for xs in program.inputs]
    except Exception as error:
        return Verdict("eager-fails", detail=f"{type(error).__name__}: {error}")
    pairs = zip(own, program.expected, strict=True)
    program.grown = 10 * max(e for found, want in pairs for _, e in differences(found, want))
    return None if math.isfinite(program.grown) else Verdict("ill-conditioned", detail="float32 overflows")


def _solved(report: Report) -> bool:
    return any(region.status in ("solve", "follow", "pending") for region in report.regions)


def _compared(program: _Program, call: int, compiled: Any, model: nn.Module, report: Report) -> Verdict | None:
    """What is wrong with one call of the compiled program; None where it is right."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run(compiled, model, program.inputs[call])
    except Exception as error:
        frames = traceback.format_exc().strip().splitlines()
        return Verdict("WRONG", detail=f"call {call} raises {type(error).__name__}: {error}\n" + "\n".join(frames[-12:]))
    # A backward may send a region back to its loop; the value of that call is still the solve's.
    lenient = _solved(report) or any((r.distance or 1.0) < 2 * VERIFY_TOL for r in report.regions)
    exact, value, gradient = (EXACT32, SOLVED32, SOLVED_GRADIENT32) if program.single else (EXACT, SOLVED, SOLVED_GRADIENT)
    for name, off in differences(found, program.expected[call]):
        allowed = (gradient if name.startswith("grad") else value) if lenient else exact
        if not off <= max(allowed, program.grown):
            return Verdict("WRONG", detail=f"call {call}: {name} is off by {off:.2e}\n{report}", error=off)
    return None


def load(text: str, filename: str) -> types.ModuleType:
    """The program as a module; its lines are known to tracebacks."""
    module = types.ModuleType("fuzz_program")
    sys.modules["fuzz_program"] = module  # dataclasses look their module up
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), module.__dict__)
    return module


def run(call: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor]) -> Outcome:
    """One forward and backward, from the same seed and the same buffers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    own = [x.detach().clone().requires_grad_() for x in inputs]
    # A leaf that requires gradients may not be written to in place; an activation may.
    outputs = [t for t in torch.utils._pytree.tree_leaves(call(*[x.view_as(x) for x in own])) if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for t in outputs:
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        if t.requires_grad:
            loss = loss + (t.double() * weights).sum()
    if loss.requires_grad:
        loss.backward()
    values = {f"output {i}": t.detach().double() for i, t in enumerate(outputs)}
    values |= {f"buffer {name}": b.detach().clone().double() for name, b in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    grads = {f"grad of input {i}": x.grad for i, x in enumerate(own)}
    grads |= {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    return Outcome(values, {name: None if g is None else g.detach().double() for name, g in grads.items()})


def differences(found: Outcome, expected: Outcome) -> list[tuple[str, float]]:
    """Errors by name, relative to the tensor's own norm, or to a small part of that of all outputs or all gradients."""
    errors = []
    if list(found.values) != list(expected.values):
        return [(f"number of outputs, {len(found.values)} for {len(expected.values)}", float("inf"))]
    # A returned residual is zero but for rounding: it is compared with what it is a residual of. So is a fixed point of 0.
    largest = max((_norm(b) for b in expected.values.values()), default=0.0)
    for name, b in expected.values.items():
        errors.append((name, _error(found.values[name], b, 0.1 * max(largest, 1.0))))
    total = sum(_norm(g) ** 2 for g in _present(expected.grads)) ** 0.5
    for name, want in expected.grads.items():
        got = found.grads[name]
        like = want if got is None else got
        if like is not None:
            zero = torch.zeros_like(like)
            if want is None and got is not None:
                got = got.nan_to_num()  # no gradient at all, where a region hands on 0: 0 * inf of what lies before it
            # An initial guess has gradient 0 in a solve, and what is left of it after N steps in the loop. Inputs and
            # the loss's weights are of size 1, so that much less than 1 is little.
            errors.append((name, _error(zero if got is None else got, zero if want is None else want, 1e-2 * max(total, 1.0))))
    return errors


def _error(a: Tensor, b: Tensor, floor: float) -> float:
    """Infinite where the shapes differ, or what is not finite; of what is, the relative error."""
    if a.shape != b.shape:
        return float("inf")
    finite = torch.isfinite(b)
    if not bool(finite.all()):
        if not torch.equal(torch.isfinite(a), finite):
            return float("inf")
        a, b = a[finite], b[finite]
    scale = max(float(b.norm()), floor)
    return float((a - b).norm()) / (scale if scale > 1e-30 else 1.0)


def _norm(t: Tensor) -> float:
    return float(t[torch.isfinite(t)].norm())


def _present(grads: dict[str, Tensor | None]) -> list[Tensor]:
    return [g for g in grads.values() if g is not None]


def main(path: str) -> int:
    """Judge a saved program: its own `__main__` calls this."""
    torch.set_num_threads(1)
    verdict = judge(Path(path).read_text(), path)
    print(f"{verdict.kind} {' '.join(verdict.reasons)}\n{verdict.detail}")
    return int(verdict.wrong)
