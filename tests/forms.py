"""The table of forms, and `docs/forms.md` from it: `python -m tests.forms` writes that file with what it measures."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deq_compile import Reason, record_solves
from tests.helpers import compiled, largest_error, value_and_grads
from tests.models.exits import FORMS as EXITS
from tests.models.explicit import EXPLICIT
from tests.models.form import Cell, Form
from tests.models.library import LIBRARY, Library
from tests.models.operators import OPERATORS
from tests.models.solvers import HOOKS, SOLVERS

MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
DOCUMENT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", "forms.md")

SECTIONS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "Loops whose exit depends on data",
        "Traced as one loop; the solve stops when the loop's own test holds, unless `tol` is set. What tells how many iterations "
        "ran, or is written in every iteration, cannot be had from a solve: such a loop is left to Dynamo.",
        EXITS,
    ),
    (
        "Calls of a solver",
        "A function of a map, an initial state, a tolerance and a cap is tried out once on a small problem whose fixed point "
        "is known; if it finds that, its calls become regions at their own tolerance and cap. `register_solver` names others. "
        "The attached step after a no-grad solve keeps its Jacobian-free gradient.",
        SOLVERS,
    ),
    (
        "Calls of a solver, with a hook that solves the adjoint",
        "The no-grad solve, the attached step and the hook become one region with the implicit gradient, at the hook's "
        'tolerance (1e-4 where it has a count only); `hooks="keep"` leaves the hook.',
        HOOKS,
    ),
    (
        "Operators and autograd functions",
        "`torch.while_loop` is written out and found like a loop. An autograd.Function whose backward differentiates again "
        "stays outside of the graph; what its forward calls is still compiled.",
        OPERATORS,
    ),
    ("fixed_point", "Said outright, in eager mode and under the compiler.", EXPLICIT),
    (
        "TorchDEQ",
        "Models built with `get_deq`, unmodified, at the library's tolerances. Implicit gradients are solved with the forward's "
        "factors; phantom gradients stay their attached steps.",
        LIBRARY,
    ),
]


class Iterated(nn.Module):
    """The same cell, iterated long enough: what an implicit gradient is compared with."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.f = cell

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(300):
            z = self.f(z, x)
        return z


@dataclasses.dataclass
class Row:
    """What became of one form. Errors are relative, against float64; `whole` means that fullgraph=True compiles."""

    regions: int
    whole: bool
    kinds: list[str]
    value_error: float
    gradient_error: float
    reasons: list[Reason]
    places: list[str]
    solves: int
    report: str


def expected(form: Form | Library, x: Tensor) -> list[Tensor]:
    """The numbers of the user's own model in float64; where that only approximates its gradient, those of a long loop."""
    model = form.make()[0].double()
    hooked = isinstance(form, Form) and form.implicit
    double: nn.Module = Iterated(model.f) if hooked else model  # type: ignore[arg-type]
    if hasattr(double, "loop"):
        double.loop = True  # type: ignore[assignment]
    return value_and_grads(double, double, x.double())


def measure(form: Form | Library, **options: Any) -> Row:
    """Compile a form, run it forward and backward, and compare."""
    model, x = form.make()
    whole = form.breaks == 0
    run, report = compiled(model, fullgraph=whole, **options)
    with record_solves() as solves:
        if model.training:
            found, reference = value_and_grads(run, model, x), expected(form, x)
        else:
            with torch.no_grad():
                found, reference = [run(x).double()], [form.make()[0].double()(x.double())]
    return Row(
        regions=len(report.regions),
        whole=whole,
        kinds=sorted({r.kind for r in report.regions}),
        value_error=largest_error(found[:1], reference[:1]),
        gradient_error=largest_error(found[1:], reference[1:]) if len(found) > 1 else math.nan,
        reasons=[s.reason for s in report.skipped],
        places=[r.location.file for r in report.regions] + [s.location.file for s in report.skipped],
        solves=len(solves),
        report=str(report),
    )


def forms() -> Iterator[tuple[str, str, Any]]:
    """(section, name, form) of the whole table."""
    for title, _, table in SECTIONS:
        for name, form in table.items():
            yield title, name, form


def document(rows: dict[tuple[str, str], Row] | None = None) -> str:
    """The text of docs/forms.md; without `rows` the measured columns are dashes."""
    parts = [
        "# The forms",
        "How people write a fixed point, and what the compiler makes of it. Generated from the models in `tests/models/` by "
        "`python -m tests.forms`; a test holds it up to date. Errors are relative, against float64, at tol=1e-6 and "
        'backward_tol=1e-5 (TorchDEQ: at the settings of its models), with inner="eager"; fixed_point at its own options.',
    ]
    for title, text, table in SECTIONS:
        parts += [f"## {title}", text, _table(title, table, rows)]
        if title != "TorchDEQ":
            parts += [_source(name, form) for name, form in table.items()]
        else:
            parts += [_source("one state", next(iter(table.values())))]
    return "\n\n".join(parts) + "\n"


def _table(title: str, table: dict[str, Any], rows: dict[tuple[str, str], Row] | None) -> str:
    lines = [
        "| form | regions | one graph | becomes | value error | gradient error |",
        "|---|---|---|---|---|---|",
    ]
    for name, form in table.items():
        becomes = f"{form.kind}" if form.regions else "left alone"
        if form.refused is not None:
            becomes += f"; {form.refused.name}: {form.refused.value}"
        row = rows.get((title, name)) if rows is not None else None
        errors = ["–", "–"] if row is None else [_number(row.value_error), _number(row.gradient_error)]
        lines.append(f"| {name} | {form.regions} | {'yes' if form.breaks == 0 else 'no'} | {becomes} | {' | '.join(errors)} |")
    return "\n".join(lines)


def _number(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.0e}"


def _source(name: str, form: Any) -> str:
    cls = type(form.make()[0])
    classes = [c for c in cls.__mro__ if c.__module__.startswith("tests.models") and c is not Cell and c.__name__ != "Linear"]
    methods = []
    for method in ("solve", "forward"):
        owner = next((c for c in classes if method in c.__dict__), None)
        if owner is not None:
            methods.append(textwrap.dedent(inspect.getsource(owner.__dict__[method])).rstrip())
    code = "\n\n".join(methods)
    return f"**{name}**\n\n```python\n{code}\n```"


def main() -> None:
    warnings.simplefilter("ignore")
    rows = {}
    for title, name, form in forms():
        torch._dynamo.reset()
        torch.manual_seed(0)
        rows[title, name] = row = measure(form, **form.options)
        print(f"{title[:30]:32}{name:36}{row.regions} {row.value_error:.1e} {row.gradient_error:.1e}", flush=True)
    os.makedirs(os.path.dirname(DOCUMENT), exist_ok=True)
    with open(DOCUMENT, "w", encoding="utf-8") as file:
        file.write(document(rows))


if __name__ == "__main__":
    main()
