"""An exception that nobody foresaw never fails the user's compile, and is never silent; wrong options come through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import Reason, deq_compile, fixed_point, unexpected
from deq_compile.capture import calls, loop_exit
from deq_compile.passes.find_loops import FindLoops
from deq_compile.torch_parts import MISSING, Absent, Unavailable, find
from tests.helpers import compiled

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def fixed(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = torch.tanh(0.4 * z + x)
    return z


def until(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(60):
        new = torch.tanh(0.4 * z + x)
        if (new - z).norm() < 1e-5:
            return new
        z = new
    return z


def declared(x: Tensor) -> Tensor:
    return fixed_point(lambda z: torch.tanh(0.4 * z + x), torch.zeros_like(x), tol=1e-6)


@pytest.fixture
def survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(unexpected.SWITCH, "0")
    monkeypatch.setattr(unexpected, "_warned", set())


def broken(*_: Any, **__: Any) -> Any:
    raise LookupError("a bug")


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("function", [fixed, until, declared])
def test_a_failing_pass_costs_the_region_only(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`until` and `declared` reach the passes with markers in the graph: they are traced again without."""
    monkeypatch.setattr(FindLoops, "run", broken)
    run, report = compiled(function, fullgraph=False)
    with pytest.warns(RuntimeWarning, match=r"bug of its own while rewriting a graph \(LookupError: a bug\)"):
        found = run(X)
    torch.testing.assert_close(found, function(X), rtol=1e-4, atol=1e-5)
    assert not report.regions
    assert {skipped.reason for skipped in report.skipped} == {Reason.UNEXPECTED}


@pytest.mark.usefixtures("survives")
def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(FindLoops, "run", broken)
    for function in (fixed, lambda x: 2 * fixed(x)):
        compiled(function)[0](X)
    assert [w.category for w in recwarn if "bug of its own" in str(w.message)] == [RuntimeWarning]


@pytest.mark.usefixtures("survives")
def test_a_failing_recogniser_leaves_the_call_to_dynamo() -> None:
    calls.add(broken)
    try:
        run, report = compiled(lambda x: fixed(x) + 1)
        with pytest.warns(RuntimeWarning, match="looking at a call"):
            found = run(X)
    finally:
        calls.remove(broken)
    torch.testing.assert_close(found, fixed(X) + 1, rtol=1e-4, atol=1e-5)
    assert len(report.regions) == 1


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("part", ["leaks", "_exit", "_in_loop"])
def test_failing_capture_leaves_the_frame_to_dynamo(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_number(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            new = torch.tanh(0.4 * z + x)
            if (new - z).norm().item() < 1e-5:
                return new
            z = new
        return z

    monkeypatch.setattr(loop_exit, part, broken)
    run, report = compiled(by_number, fullgraph=False)
    with pytest.warns(RuntimeWarning, match="LookupError: a bug"):
        found = run(X)
    torch.testing.assert_close(found, by_number(X))
    assert not report.regions


def test_a_bug_is_loud_in_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FindLoops, "run", broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a bug"):
        compiled(fixed)[0](X)


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("how", ["dict", "compile", "fixed_point", "string"])
def test_options_that_are_none_come_through(how: str) -> None:
    def inside(x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.tanh(0.4 * z + x), torch.zeros_like(x), tool=1e-6)

    runs: dict[str, Any] = {
        "dict": lambda: torch.compile(fixed, backend="deq", options={"tool": 1})(X),
        "compile": lambda: deq_compile(fixed, tool=1),
        "fixed_point": lambda: torch.compile(inside, backend="deq", options={"inner": "eager"})(X),
        "string": lambda: torch.compile(fixed, backend="deq", options="tool")(X),
    }
    with pytest.raises((ValueError, torch._dynamo.exc.BackendCompilerFailed), match="tool"):
        runs[how]()


def test_a_missing_part_of_torch() -> None:
    absent = find("torch._dynamo.nowhere", "Something")
    assert isinstance(absent, Absent)
    assert "nowhere" in MISSING.pop("Something")
    for use in (lambda: absent.attribute, lambda: absent(1), lambda: isinstance(1, absent)):
        with pytest.raises(Unavailable, match="has no Something"):
            use()
    assert find("torch._dynamo.nowhere", "Other", otherwise=3) == 3
    del MISSING["Other"]
