"""What lives how long: sites with what was compiled, runners within bounds, and nothing after a reset."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import deq_compile
from deq_compile import Report, fixed_point
from deq_compile.backend import Backend
from deq_compile.capture import sites
from deq_compile.region import eager, shapes, site
from deq_compile.region.runners import MAX_SHAPES
from deq_compile.region.site import Site
from tests.helpers import TIGHT, compiled

_before: weakref.WeakSet[Site] = weakref.WeakSet()
WEIGHT = 0.2 * torch.eye(4)


def loop(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(20):
        z = torch.tanh(z @ WEIGHT + x)
    return z


def fresh_loop() -> Callable[[Tensor], Tensor]:
    """The same function with a code object of its own, which Dynamo keeps what it compiles with."""
    return types.FunctionType(loop.__code__.replace(co_name="own"), globals())


def collect() -> None:
    for _ in range(3):  # what a finalizer lets go is found in the next pass
        gc.collect()


def graph_modules() -> int:
    collect()
    return sum(fx.GraphModule in type(o).__mro__ for o in gc.get_objects())


@pytest.fixture(autouse=True)
def _nothing_left_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    deq_compile.reset()
    gc.collect()
    _before.update(site.living())
    gc.freeze()  # what others left need not be looked through again and again
    yield
    gc.unfreeze()


def ours() -> list[Site]:
    """Sites of this test. A hook of another one that holds its own tensor, and with it the graph, holds a site for ever."""
    return [known for known in site.living() if known not in _before]


def living() -> int:
    collect()
    return len(ours())


@pytest.mark.parametrize(("inner", "count"), [("eager", 8), ("aot_eager", 2)])
def test_nothing_is_left_of_models_that_are_gone(inner: str, count: int) -> None:
    before, bodies = graph_modules(), len(shapes._bodies)
    for _ in range(count):
        run, report = compiled(fresh_loop(), inner=inner)
        run(torch.randn(2, 4, requires_grad=True)).sum().backward()
        assert report.regions[0].status == "solve"
    del run
    torch._dynamo.reset()
    assert graph_modules() == before
    assert living() == 0
    assert len(shapes._bodies) == bodies


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_site_lives_as_long_as_the_callable_that_the_backend_returned(inner: str) -> None:
    """Dynamo's own registries hold what it compiled; here it is given another callable."""
    made: list[Callable[..., Any]] = []
    backend = Backend({**TIGHT, "inner": inner})

    def spy(gm: fx.GraphModule, inputs: Any) -> Any:
        made.append(backend(gm, inputs))
        return lambda *args: made[0](*args)

    run = torch.compile(loop, backend=spy)
    expected = run(torch.ones(2, 4))
    assert living() == 1
    torch.testing.assert_close(run(torch.ones(2, 4)), expected)
    made.clear()
    if inner == "aot_eager":  # with inner="eager" it is the graph's own method, and Dynamo holds the graph
        assert living() == 0
        with pytest.raises(IndexError):
            run(torch.ones(2, 4))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_backward_after_the_compiled_function_has_died(inner: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(loop(x).sum(), x)
    run, _ = compiled(fresh_loop(), inner=inner)
    y = run(x)
    alive = weakref.ref(run)
    del run
    torch._dynamo.reset()
    assert living() == 1
    assert alive() is None
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    del y, found
    assert living() == 0


@pytest.mark.parametrize("forget", [False, True])
def test_the_same_where_hooks_give_the_backward_a_copy_of_the_ticket(forget: bool) -> None:
    """The site is held for it, until a reset."""
    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(loop(x).sum(), x)
    made: list[Callable[..., Any]] = []

    def spy(gm: fx.GraphModule, inputs: Any) -> Any:
        made.append(Backend({**TIGHT, "inner": "aot_eager"})(gm, inputs))
        return lambda *args: made[0](*args)

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy):
        y = torch.compile(loop, backend=spy)(x)
    made.clear()
    assert living() == 1
    if forget:
        deq_compile.reset()
        assert living() == 0
        with pytest.raises(RuntimeError, match="unknown key"):
            y.sum().backward()
    else:
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_waits_for_backwards_is_bounded() -> None:
    run, _ = compiled(loop)
    run(torch.randn(2, 4, requires_grad=True))
    (spec,) = [known.spec for known in ours()]
    for _ in range(site.MOST_AWAITED + 5):
        site.await_backward(site.Site("waiting", spec))
    assert len(site._awaited) == site.MOST_AWAITED


