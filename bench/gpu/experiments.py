"""The first experiments on a device, in order, each with what was predicted before it beside what is measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from bench import problems
from deq_compile.kernels.triton_shared import set_conditional
from deq_compile.region.engine import captures
from deq_compile.region.engine.forward import CapturedForward, ForwardSettings
from deq_compile.region.engine.operands import Operands, addresses

from .common import Setting


@triton.jit
def count_trip(count_ptr: Any, limit_ptr: Any, handle_ptr: Any) -> None:
    count = tl.load(count_ptr) + 1
    tl.store(count_ptr, count)
    set_conditional(handle_ptr, tl.where(count < tl.load(limit_ptr), 1, 0))


@triton.jit
def add_one(count_ptr: Any) -> None:
    tl.store(count_ptr, tl.load(count_ptr) + 1)


class Counter:
    """A WHILE graph that goes round a given number of times, with `extra` more tiny kernels in each trip."""

    def __init__(self, setting: Setting, extra: int) -> None:
        device = captures.device_class(setting.device)
        self.count, self.limit, self.other = (torch.zeros(1, dtype=torch.int32, device=setting.device) for _ in range(3))
        condition = device.new_condition()
        add_one[(1,)](self.other, num_warps=1)
        if not setting.dry:
            count_trip.warmup(self.count, self.limit, condition.handle, grid=(1,), num_warps=1)._init_handles()

        def trip() -> None:
            for _ in range(extra):
                add_one[(1,)](self.other, num_warps=1)
            count_trip[(1,)](self.count, self.limit, condition.handle, num_warps=1)

        after = device.capture(lambda: add_one[(1,)](self.other, num_warps=1), keep=True)
        parts = {"condition": condition, "before": None, "trip": device.capture(trip, keep=True), "after": after}
        self.graph = device.while_graph(parts)

    def start(self, trips: int) -> Callable[[], None]:
        def reset() -> None:
            self.count.zero_()
            self.other.zero_()
            self.limit.fill_(trips)

        return reset


def while_nodes(setting: Setting) -> None:
    for extra in (0, 1):
        with setting.guarded("1 and 2: a WHILE node over a counter", kernels=1 + extra):
            counter = Counter(setting, extra)
            exact = True
            for trips in (1, 2, 10, 37):
                counter.start(trips)()
                counter.graph.replay()
                setting.sync()
                exact &= int(counter.count) == trips and int(counter.other) == trips * extra + 1
            low, high = (2, 6) if setting.dry else (10, 1010)
            few, many = (setting.device_us(counter.graph.replay, counter.start(n)) for n in (low, high))
            per_trip = (many - few) / (high - low)
            setting.row(
                "1 and 2: a WHILE node over a counter", kernels=1 + extra, ok=exact, predicted="exact; 2 to 5 µs a trip with two "
                "kernels, above 8 use chunks", us_per_trip=round(per_trip, 2),
            )  # fmt: skip


class Body(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.W = nn.Linear(D, D)
        problems.scale_spectral_norm(self.W.weight, 0.9 if D > 100 else 0.25)


class PlainRunner:
    """A body as the engines call one."""

    def __init__(self, body: Body) -> None:
        self.body = body

    @torch.no_grad()
    def apply(self, z: Tensor, operands: Any) -> Tensor:
        W, b = operands
        return torch.tanh(torch.addmm(b, z, W))


def forward(setting: Setting, B: int, D: int, wanted: str) -> tuple[CapturedForward, Callable[[], Any], Tensor]:
    """A captured solve of z = tanh(z W + b), and a call that runs it."""
    torch.manual_seed(0)
    body = Body(D).to(setting.device)
    z0 = torch.zeros(B, D, device=setting.device)
    operands = [body.W.weight.detach().t().contiguous(), torch.randn(B, D).to(setting.device)]
    tol, most = (1e-3, 8) if setting.dry else (1e-4, 40)
    settings = ForwardSettings(tol, "rel", most, most, torch.float32, 1e-7)
    runner: Any = PlainRunner(body)
    own = Operands(operands, addresses(operands), frozenset({0, 1}))
    held = CapturedForward(captures.device_class(setting.device), runner, z0, own, settings, wanted)
    return held, lambda: held.solve(z0, operands, leaves=False), operands[0]


def _build(setting: Setting, B: int, D: int, wanted: str) -> None:
    forward(setting, B, D, wanted)


def _weight_gradient(model: problems.MLP) -> Tensor:
    assert model.W.weight.grad is not None
    return model.W.weight.grad.clone()


def solves(setting: Setting) -> None:
    """Experiments 3, 4 and 7: cost of a solve on the host, beyond its bodies on the device, and of building it."""
    predicted = {
        "while": "host 3 to 6 µs a solve beyond its launches; build 1 to 3 ms",
        "chunks": "host 4 to 8 µs a chunk; build 5 to 15 ms",
    }
    for B, D in [(2, 17)] if setting.dry else [(128, 128), (128, 1024), (32, 1024)]:
        for wanted, expected in predicted.items():
            with setting.guarded("3, 4, 7: a solve", B=B, D=D, engine=wanted):
                one_solve(setting, B, D, wanted, expected)


def one_solve(setting: Setting, B: int, D: int, wanted: str, predicted: str) -> None:
    build = setting.wall_us(lambda: _build(setting, B, D, wanted), repeats=2) / 1e3
    held, call, _ = forward(setting, B, D, wanted)
    found = call()
    setting.sync()
    if found is None:
        raise RuntimeError(f"expected a captured solve, got none: {held.reason}")
    iterations = int(found.iterations.max())
    W, b = held.operands.tensors
    alone = None
    if not setting.dry and W.numel() and b.numel():  # both copied, so that they are still at hand

        def bodies() -> None:
            for _ in range(iterations):
                torch.tanh(torch.addmm(b, held.z, W))

        device = captures.device_class(setting.device)
        device.warm(bodies)
        alone = setting.device_us(device.capture(bodies).replay)
    total = setting.device_us(call)
    setting.row(
        "3, 4, 7: a solve", B=B, D=D, engine=held.name, asked=wanted, ok=held.name == wanted, reason=held.reason,
        iterations=iterations, us_device=round(total, 1), us_bodies=alone and round(alone, 1),
        us_per_iteration_beyond_body=None if alone is None else round((total - alone) / iterations, 2),
        us_host=round(setting.host_us(call), 1), us_wall=round(setting.wall_us(call), 1), build_ms=round(build, 1),
        predicted=predicted,
    )  # fmt: skip


def interplay(setting: Setting) -> None:
    """Experiment 8: under reduce-overhead, with autocast, on two streams, with two microbatches; 9: no hidden synchronisation."""
    inner = "aot_eager" if setting.dry else "inductor"
    model = problems.MLP(17 if setting.dry else 256, 12 if setting.dry else 40, "before")
    problems.scale_spectral_norm(model.W.weight, 0.25 if setting.dry else 0.8)
    model = model.to(setting.device)
    width = model.W.weight.shape[0]
    options: dict[str, Any] = {"inner": inner, "tol": 1e-3 if setting.dry else 1e-4, "semantics": "equilibrium"}

    def fresh(**more: Any) -> Callable[[Tensor], Tensor]:
        torch._dynamo.reset()
        captures.clear()
        return torch.compile(model, backend="deq", options={**options, **more})

    def close(call: Callable[[Tensor], Tensor], what: str, tol: float = 5e-3) -> None:
        error = 0.0
        for _ in range(4):
            x = torch.randn(4, width, device=setting.device)
            with torch.no_grad():
                error = max(error, float((call(x) - model(x)).norm() / model(x).norm()))
        ran = captures.used()[0]
        setting.row(f"8: {what}", ok=error < tol and ran == ["while"], value_error=error, ran=ran)

    if not setting.dry:
        with setting.guarded("8: under mode reduce-overhead"):
            close(fresh(inductor={"triton.cudagraphs": True}), "under mode reduce-overhead")
    with setting.guarded("8: bf16 autocast"):
        call = fresh()

        def cast(x: Tensor) -> Tensor:
            with torch.autocast(setting.device.type, dtype=torch.bfloat16):
                return call(x)

        close(cast, "bf16 autocast", 3e-2)
    with setting.guarded("8: two microbatches"):
        call = fresh()
        x1, x2 = (torch.randn(4, width, device=setting.device) for _ in range(2))
        for _ in range(3):
            model.zero_grad()
            y1, y2 = call(x1), call(x2)
            (y1.sum() + y2.sum()).backward()
            both = _weight_gradient(model)
            model.zero_grad()
            (model(x1).sum() + model(x2).sum()).backward()
        error = float((both - _weight_gradient(model)).norm() / both.norm())
        ran = captures.used()[0]
        setting.row("8: two microbatches", ok=error < 3e-2 and ran == ["while"], gradient_error=error, ran=ran)
    if setting.dry:
        return
    with setting.guarded("8: two streams"):
        call = fresh()
        streams = [torch.cuda.Stream() for _ in range(2)]
        xs = [torch.randn(4, width, device="cuda") for _ in range(6)]
        outs: list[Tensor] = []
        torch.cuda.synchronize()
        with torch.no_grad():
            for i, x in enumerate(xs):
                with torch.cuda.stream(streams[i % 2]):
                    outs.append(call(x))
            torch.cuda.synchronize()
            error = max(float((y - model(x)).norm() / y.norm()) for x, y in zip(xs, outs, strict=True))
        setting.row("8: two streams", ok=error < 5e-3, value_error=error)
    with setting.guarded("9: a forward that asks the device nothing"):
        call = fresh()
        x = torch.randn(4, width, device="cuda")
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
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    while_nodes(setting)
    solves(setting)
    interplay(setting)


