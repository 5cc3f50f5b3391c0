"""How captured solves get on with the rest of torch: reduce-overhead, autocast, microbatches, streams, hidden questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import problems
from deq_compile.testing import captures

from .common import Setting
from .models import options


class Subject:
    """A small model and its compiled forms."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = problems.MLP(17 if setting.dry else 256, 12 if setting.dry else 40, "before")
        problems.scale_spectral_norm(self.model.W.weight, 0.25 if setting.dry else 0.8)
        self.model.to(setting.device)
        self.width = self.model.W.weight.shape[0]

    def fresh(self, **more: Any) -> Callable[[Tensor], Tensor]:
        self.setting.forget()
        chosen = options(self.setting, semantics="equilibrium", backward_tol=1e-2, **more)
        found: Callable[[Tensor], Tensor] = torch.compile(self.model, backend="deq", options=chosen)
        return found

    def input(self) -> Tensor:
        return torch.randn(4, self.width, device=self.setting.device)

    def close(self, call: Callable[[Tensor], Tensor], what: str, tol: float = 5e-3) -> None:
        """A row: largest value error of four calls, and the engine that ran."""
        error = 0.0
        with torch.no_grad():
            for _ in range(4):
                x = self.input()
                error = max(error, float((call(x) - self.model(x)).norm() / self.model(x).norm()))
        ran, reasons = captures.used()
        self.setting.row(f"8: {what}", ok=error < tol and ran == ["while"], value_error=error, ran=ran, reasons=reasons)


def reduce_overhead(setting: Setting) -> None:
    with setting.guarded("8: under mode reduce-overhead"):
        subject = Subject(setting)
        subject.close(subject.fresh(inductor={"triton.cudagraphs": True}), "under mode reduce-overhead")


def autocast(setting: Setting) -> None:
    with setting.guarded("8: bf16 autocast"):
        subject = Subject(setting)
        call = subject.fresh()

        def cast(x: Tensor) -> Tensor:
            with torch.autocast(setting.device.type, dtype=torch.bfloat16):
                return call(x)

        subject.close(cast, "bf16 autocast", 3e-2)


def microbatches(setting: Setting) -> None:
    """Two forwards before one backward: the first's outputs and factors must survive the second."""
    with setting.guarded("8: two microbatches"):
        subject = Subject(setting)
        model, call = subject.model, subject.fresh()
        x1, x2 = subject.input(), subject.input()

        def gradient(call: Callable[[Tensor], Tensor]) -> Tensor:
            model.zero_grad()
            y1, y2 = call(x1), call(x2)
            (y1.sum() + y2.sum()).backward()
            assert model.W.weight.grad is not None
            return model.W.weight.grad.clone()

        for _ in range(3):
            both = gradient(call)
        error = float((both - gradient(model)).norm() / both.norm())
        ran, reasons = captures.used()
        setting.row("8: two microbatches", ok=error < 3e-2 and ran == ["while"], gradient_error=error, ran=ran, reasons=reasons)


def streams(setting: Setting) -> None:
    with setting.guarded("8: two streams"):
        subject = Subject(setting)
        call, two = subject.fresh(), [torch.cuda.Stream() for _ in range(2)]
        xs = [subject.input() for _ in range(6)]
        outs: list[Tensor] = []
        torch.cuda.synchronize()
        with torch.no_grad():
            for i, x in enumerate(xs):
                with torch.cuda.stream(two[i % 2]):
                    outs.append(call(x))
            torch.cuda.synchronize()
            error = max(float((y - subject.model(x)).norm() / y.norm()) for x, y in zip(xs, outs, strict=True))
        setting.row("8: two streams", ok=error < 5e-3, value_error=error)


def no_questions(setting: Setting) -> None:
    with setting.guarded("9: a forward that asks the device nothing"):
        subject = Subject(setting)
        call, x = subject.fresh(), subject.input()
        with torch.no_grad():
            for _ in range(4):
                call(x)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                call(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        setting.row("9: a forward that asks the device nothing", ok=True)


def run(setting: Setting) -> None:
    autocast(setting)
    microbatches(setting)
    if not setting.dry:
        for case in (no_questions, streams, reduce_overhead):
            if setting.enough(5, case.__name__):
                case(setting)
