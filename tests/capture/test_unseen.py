"""What moves from iteration to iteration and shows in none of those that are traced: the loop is left alone, whatever ends it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deq_compile import Reason, explain
from tests.capture.test_counted import LAYER, apart, both, counted, error, seeded
from tests.helpers import compiled

Model = Callable[..., Tensor]
CAP = 100


class Stage:
    def __init__(self, gain: float, after: Stage | None) -> None:
        self.gain, self.after = gain, after


FIRST: Stage | None = None
for index in reversed(range(CAP + 1)):
    FIRST = Stage(1.0 if index < 12 else 0.5, FIRST)

# What stands before a loop, what an iteration makes of z, and what is returned.
UNSEEN = {
    # a closure counts its calls
    "in a cell": (
        "made = 0\n    def step(z):\n        nonlocal made\n        made += 1\n        return torch.tanh(LAYER(z) + x)",
        "new = step(z)",
        "z * made",
    ),
    # a closure reads what the loop counts
    "in a cell of its own": ("made = 0\n    def read(): return made", "new = torch.tanh(LAYER(z) + x); made += 1", "z * read()"),
    # the oldest of twenty states is the first one in all iterations that are traced
    "in a queue": (
        "states = deque([x], maxlen=20)",
        "new = torch.tanh(LAYER(z) + x + 0.5 * states[0]); states.append(new)",
        "z",
    ),
    "in a piece": ("states = [x]", "new = torch.tanh(LAYER(z) + x + 0.5 * states[-12:][0]); states.append(new)", "z"),
    "along objects": ("stage = FIRST", "new = torch.tanh(LAYER(z) * stage.gain + x); stage = stage.after", "z"),
    # another way to say `if k >= 15`
    "in what is caught": (
        "late = 15",
        "try:\n            if k >= late: raise ValueError\n            new = torch.tanh(LAYER(z) + x)\n"
        "        except ValueError:\n            new = torch.tanh(LAYER(z) - x)",
        "z",
    ),
    # rounding makes one text of many numbers
    "in a text": (
        "gains = {'at 0.0': 1.0}",
        "new = torch.tanh(LAYER(z) + x) * gains.get(f'at {k / 400:.1f}', 0.5)",
        "z",
    ),
}


def model_of(name: str, test: str) -> Model:
    before, iteration, given = UNSEEN[name]
    text = f"""
def model(x, n={CAP}):
    {before}
    z = torch.zeros_like(x)
    for k in range(n):
        {iteration}
        {test}
        z = new
    return {given}
