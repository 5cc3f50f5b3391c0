"""What every test shares: one thread, one seed, a clean Dynamo, and a bill for Inductor.

Inductor takes seconds a graph, so a suite under ten minutes on two cores has to ration it: tests use ``inner="eager"``
unless the compiled code is what they are about. The session counts the graphs that Inductor compiles, prints the
number, and fails above the budget.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# No torch at the top: where pytest-xdist shares the tests out, the process that does so would import it first, for nothing, while
# those that run tests wait for it.

INDUCTOR_BUDGET = 40  # graphs a session; about 5 s each with an empty cache


class InductorCounter:
    """Counts the graphs handed to Inductor, forward and backward graphs apart; hits of its cache count too.

    The wrapped name is the private ``_compile_fx_inner``, which the public ``compile_fx_inner`` looks up at every call:
    others bind the public one at import or as a default argument, where a wrapper would miss it.
    """

    def __init__(self) -> None:
        self.count = 0
        self._original: Any = None

    def install(self) -> None:
        import torch._inductor.compile_fx as compile_fx

        self._original = original = compile_fx._compile_fx_inner

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        compile_fx._compile_fx_inner = counted

    def remove(self) -> None:
        if self._original is not None:
            import torch._inductor.compile_fx as compile_fx

            compile_fx._compile_fx_inner = self._original


COUNTER = InductorCounter()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # the tests run in other processes
    import torch

    os.environ.setdefault("DEQ_COMPILE_RAISE", "1")  # an exception that a user's compile would survive is a bug here
    # One thread: the tensors of the tests are too small to share out, and the order of a reduction (hence a bitwise
    # comparison) must not depend on the machine. Tests of threading set their own number.
    torch.set_num_threads(1)
    COUNTER.install()
    # Else pytest catches what it writes, as of every logger that does not propagate: all graphs of all traces, printed.
    logging.getLogger("torch.__trace").propagate = True
    if os.environ.get("TRITON_INTERPRET") == "1":
        from bench.gpu.interpreter import quicken

        quicken()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What all tests have imported stays: the collector need not look through it again and again, nor after every few hundred
    objects of a trace. Who asks it to collect still has all that a test has made collected."""
    if "torch" in sys.modules:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)


_run_test = pytest.Function.runtest


def _roomy(self: pytest.Function) -> None:
    """Run a test from a frame that leaves room for the frames above it.

    CPython (3.11 and later) has frames in chunks of 16 KiB, and gives the last one back to the system as soon as the call that
    began it returns: calls at such a border, frequent in Dynamo's depths, map and unmap memory each time, which took a tenth of
    all CPU time. A chunk is as large as the frame that begins it needs, rounded up to a power of two; the rest of it is free.
    """
    _run_test(self)


_roomy.__code__ = _roomy.__code__.replace(co_stacksize=140_000)  # of 8 bytes: a chunk of 2 MiB
pytest.Function.runtest = _roomy  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    COUNTER.remove()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Several processes (pytest-xdist): the first adds up what the others counted."""
    COUNTER.count += getattr(node, "workeroutput", {}).get("inductor", 0)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["inductor"] = COUNTER.count
    elif COUNTER.count > INDUCTOR_BUDGET and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    line = f"Inductor compiled {COUNTER.count} graphs (budget {INDUCTOR_BUDGET})"
    if COUNTER.count > INDUCTOR_BUDGET:
        advice = "FAILED: use inner='eager' where compiled code is not the point"
        terminalreporter.write_line(f"{line}: {advice}", red=True)
    else:
        terminalreporter.write_line(line)


@pytest.fixture
def inductor() -> InductorCounter:
    """The session's counter: read ``.count`` before and after."""
    return COUNTER


@pytest.fixture(autouse=True)
def clean_torch() -> Iterator[None]:
    """Fix the seed, and drop what the test compiled (cheap where it compiled nothing: 20 µs)."""
    import torch

    torch.manual_seed(0)
    threads, default_dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(default_dtype)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
