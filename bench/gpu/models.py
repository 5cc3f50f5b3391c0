"""Compiled models on each engine: values and gradients against float64, and the engines bitwise among each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import models, problems
from deq_compile.testing import CapturedAdjoint, CapturedForward, captures

from .common import Setting, relative_error

ENGINES = ("loop", "chunks", "while")
# Against the float64 loop: solve and adjoint to 1e-4, of contractions with norms up to 0.95, so up to twenty times that.
VALUE_ERROR, GRADIENT_ERROR = 2e-3, 2e-2
Made = tuple[nn.Module, tuple[Any, ...]]


def options(setting: Setting, **more: Any) -> dict[str, Any]:
    """Options of the backend for a check; in a rehearsal nothing is given to Inductor, and solves are short."""
    if setting.dry:
        return {"inner": "aot_eager", "tol": 1e-3, "backward_tol": 1e-4, "verify": "never", **more}
    return {"inner": "inductor", "tol": 1e-4, "backward_tol": 1e-4, **more}


def steps_first(dry: bool) -> int:
    """Training steps until both directions of a region run as they will from then on: comparisons with the loop come at calls 0,
    1, 2, 4 and 8, and a direction is captured at its second call without one. A rehearsal's regions do not compare."""
    return 3 if dry else 7


def step_of(call: Any, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The outputs and the parameters' gradients of one training step, each as one vector."""
    model.zero_grad(set_to_none=True)
    out = call(*inputs)
    outputs = [t for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t) and t.is_floating_point()]
    sum(t.float().square().mean() for t in outputs).backward()  # type: ignore[union-attr]
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([t.detach().flatten() for t in outputs]), torch.cat(grads)


def moved(model: nn.Module, inputs: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Made:
    """A copy of a model and its inputs on a device, floating-point numbers in a dtype."""
    own = copy.deepcopy(model).to(device, dtype)
    given = tuple(
        t.to(device, dtype) if torch.is_tensor(t) and t.is_floating_point() else t.to(device) if torch.is_tensor(t) else t
        for t in inputs
    )
    return own, given


def small_loop() -> Made:
    """For rehearsals: 2 x 17 unknowns."""
    model = problems.MLP(17, 12, "before")
    problems.scale_spectral_norm(model.W.weight, 0.25)
    return model, (torch.randn(2, 17),)


def first_model(dry: bool) -> Made:
    """The model that runs first of all: z = tanh(W z + u), 64 x 256, |W| = 0.8, forty iterations."""
    if dry:
        return small_loop()
    torch.manual_seed(0)
    model = problems.MLP(256, 40, "before")
    problems.scale_spectral_norm(model.W.weight, 0.8)
    return model, (torch.randn(64, 256),)


def of_problem(name: str) -> Callable[[], Made]:
    def make() -> Made:
        model, x, _ = problems.make(name, 60, "before")
        return model, (x.detach(),)

    return make


def chosen(dry: bool) -> dict[str, Callable[[], Made]]:
    """The models of the part `correct`, by name."""
    if dry:
        return {"small loop": small_loop}
    real = {name: make for name, make in models.MODELS.items() if name in ("deq_transformer", "mdeq", "flow", "graph")}
    return {name: of_problem(name) for name in ("mlp128", "mlp1024", "conv", "transformer")} | real


def engines_that_ran() -> dict[str, Any]:
    """What the captured solves that are held ran on, forward and adjoint apart, and why not on a better engine."""
    forward = sorted({h.name for h in captures.held(CapturedForward)})
    adjoint = sorted({h.name for h in captures.held(CapturedAdjoint)})
    return {"forward": forward, "adjoint": adjoint, "reasons": captures.used()[1]}


def check(setting: Setting, name: str, made: Made, what: str = "model") -> None:
    """One model through all engines, a row each."""
    model, inputs = made
    own, given = moved(model, inputs, setting.device, torch.float64)
    exact = step_of(own, own, given)
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for engine in ENGINES:
        if not setting.enough(8, f"{name}, {engine}"):
            return
        with setting.guarded(what, model=name, engine=engine):
            setting.forget()
            own, given = moved(model, inputs, setting.device, torch.float32)
            call = torch.compile(own, backend="deq", options=options(setting, engine=engine))
            for _ in range(steps_first(setting.dry)):
                results[engine] = step_of(call, own, given)
            setting.sync()
            ran = engines_that_ran()
            errors = [relative_error(a, b) for a, b in zip(results[engine], exact, strict=True)]
            plain = results.get("loop", results[engine])
            bitwise = all(torch.equal(a, b) for a, b in zip(results[engine], plain, strict=True))
            # Of a region in the loop engine nothing is held.
            as_asked = engine == "loop" or (ran["forward"] == [engine] and ran["adjoint"] == [engine])
            ok = errors[0] < VALUE_ERROR and errors[1] < GRADIENT_ERROR and as_asked
            setting.row(
                what, model=name, engine=engine, ok=ok, **ran, value_error=errors[0], gradient_error=errors[1],
                as_the_loop_bitwise=bitwise,
            )  # fmt: skip


def repeats(setting: Setting) -> None:
    """Fifty training steps from the same weights, bit for bit."""
    with setting.guarded("repeats"):
        setting.forget()
        model, inputs = small_loop() if setting.dry else chosen(False)["mlp1024"]()
        own, given = moved(model, inputs, setting.device, torch.float32)
        call = torch.compile(own, backend="deq", options=options(setting))
        for _ in range(steps_first(setting.dry)):
            first = step_of(call, own, given)
        times = 2 if setting.dry else 50
        different = 0
        for _ in range(times):
            again = step_of(call, own, given)
            different += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        setting.row("repeats", ok=different == 0, times=times, different=different)