"""
    names: dict[str, Any] = {"torch": torch, "LAYER": LAYER, "FIRST": FIRST, "deque": deque}
    exec(text, names)
    return names["model"]  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it traces what a loop calls
@pytest.mark.parametrize("name", UNSEEN)
def test_a_loop_with_a_test_is_left_alone(name: str) -> None:
    model = model_of(name, "if (new - z).norm() < 1e-10: break")
    run, _ = compiled(model, fullgraph=False)
    assert error(run, model) < 1e-8  # a frame that is resumed after fifteen iterations may hold a loop of one map
    torch._dynamo.reset()
    said = explain(model, inner="eager")(torch.ones(2, 4, dtype=torch.float64)).skipped
    assert Reason.COUNTER in {s.reason for s in said}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_loop_of_many_counts_is_left_alone(name: str) -> None:
    model = model_of(name, "")
    run, report = compiled(model, fullgraph=False)
    assert max(error(run, model, n) for n in (9, 18, 26)) < 1e-2  # each count is a region of its own
    assert "loop of n" not in {r.kind for r in report.regions}
    assert Reason.COUNTER in {s.reason for s in report.skipped}


# ---- loops whose count is an input, and what is around them


def limited(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for k in range(n):
        if k > 15:
            raise ValueError("too many")
        z = torch.tanh(LAYER(z) + x)
    return z


def test_an_error_that_only_later_iterations_raise_is_raised() -> None:
    run, _ = compiled(limited, fullgraph=False)
    x = torch.ones(2, 4, dtype=torch.float64)
    for n in (13, 14, 12):
        run(x, n)
    with pytest.raises(ValueError, match="too many"):
        run(x, 17)


def states(x: Tensor, n: int) -> Iterator[Tensor]:
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
        yield z


def test_a_generator_gives_as_many_states_as_it_is_asked_for() -> None:
    def listed(x: Tensor, n: int) -> Tensor:
        found = list(states(x, n))
        return found[-1] * len(found)

    run, _ = compiled(listed, fullgraph=False)
    assert max(error(run, listed, n) for n in (18, 22, 5)) < 1e-4


def rows(x: Tensor, n: int) -> Tensor:
    z = torch.zeros(4, dtype=x.dtype)
    for k in range(n):
        z = torch.tanh(LAYER(z) + x[k])
    return z


def caught(x: Tensor, n: int) -> Tensor:
    z, most = torch.zeros(4, dtype=x.dtype), [0] * 9
    try:
        for k in range(n):
            z = torch.tanh(LAYER(z) + x[0])
            most[k]
    except IndexError:
        z = 2 * z
    return z


@pytest.mark.parametrize("model", [rows, caught])
def test_iterations_beyond_those_that_there_are_do_not_fail(model: Model) -> None:
    """More are traced than a call makes."""
    run, _ = compiled(model, fullgraph=model is rows)
    for n in (3, 5, 4, 6, 5):
        x = torch.linspace(-1, 1, 4 * n, dtype=torch.float64).reshape(n, 4)
        assert float((run(x, n) - model(x, n)).detach().norm()) < 1e-12


@pytest.mark.parametrize("inside", ["cond", "map"])
def test_loops_in_the_graphs_of_other_operators_are_whole(inside: str) -> None:
    from torch._higher_order_ops.map import map as mapped

    def branch(x: Tensor, n: int) -> Tensor:
        if inside == "map":
            return mapped(lambda row: counted(row[None], n)[0], x)  # type: ignore[misc]
        return torch.cond(x.sum() > -1e9, lambda x: counted(x, n), lambda x: 2 * counted(x, n), (x,))

    run, _ = compiled(branch, fullgraph=False)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    with torch.no_grad():
        assert max(float((run(x, n) - branch(x, n)).norm()) for n in (20, 14, 5)) < 1e-12


def test_a_loop_that_a_loop_repeats_is_part_of_its_body() -> None:
    def nested(x: Tensor, n: int) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            y = 0 * x
            for _ in range(n):
                y = torch.tanh(LAYER(y) + 0.5 * z)
            z = torch.tanh(y + x)
        return z

    run, report = compiled(nested)
    assert max(error(run, nested, n) for n in (3, 4, 5)) < 1e-4
    assert [r.kind for r in report.regions] == ["loop of 30"] * 3


def test_a_loop_that_one_with_a_test_repeats_is_part_of_its_body() -> None:
    def nested(x: Tensor, n: int) -> Tensor:
        z, gap = torch.zeros_like(x), torch.ones((), dtype=x.dtype)
        while gap > 1e-9:
            y = 0 * x
            for _ in range(n):
                y = torch.tanh(LAYER(y) + 0.5 * z)
            new = torch.tanh(y + x)
            gap, z = (new - z).norm(), new
        return z

    run, report = compiled(nested)
    assert max(error(run, nested, n) for n in (3, 4, 5)) < 1e-4
    assert [r.kind for r in report.regions] == ["loop until a test"] * 3


def test_a_loop_in_each_of_some_layers_is_one_of_its_own() -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2)).double()
    for layer in layers:
        torch.nn.init.orthogonal_(layer.weight, gain=0.5)  # type: ignore[arg-type]

    def stacked(x: Tensor, n: int) -> Tensor:
        for layer in layers:
            z = torch.zeros_like(x)
            for _ in range(n):
                z = torch.tanh(layer(z) + x)
            x = z
        return x + 0 * LAYER(x)

    run, report = compiled(stacked)
    assert max(error(run, stacked, n) for n in (20, 30, 40)) < 1e-4
    assert [r.kind for r in report.regions] == ["loop of 20", "loop of 20", "loop of n", "loop of n"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_checkpoint_around_a_loop_that_is_kept_counts_the_same_in_each_call(inner: str) -> None:
    def saved(x: Tensor, n: int) -> Tensor:
        return checkpoint(counted, x, n, use_reentrant=False) + 0  # type: ignore[no-any-return]

    run, _ = compiled(saved, inner=inner)
    assert max(error(run, saved, n) for n in (20, 25, 4, 5, 9, 4, 5)) < 1e-4


def test_inference_mode_within_the_function_records_no_gradients() -> None:
    def inferred(x: Tensor, n: int) -> Tensor:
        with torch.inference_mode():
            z = counted(x.detach(), n)
        return x + z.clone()

    run, _ = compiled(inferred)
    assert max(error(run, inferred, n) for n in (20, 8, 8, 7, 7, 9, 9)) < 1e-4


@pytest.mark.parametrize("options", [{"verify": "never"}, {"semantics": "equilibrium"}], ids=str)
def test_a_count_below_min_repeats_is_meant_as_it_is_written(options: dict[str, str]) -> None:
    run, report = compiled(counted, **options)
    assert max(error(run, counted, n) for n in (20, 25)) < 1e-4
    assert max(error(run, counted, n) for n in (4, 6, 5)) < 1e-12
    assert [r.kind for r in report.regions] == ["loop of 20", "loop of n"]


def test_a_body_that_becomes_slow_is_seen_at_the_count_that_shows_it() -> None:
    """The counts alternate, and the calls that are to be compared all have the shorter one, at which the loop is kept anyway."""
    layer = torch.nn.Linear(4, 4).double()
    torch.nn.init.orthogonal_(layer.weight, gain=0.3)
    wide = layer.weight.detach().clone()

    def slows(x: Tensor, n: int) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(n):
            z = torch.tanh(layer(z) + x)
        return z

    run, _ = compiled(slows, verify="periodic")
    x, worst = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4), 0.0
    for call in range(160):
        with torch.no_grad():
            layer.weight.copy_(wide * (1 + min(call, 80) / 80 * 2.2))
            n = (30, 7)[call % 2]
            found, wanted = run(x, n), slows(x, n)
        late = call > 130  # one of the calls that compare is past, and the next that has the longer count
        worst = max(worst, float((found - wanted).norm() / wanted.norm()) if late else 0.0)
    assert worst < 2e-3


def test_threads_have_their_own_counts() -> None:
    run, _ = compiled(counted)
    for n in (20, 25, 8, 30, 60):
        both(run, n)
    wanted = {n: both(counted, n) for n in (5, 8, 25, 60)}
    worst: list[float] = []

    def work(counts: tuple[int, int]) -> None:
        for call in range(40):
            n = counts[call % 2]
            worst.append(apart(both(run, n), wanted[n]))

    threads = [threading.Thread(target=work, args=(counts,)) for counts in ((5, 8), (25, 60))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 80
    assert max(worst) < 1e-4


def set_before(x: Tensor) -> Tensor:
    z, last = torch.zeros_like(x), x
    for _ in range(int(torch.randint(0, 4, ()))):
        z = torch.tanh(LAYER(z) + x)
        last = z
    return last


def flagged(x: Tensor) -> Tensor:
    z, any_ = torch.zeros_like(x), False
    for _ in range(int(torch.randint(0, 4, ()))):
        z, any_ = torch.tanh(LAYER(z) + x), True
    return z + 1 if any_ else z - 5


def negative(x: Tensor) -> Tensor:
    z, made = torch.zeros_like(x), 3
    for _ in range(int(torch.randint(-5, 4, ()))):
        z = torch.tanh(LAYER(z) + x)
        made += 2
    return z + made


@pytest.mark.parametrize("model", [set_before, flagged, negative])
def test_a_loop_of_no_iterations_leaves_what_was_there(model: Model) -> None:
    run, _ = compiled(model, fullgraph=False)
    assert max(apart(seeded(run, k), seeded(model, k)) for k in range(12)) < 1e-12


@pytest.mark.parametrize("count", [torch.tensor, np.int64, bool], ids=["tensor", "numpy", "bool"])
def test_counts_of_other_kinds(count: Callable[[int], Any]) -> None:
    run, report = compiled(counted, fullgraph=False)
    assert max(error(run, counted, count(n)) for n in (0, 20, 30, 1)) < 1e-4
    assert Reason.UNEXPECTED not in {s.reason for s in report.skipped}