def test_a_model_made_again_has_the_key_it_had() -> None:
    """The key stands in the compiled graph, and graph caches look for the graph's text."""
    keys = []
    for _ in range(2):
        (run, report), (other, second) = compiled(fresh_loop(), inner="aot_eager"), compiled(fresh_loop(), inner="aot_eager")
        run(torch.ones(2, 4))
        other(torch.ones(2, 4))
        keys.append((report.regions[0].key, second.regions[0].key))
        del run, other
        torch._dynamo.reset()
        collect()
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 2


def test_300_batch_sizes_leave_a_bounded_number_of_runners() -> None:
    run, report = compiled(loop, inner="eager", dynamic=True)
    for batch in range(2, 302):
        run(torch.ones(batch, 4))
    assert len(report.regions) == 1
    (spec,) = [known.spec for known in ours()]
    assert len(spec.body.shapes.runners) == MAX_SHAPES
    torch.testing.assert_close(run(torch.ones(2, 4)), loop(torch.ones(2, 4)), rtol=1e-4, atol=1e-5)


def test_reset_begins_again_and_leaves_compiled_models_at_work() -> None:
    report = Report()
    run = torch.compile(loop, backend=Backend({**TIGHT, "inner": "aot_eager"}, report))
    x = torch.randn(2, 4, requires_grad=True)
    expected = run(x).detach()
    pending = run(x)
    (known,) = ours()
    assert known.calls == 2
    deq_compile.reset()
    assert (known.verdict, known.calls, report.regions[0].status) == ("pending", 0, "pending")
    assert not known.spec.body.shapes.runners
    pending.sum().backward()  # what it needs hangs on its graph
    assert x.grad is not None
    torch.testing.assert_close(run(x).detach(), expected)
    assert (known.verdict, known.calls, report.regions[0].status) == ("solve", 1, "solve")
    assert len(report.regions) == 1  # not compiled again


@pytest.mark.parametrize("named", [False, True])
def test_dynamo_reset_reaches_us(named: bool) -> None:
    """As a backend object and by name."""
    run = torch.compile(loop, backend="deq", options=TIGHT) if named else torch.compile(loop, backend=Backend(TIGHT))
    run(torch.ones(2, 4))
    fixed_point(loop_body, torch.zeros(2, 3))
    sites._refusals[test_dynamo_reset_reaches_us] = []
    assert len(eager._sites) > 0
    torch._dynamo.reset()
    assert len(eager._sites) == 0
    assert len(sites._refusals) == 0


def loop_body(z: Tensor) -> Tensor:
    return 0.5 * z + 1


def test_a_tolerance_that_changes_with_every_call_leaves_a_bounded_number_of_sites() -> None:
    for k in range(eager.MOST_SITES + 10):
        fixed_point(loop_body, torch.zeros(1, 1), tol=1e-3 / (k + 1))
    (known,) = eager._sites.values()
    assert len(known) == eager.MOST_SITES


def test_decorated_functions_leave_nothing_and_keep_their_options() -> None:
    from deq_compile import scope

    def decorated(max_iter: int) -> Callable[[Tensor], Tensor]:
        return deq_compile.deq_compile(max_iter=max_iter, inner="eager")(fresh_loop())

    before = len(scope._functions)
    first, second, third = decorated(31), decorated(32), decorated(31)
    assert len(scope._functions) == before + 2
    functions = [first, second, third]
    outer, report = compiled(lambda x: functions[0](x) + functions[1](x) + functions[2](x))
    outer(torch.ones(2, 4))
    assert [r.status for r in report.regions] == ["solve"] * 3
    assert [known.spec.config.max_iter for known in ours()] == [31, 32, 31]
    functions.clear()
    del first, second, third, outer
    torch._dynamo.reset()
    collect()
    assert len(scope._functions) == before
