"""A captured solve by itself: what it costs on the host, on the device beyond its bodies, to build, and how far that is from the
floor that the bytes of its steps set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import problems
from deq_compile.testing import CapturedForward, ForwardSettings, Operands, addresses, captures, node_types

from .common import Setting
from .facts import copy_rate
from .kernel_times import step_bytes

# B128 D1024 is the shape of the goal; the others have the same form with less work.
SHAPES = [(128, 1024), (128, 128), (32, 1024)]
PREDICTED = {
    "while": "host 3 to 6 µs a solve beyond its launches; build 1 to 3 ms; at B128 D1024 13 to 18 µs an iteration beyond",
    "chunks": "host 4 to 8 µs a chunk; build 5 to 15 ms",
}


class PlainRunner:
    """The body z = tanh(z W + b), as the engines call one; operands W (D, D), b (B, D)."""

    @torch.no_grad()
    def apply(self, z: Tensor, operands: Any) -> Tensor:
        W, b = operands
        return torch.tanh(torch.addmm(b, z, W))


class Solve:
    """A captured solve of z = tanh(z W + b), |W| = 0.9, on (B, D) from zero, to 1e-4."""

    def __init__(self, setting: Setting, B: int, D: int, wanted: str) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(D, D)
        problems.scale_spectral_norm(layer.weight, 0.25 if setting.dry else 0.9)
        self.z0 = torch.zeros(B, D, device=setting.device)
        self.operands = [layer.weight.detach().t().contiguous().to(setting.device), torch.randn(B, D).to(setting.device)]
        tol, most = (1e-3, 8) if setting.dry else (1e-4, 40)
        settings = ForwardSettings(tol, "rel", most, most, torch.float32, 1e-7)
        runner: Any = PlainRunner()
        own = Operands(self.operands, addresses(self.operands), frozenset({0, 1}))
        device = captures.device_class(setting.device)
        self.held = CapturedForward(device, runner, self.z0, own, settings, wanted)

    def __call__(self) -> Any:
        return self.held.solve(self.z0, self.operands, leaves=False)

    def iterations(self) -> int:
        """Most iterations of any sample in one solve. Waits.

        Raises:
            RuntimeError: nothing was captured.
        """
        found = self()
        if found is None:
            raise RuntimeError(f"expected a captured solve, got none: {self.held.reason}")
        return int(found.iterations.max())

    def bodies(self, count: int) -> Callable[[], None]:
        """`count` bodies one after the other on buffers of the same sizes."""
        W, b = (o.clone() for o in self.operands)
        z = torch.zeros_like(self.z0)

        def work() -> None:
            for _ in range(count):
                torch.tanh(torch.addmm(b, z, W))

        return work


def one_solve(setting: Setting, B: int, D: int, wanted: str, bandwidth: float) -> None:
    """A row about one shape and engine; `bandwidth` of a copy, in GB/s."""
    build = setting.wall_us(lambda: Solve(setting, B, D, wanted), repeats=2) / 1e3
    solve = Solve(setting, B, D, wanted)
    iterations = solve.iterations()
    whole = setting.timed(solve)
    floor = sum(step_bytes(B, D, n, 4) for n in range(1, iterations)) / bandwidth / 1e3
    row: dict[str, Any] = {}
    if not setting.dry:
        device = captures.device_class(setting.device)
        bodies = solve.bodies(iterations)
        device.warm(bodies)
        alone = setting.device_us(device.capture(bodies).replay)
        replayed = _replayed(setting, solve)
        best = whole.device if replayed is None else min(replayed, whole.device)
        beyond = best - alone
        row = {
            "us_bodies": round(alone, 1), "us_replay": replayed and round(replayed, 1),
            "us_per_iteration_beyond_body": round(beyond / iterations, 2),
            "times_the_floor": round(beyond / floor, 2), "launches": _launches(setting, solve),
        }  # fmt: skip
    setting.row(
        "3, 4, 7: a solve", B=B, D=D, engine=solve.held.name, asked=wanted, ok=solve.held.name == wanted,
        reason=solve.held.reason, iterations=iterations, us_device=round(whole.device, 1), host_hidden=whole.covered,
        us_host=round(setting.host_us(solve), 1), us_wall=round(setting.wall_us(solve), 1), build_ms=round(build, 1),
        us_floor=round(floor, 2), predicted=PREDICTED[wanted], **row,
    )  # fmt: skip


def _replayed(setting: Setting, solve: Solve) -> float | None:
    """µs of the WHILE graph alone, replayed after a restart that is not timed; None for other engines."""
    engine, state = solve.held.engine, solve.held.state
    graph = getattr(engine, "graph", None)
    if engine is None or engine.name != "while" or graph is None:
        return None
    out = state.outputs()
    return setting.device_us(graph.replay, lambda: state.restart(solve.held.z, solve.z0, out))


def _launches(setting: Setting, solve: Solve) -> int | None:
    """Launches of the solver in one iteration: nodes of a captured trip less those of a captured body; None if not captured."""
    if solve.held.engine is None:
        return None
    device = captures.device_class(setting.device)
    body = solve.bodies(1)
    trip: Any = device.capture(solve.held.trip, keep=True)
    alone: Any = device.capture(body, keep=True)
    return len(node_types(trip.raw_cuda_graph())) - len(node_types(alone.raw_cuda_graph()))


def run(setting: Setting) -> None:
    """Experiments 3, 4 and 7: cost of a solve on the host, beyond its bodies on the device, and of building it."""
    bandwidth = copy_rate(setting, 1 << (20 if setting.dry else 30))
    for B, D in [(2, 17)] if setting.dry else SHAPES:
        for wanted in PREDICTED:
            if not setting.enough(4, f"solve {B} x {D}, {wanted}"):
                return
            with setting.guarded("3, 4, 7: a solve", B=B, D=D, engine=wanted):
                one_solve(setting, B, D, wanted, bandwidth)
