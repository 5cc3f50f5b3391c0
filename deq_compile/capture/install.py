"""Switch capture on: every feature that reaches into Dynamo's private parts, each after a self-test of its own.

On a torch whose Dynamo has changed, a feature that fails its test stays off, `explain` says so, and everything else works.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from . import allclose, calls, ddp, dynamo, functions, hooks, loop_exit, marker
from . import solver_calls as _solver_calls  # noqa: F401 (they add themselves to `calls`)
from . import torchdeq as _torchdeq  # noqa: F401

log = logging.getLogger("deq_compile.capture")

OFF: dict[str, str] = {}  # feature -> why it is off
_installed = False


def install() -> None:
    """Once, when the package is imported."""
    global _installed
    if _installed:
        return
    _installed = True
    ddp.install()
    for feature, switch_on, test in _FEATURES:
        if dynamo.MISSING:
            OFF[feature] = dynamo.MISSING[0]
            continue
        _try(feature, switch_on, test)


def _try(feature: str, switch_on: Callable[[], Callable[[], None]], test: Callable[[], None]) -> None:
    remove: Callable[[], None] = lambda: None  # noqa: E731
    try:
        remove = switch_on()
        if dynamo.current() is None:  # inside a trace there is no tracing
            with _unseen():
                test()
    except Exception as error:  # whatever a changed Dynamo may raise
        remove()
        OFF[feature] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        log.warning("%s is off on torch %s: %s", feature, torch.__version__, OFF[feature])


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Leave no trace in the counters that users look at."""
    before = copy.deepcopy(counters)
    try:
        yield
    finally:
        counters.clear()
        counters.update(before)


class _Probe:
    """A backend that looks at the markers and compiles nothing."""

    __name__ = "deq_compile_self_test"
    takes_whole_graphs = True

    def __init__(self) -> None:
        self.targets: list[Any] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.targets = [node.target for node in gm.graph.nodes]
        return gm.forward


def _targets(function: Callable[[Tensor], Tensor]) -> list[Any]:
    probe = _Probe()
    torch.compile(function, backend=probe, fullgraph=True)(torch.ones(2))
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
    while not torch.allclose(z, new, atol=1e-3):  # any would do: how it is traced is looked at
        z, new = new, 0.5 * new
    return new


def _test_loop_exit() -> None:
    _expect(_targets(_halved).count(marker.may_exit), marker.UNROLLED, "markers")


def _called(z: Tensor) -> Tensor:
    return _halved(z)


def _adapter_of_halved(site: str, z: Tensor) -> Tensor:
    (found,), _ = marker.region(lambda states: (0.5 * states[0],), (z,), site, "self-test")
    return found


def _test_calls() -> None:
    calls.take(_halved, _adapter_of_halved)
    try:
        found = _targets(_called)
    finally:
        calls.give_back(_halved)
    _expect(found.count(marker.enter) + found.count(marker.leave), 2, "markers")


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


def _test_hooks() -> None:
    found = _targets(_hooked)
    _expect(found.count(marker.adjoint_hook) + found.count(marker.adjoint_input), 2, "markers")


def _test_allclose() -> None:
    _expect(_targets(_halved_until_close).count(marker.may_exit), marker.UNROLLED + 1, "markers")


_FEATURES: list[tuple[str, Callable[[], Callable[[], None]], Callable[[], None]]] = [
    ("loops whose exit depends on data", loop_exit.install, _test_loop_exit),
    ("calls of solvers", calls.install, _test_calls),
    ("backward hooks", hooks.install, _test_hooks),
    ("autograd functions in the report", functions.install, lambda: None),
    ("torch.allclose as a loop's test", allclose.install, _test_allclose),
]
