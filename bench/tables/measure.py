"""Timing of all rows of a problem in turns in one process, and the memory of one row in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from bench import machine

from . import memory
from .cases import Case, floating, load
from .methods import Counts, Method, NotApplicable, Reading, Step, all_methods, between
from .reference import Reference, reference, relative_error, residual

Row = dict[str, Any]
WARM_UP = 3  # the first call verifies the loop, the second predicts its VJPs from the first
PARTIAL = 3  # timed steps after which an interrupted problem is still worth keeping


def prepare() -> None:
    """Several compiled copies of one model live in one process, which is no sign of a model that recompiles."""
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000


def build(method: Method, case: Case, deq: Counts | None) -> Step:
    return method.make(case, deq) if method.kind == "bound" else method.make(case)


def time_case(
    name: str, inject: str, keys: Sequence[str], repeats: int, truth: Reference, n_iter: int | None = None
) -> Iterator[Row]:
    """One row for each method, as each is skipped or fails, and all the timed ones at the end."""
    prepare()
    methods, steps, rows = all_methods(), dict[str, Step](), dict[str, Row]()
    default: Counts | None = None  # of the row "deq"
    solved: Counts | None = None  # of the first of ours that solves
    for key in keys:
        method, case = methods[key], load(name, inject, n_iter)
        row: Row = {"problem": name, "inject": inject, "n_iter": case.n_iter, "method": key, "reference": truth.how}
        reason = method.skip(case, default)
        if reason is not None:
            yield row | {"skipped": reason}
            continue
        print(f"  {name}, x {inject}: {method.label}", file=sys.stderr, flush=True)
        try:
            begun = time.perf_counter()
            step = build(method, case, solved)
            step.run()
            row["first_warm_s"] = time.perf_counter() - begun  # after other rows: not the cost of a fresh start
            for _ in range(WARM_UP - 1):
                step.run()
            row |= step.counts() | errors(step, truth)
        except NotApplicable as why:
            yield row | {"skipped": str(why)}
            continue
        except Exception as error:
            yield row | {"error": traceback.format_exc(), "skipped": f"failed: {error}".splitlines()[0][:200]}
            continue
        if key == "deq":
            default = row
        if key in ("deq", "deq-equilibrium") and row["status"] == "solve":
            solved = row
        steps[key], rows[key] = step, row
    yield from interleave(steps, rows, repeats, f"{name}, x {inject}")


def errors(step: Step, truth: Reference) -> Row:
    """What the last step got right."""
    step.run()
    outputs = [t.detach() for t in floating(step.outputs)]
    return {
        "residual": residual(step.case, outputs),
        "value_error": relative_error(outputs, truth.outputs),
        "gradient_error": relative_error(step.case.gradients(), truth.gradients),
    }


def interleave(steps: dict[str, Step], rows: dict[str, Row], repeats: int, what: str) -> Iterator[Row]:
    """Run all steps in turns, so that a slow moment of the machine falls on all; then the finished rows.

    A turn is two steps, of which the second is timed: in training a step follows one of its own kind, and finds its code and
    its weights where that left them.
    """
    samples: dict[str, list[tuple[Reading, Reading, Reading]]] = {key: [] for key in steps}
    load_of_others = machine.OtherLoad()
    gc.collect()
    gc.freeze()  # what has been compiled is here to stay: it need not be visited again in each collection
    try:
        with _no_collection():
            for _ in tqdm(range(repeats if steps else 0), desc=what, unit="round", dynamic_ncols=True):
                for key, step in steps.items():
                    step.run()
                    samples[key].append(step.run())
                gc.collect()
    except KeyboardInterrupt:
        if min(map(len, samples.values()), default=0) < PARTIAL:
            raise
    finally:
        gc.unfreeze()
    for key, row in rows.items():
        yield row | {"other_cores": load_of_others.mean_cores()} | timings(samples[key])


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timings(samples: Sequence[tuple[Reading, Reading, Reading]]) -> Row:
    """Medians in ms on both clocks, quartiles, and the raw steps."""
    found: Row = {"repeats": len(samples)}
    for clock in ("cpu", "wall"):
        forward = [1e3 * between(a, b)[clock] for a, b, _ in samples]
        backward = [1e3 * between(b, c)[clock] for _, b, c in samples]
        step = [f + b for f, b in zip(forward, backward, strict=True)]
        found[clock] = {
            "forward_ms": statistics.median(forward),
            "backward_ms": statistics.median(backward),
            "step_ms": statistics.median(step),
            "quartiles_ms": list(machine.quartiles(step)),
            "steps_ms": [round(s, 4) for s in step],
        }
    return found


def time_problem(
    name: str, forms: Sequence[str], chosen: Callable[[str], list[str]], repeats: int, n_iter: int | None = None
) -> Iterator[Row]:
    """All forms of a problem, against one reference: where x enters does not change the function."""
    truth = reference(load(name, forms[0], n_iter))
    for inject in forms:
        yield from time_case(name, inject, chosen(inject), repeats, truth, n_iter)


def memory_row(name: str, inject: str, key: str) -> Row:
    """Peak memory and first step of one method, in a process that has done nothing else."""
    row: Row = {"problem": name, "inject": inject, "method": key, "kind": "memory"}
    try:
        method, case = all_methods()[key], load(name, inject)
        reason = method.skip(case, None)
        if reason is not None:
            return row | {"skipped": reason}
        step = build(method, case, None)
        return row | memory.measure(step.run)
    except Exception as error:
        return row | {"error": traceback.format_exc(), "skipped": f"failed: {error}".splitlines()[0][:200]}
