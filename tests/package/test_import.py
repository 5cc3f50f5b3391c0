"""Importing the package costs little, touches nothing of Dynamo's, and leaves every way in open."""

from __future__ import annotations

import pytest
import torch

from tests import fresh

# What an import may not load: each takes longer than all of ours, or is what users of other backends do without.
DEAR = ("torch._dynamo", "torch._inductor", "triton", "sympy", "tabulate", "deq_compile.backend", "deq_compile.capture")
MOST_SECONDS = 0.3  # beyond torch's own, as CPU time


def python(code: str, stage: str) -> str:
    """What a fresh process prints. Without C++ kernels, which torch's own compiler of C++ makes."""
    done = fresh.python(code, stage, DEQ_COMPILE_NATIVE="0")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_import_is_cheap_and_touches_nothing() -> None:
    code = f"""
import sys, time
import torch
begun = time.process_time()
import deq_compile
spent = time.process_time() - begun
print([name for name in {DEAR} if name in sys.modules], spent)
"""
    said = [python(code, "torch") for _ in range(2)]
    assert all(line.startswith("[] ") for line in said)
    assert min(float(line.rpartition(" ")[2]) for line in said) < MOST_SECONDS


def test_fixed_point_in_eager_mode_needs_no_dynamo() -> None:
    code = """
import sys, torch
from deq_compile import fixed_point, record_solves
x = torch.randn(4, 8, requires_grad=True)
with record_solves() as solves:
    fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros(4, 8), tol=1e-5).sum().backward()
assert solves[0].converged == 1.0 and x.grad is not None
print("torch._dynamo" in sys.modules)
"""
    assert python(code, "torch").strip() == "False"


LOOP = """
import torch
def model(x, W):
    z = torch.zeros_like(x)
    for _ in range(30):
        z = torch.tanh(z @ W + x)
    return z
x, W = torch.randn(4, 8), torch.linalg.qr(torch.randn(8, 8))[0] * 0.3
"""
EXITS = """
def model(x, W):
    z = torch.zeros_like(x)
    for _ in range(60):
        new = torch.tanh(z @ W + x)
        if (new - z).norm() < 1e-5:
            break
        z = new
    return z
"""
RECORDED = """
    got = call(x, W)
torch.testing.assert_close(got, model(x, W), rtol=1e-3, atol=1e-4)
print(len(solves))
"""


@pytest.mark.parametrize(
    ("way", "stage"),
    [
        (
            "import deq_compile as d; call = torch.compile(model, backend='deq', fullgraph=True, options={'inner': 'eager'})",
            "parts",
        ),
        (
            "call = torch.compile(model, backend='deq', fullgraph=True, options={'inner': 'eager'}); import deq_compile as d",
            "dynamo",
        ),
        ("import deq_compile as d; call = d.deq_compile(inner='eager')(model)", "dynamo"),
        (
            "from deq_compile.backend import Backend; import deq_compile as d\n"
            "call = torch.compile(model, backend=Backend({'inner': 'eager'}))",
            "dynamo",
        ),
    ],
    ids=["by name", "by name alone", "decorator", "backend object"],
)
def test_capture_is_on_whichever_way_comes_first(way: str, stage: str) -> None:
    """A loop whose exit depends on data is seen by capture only. Dynamo comes behind the package in the first way alone."""
    assert python(LOOP + EXITS + way + "\nwith d.record_solves() as solves:" + RECORDED, stage).strip() == "1"


def test_explain_first() -> None:
    code = LOOP + EXITS + "from deq_compile import explain\nprint(len(explain(model, inner='eager')(x, W).regions))"
    assert python(code, "dynamo").strip() == "1"


@pytest.mark.thorough
def test_fixed_point_is_traced_by_our_backend_and_stands_outside_of_others() -> None:
    code = """
import torch, deq_compile
def model(x):
    return deq_compile.fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), tol=1e-6) + 1
x = torch.randn(4, 8)
want = model(x)
for name in BACKENDS:
    got = torch.compile(model, backend=name, fullgraph=name == "deq")
    for _ in range(3):
        torch.testing.assert_close(got(x), want, rtol=1e-4, atol=1e-5)
print("right")
"""
    # Dynamo comes behind the package in the one, and before it in the other.
    for backends, stage in (("['eager', 'deq']", "parts"), ("['deq', 'eager']", "dynamo")):
        assert python(code.replace("BACKENDS", backends), stage).strip() == "right"


def test_an_import_changes_nothing_for_other_backends() -> None:
    """The same graph, in as many pieces, with and without."""
    code = (
        LOOP
        + EXITS
        + """
seen = []
def backend(gm, inputs):
    seen.append([n.name for n in gm.graph.nodes])
    return gm.forward
torch.compile(model, backend=backend)(x, W)
print(seen)
"""
    )
    assert python("import deq_compile\n" + code, "dynamo") == python(code, "dynamo")


def test_from_a_plain_checkout() -> None:
    """Without an entry point the backend is known after the import, at the price of Dynamo."""
    code = (
        """
import importlib.metadata as metadata
real = metadata.entry_points
metadata.entry_points = lambda **given: metadata.EntryPoints() if given.get("group") == "torch_dynamo_backends" else real(**given)
"""
        + LOOP
        + "import deq_compile as d; call = torch.compile(model, backend='deq', options={'inner': 'eager'})\n"
    )
    assert python(code + "with d.record_solves() as solves:" + RECORDED, "dynamo").strip() == "1"


def test_the_module_in_place_of_the_decorator_says_what_to_write() -> None:
    import deq_compile

    with pytest.raises(TypeError, match="Fix: `from deq_compile import deq_compile`, or"):

        @deq_compile  # type: ignore[operator]
        class Model(torch.nn.Module): ...


def test_what_is_imported_late_is_there() -> None:
    code = "import deq_compile as d; print([n for n in d.__all__ if n not in dir(d) or getattr(d, n, None) is None])"
    assert python(code, "dynamo").strip() == "[]"
    with pytest.raises(AssertionError, match="has no attribute 'compile'"):
        python("import deq_compile; deq_compile.compile", "torch")
