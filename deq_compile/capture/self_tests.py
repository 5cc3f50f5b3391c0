"""The self-tests of capture: small programs, each traced once when its feature is switched on, that show it at its work."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deq_compile import markers

from . import calls, dynamo, torchdeq


class _Probe:
    """A backend that looks at the markers and compiles nothing."""

    __name__ = "deq_compile_self_test"
    takes_whole_graphs = True

    def __init__(self) -> None:
        self.targets: list[Any] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.targets = self.targets or [node.target for node in gm.graph.nodes]  # of the first graph
        return gm.forward


def _targets(function: Callable[..., Tensor], *more: Any, needs_grad: bool = False, dynamic: bool | None = None) -> list[Any]:
    """What stands in the graph of a function, compiled as users compile: where Dynamo breaks the graph, half of it is missing."""
    probe = _Probe()
    torch.compile(function, backend=probe, dynamic=dynamic)(torch.ones(2, requires_grad=needs_grad), *more)
    dynamo.reset_code(function.__code__)
    return probe.targets


def _expect(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise RuntimeError(f"expected {wanted} {what}, got {found}")


def _halved(z: Tensor) -> Tensor:
    for _ in range(50):
        new = 0.5 * z
        small = (new - z).norm().item() < 1e-3
        z = new
        if small:
            break
    return z


def _halved_until_close(z: Tensor) -> Tensor:
    new = 0.5 * z
    while not (torch.allclose(z, new, atol=1e-3) & z.allclose(new, atol=1e-3)):  # the function and the method
        z, new = new, 0.5 * new
    return new


def test_loop_exit() -> None:
    _expect(_targets(_halved).count(markers.may_exit), markers.UNROLLED, "markers")


def _halved_often(z: Tensor, count: int) -> Tensor:
    for _ in range(count):
        z = 0.5 * z
    return z


def _halved_at_first(z: Tensor, count: int) -> Tensor:
    for k in range(count):
        z = 0.5 * z if k < 20 else z
    return z


def test_counted() -> None:
    _expect(_targets(_halved_often, 30, dynamic=True).count(markers.counted), markers.UNROLLED, "markers")
    _expect(_targets(_halved_at_first, 30, dynamic=True).count(markers.counted), 0, "markers")


def _called(z: Tensor) -> Tensor:
    return _halved(z)


def _adapter_of_halved(site: str, z: Tensor) -> Tensor:
    (found,), _ = markers.region(lambda states: (0.5 * states[0],), (z,), site, "self-test")
    return found


def test_calls() -> None:
    calls.take(_halved, _adapter_of_halved)
    try:
        found = _targets(_called)
    finally:
        calls.give_back(_halved)
    _expect(found.count(markers.enter) + found.count(markers.leave), 2, "markers")


class _Settings(torch.nn.Module):
    """The attributes of a TorchDEQ module that its adapter reads."""

    f_tol, f_max_iter, eval_f_max_iter, b_tol, b_max_iter = 1e-3, 7, 8, 1e-4, 9

    def forward(self, z: Tensor) -> Tensor:
        return z


def _with_settings(z: Tensor, module: _Settings) -> Tensor:
    return module(z)


def _adapter_of_settings(site: str, z: Tensor, f_tol: Any, f_cap: Any, eval_cap: Any, b_tol: Any, b_cap: Any) -> Tensor:
    hints = (("tol", f_tol), ("max_iter", f_cap + eval_cap), ("backward_tol", b_tol), ("backward_max_iter", b_cap))
    (found,), _ = markers.region(lambda states: (0.5 * states[0],), (z,), site, "self-test", hints)
    return found


def test_torchdeq() -> None:
    def recognise(tx: Any, function: Any, arguments: Any, kwargs: Any) -> Any:
        if function is not _Settings.forward:
            return None
        return _adapter_of_settings, [arguments[1], *torchdeq.settings(tx, arguments[0])]

    calls.add(recognise)
    try:
        found = _targets(_with_settings, _Settings())
    finally:
        calls.remove(recognise)
    _expect(found.count(markers.enter) + found.count(markers.leave), 2, "markers")


def _hooked(z: Tensor) -> Tensor:
    z = 0.5 * z
    start = z.detach().clone().requires_grad_()
    image = 0.5 * start

    def solve(grad: Tensor) -> Tensor:
        w = grad
        for _ in range(9):
            w = torch.autograd.grad(image, start, w, retain_graph=True)[0] + grad
        return w

    z.register_hook(solve)
    return z


def test_hooks() -> None:
    found = _targets(_hooked)
    _expect(found.count(markers.adjoint_hook) + found.count(markers.adjoint_input), 2, "markers")


class _Calls:
    count = 0


_CALLS_SO_FAR = _Calls()


def _counted(z: Tensor) -> Tensor:
    z = _halved(z)
    _CALLS_SO_FAR.count += 1
    return z + 1


def test_growing() -> None:
    """The graph ends before the number is written."""
    found = _targets(_counted)
    _expect(found.count(markers.may_exit), markers.UNROLLED, "markers")
    _expect(found.count(operator.add), 0, "additions")


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, pair: Any, x: Tensor) -> Tensor:
        ctx.pair, ctx.x = pair, x
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        image, start = ctx.pair
        w = grad
        for _ in range(40):
            w = torch.autograd.grad(image, start, w, retain_graph=True)[0] + grad
        return None, None, torch.autograd.grad(image, ctx.x, w)[0]


def _with_function(x: Tensor) -> Tensor:
    z = x.detach()
    start = z.detach().clone().requires_grad_()
    return _Attached.apply(z, (0.5 * start + x, start), x)


def test_functions() -> None:
    found = _targets(_with_function, needs_grad=True)
    _expect(found.count(markers.adjoint_hook) + found.count(markers.adjoint_input), 2, "markers")


def test_allclose() -> None:
    _expect(_targets(_halved_until_close).count(markers.may_exit), markers.UNROLLED + 1, "markers")


_NOBODY = logging.Logger("deq_compile.self_test", logging.CRITICAL)


def _saying(z: Tensor) -> Tensor:
    for _ in range(50):
        new = 0.5 * z
        gap = (new - z).norm().item()
        _NOBODY.debug(f"{gap:.1e}")
        z = new
        if gap < 1e-3:
            break
    return z


def test_said() -> None:
    found = _targets(_saying)
    _expect(found.count(markers.may_exit) + found.count(markers.told), markers.UNROLLED + 1, "markers")


def _gathered(z: Tensor, matrix: Tensor) -> Tensor:
    return matrix @ z


def test_sparse() -> None:
    _expect(_targets(_gathered, torch.eye(2).to_sparse()).count("index_add"), 1, "sums")
