"""A loop whose count is an input is one region, whatever the count of a call is; what is not so is told, and runs as written."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import Reason, Report
from deq_compile.region.site import site
from tests.helpers import compiled

torch.manual_seed(0)
LAYER = nn.Linear(4, 4).double()
nn.init.orthogonal_(LAYER.weight, gain=0.5)
Model = Callable[..., Tensor]


def counted(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
    return z


def one_more(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(1, n + 2):
        z = torch.tanh(LAYER(z) + x)
    return z


def last_two(x: Tensor, n: int) -> Tensor:
    z = before = torch.zeros_like(x)
    for _ in range(n):
        before, z = z, torch.tanh(LAYER(z) + x)
    return z + (z - before)


def counts_itself(x: Tensor, n: int) -> Tensor:
    z, made = torch.zeros_like(x), 3
    for k in range(n):  # noqa: B007
        z = torch.tanh(LAYER(z) + x)
        made += 2
    return z * (k + made)


def in_the_body(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) / n + x)
    return z


class Steps(nn.Module):
    """The count is an attribute of a module inside of another."""

    def __init__(self, inner: Steps | None = None) -> None:
        super().__init__()
        self.n, self.inner, self.layer = 0, inner, LAYER

    def forward(self, x: Tensor) -> Tensor:
        if self.inner is not None:
            return 2 * self.inner(x)
        z = torch.zeros_like(x)
        for _ in range(self.n):
            z = torch.tanh(self.layer(z) + x)
        return z


def two_loops(x: Tensor, n: int, m: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
    y = torch.zeros_like(x)
    for _ in range(m):
        y = torch.sin(LAYER(y) + z)
    return y


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(run: Model, *counts: Any) -> list[Tensor]:
    """Value, and the gradients of the input and of the parameters."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    out = run(x, *counts) + 0 * x  # a loop of no iterations has no gradient
    grads = torch.autograd.grad((out * x.detach().cos()).sum(), [x, *LAYER.parameters()], allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True))


def error(run: Model, model: Model, *counts: Any) -> float:
    return apart(both(run, *counts), both(model, *counts))


@pytest.mark.parametrize("model", [counted, one_more, last_two, counts_itself, in_the_body])
def test_from_the_second_value_on_one_region_serves_all_counts(model: Model) -> None:
    run, report = compiled(model)
    assert max(error(run, model, n) for n in (22, 25, 40, 33, 24, 60)) < 1e-4
    assert [r.kind for r in report.regions][1:] == ["loop of n"]
    assert report.regions[-1].iterations is None
    assert not report.skipped
    assert report.graphs == 2


def test_dynamic_from_the_first_call_on_there_is_one_region() -> None:
    run, report = compiled(counted, dynamic=True, inner="aot_eager")
    assert max(error(run, counted, n) for n in (22, 25, 40)) < 1e-4
    (region,) = report.regions
    assert [found.compiled for found in (site(region.key).spec.body.shapes,)] == [1]


def test_what_one_count_has_shown_is_not_taken_for_another() -> None:
    """The loop of 30 ends at the fixed point; that of 8 has not converged, and gives its own iterates and their gradient."""
    run, report = compiled(counted)
    for n in (31, 30, 45):
        assert error(run, counted, n) < 1e-4
    for n in (8, 3, 1, 0, 7, 4, 8):
        assert error(run, counted, n) < 1e-12
    assert error(run, counted, 30) < 1e-4
    assert report.regions[1].counts == "solved from 30 to 45 iterations, kept up to 8"
    assert "counts      " in str(report)


def test_between_counts_that_agreed_nothing_is_compared() -> None:
    run, report = compiled(counted, verify="periodic")
    for n in (29, 30, 50):
        run(torch.ones(2, 4, dtype=torch.float64), n)
    region = site(report.regions[1].key)
    compared = region.compared_at
    region.calls = 129  # none of those at which every region is compared
    run(torch.ones(2, 4, dtype=torch.float64), 40)
    assert region.compared_at == compared
    run(torch.ones(2, 4, dtype=torch.float64), 51)
    assert region.compared_at == 130


def test_two_forwards_before_their_backwards_keep_their_counts() -> None:
    run, _ = compiled(counted)
    run(torch.ones(2, 4, dtype=torch.float64), 30)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    short, long = run(x, 4), run(x, 40)  # the first is kept, the second is solved
    found = [torch.autograd.grad(z.sum(), LAYER.weight, retain_graph=True)[0] for z in (short, long, short)]
    wanted = [torch.autograd.grad(counted(x, n).sum(), LAYER.weight)[0] for n in (4, 40, 4)]
    assert apart(found[::2], wanted[::2]) < 1e-12
    assert apart(found[1:2], wanted[1:2]) < 1e-4


def test_each_of_two_loops_has_its_count() -> None:
    run, report = compiled(two_loops)
    calls = [(20, 20), (20, 25), (30, 26), (31, 50), (24, 31)]
    assert max(error(run, two_loops, *counts) for counts in calls) < 1e-4
    assert [r.kind for r in report.regions][-2:] == ["loop of n", "loop of n"]
    assert len(report.regions) == 6  # both known, one of them open, both open


@pytest.mark.parametrize("deep", [False, True])
def test_an_attribute_of_a_module_is_a_count_like_any_other(deep: bool) -> None:
    inner = Steps()
    model = Steps(inner) if deep else inner
    run, report = compiled(model, fullgraph=False)
    for n in (20, 25, 40, 33, 24, 60, 21, 22, 23, 26, 27):  # more than are compiled anew
        inner.n = n
        assert error(run, model) < 1e-4
    assert [r.kind for r in report.regions] == ["loop of 20", "loop of n"]


# ---- counts that are drawn where the loop is


def by_python(x: Tensor, low: int = 20, high: int = 60) -> Tensor:
    return counted_inline(x, random.randint(low, high))


def counted_inline(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
    return z


def by_torch(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(torch.randint(20, 60, ()).item()):
        z = torch.tanh(LAYER(z) + x)
    return z


def named(x: Tensor) -> Tensor:
    n = int(torch.randint(20, 60, (1,)))
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
    return z


def as_a_tensor(x: Tensor) -> Tensor:
    n = torch.poisson(torch.tensor(30.0)).clamp(min=20).long()
    z = torch.zeros_like(x)
    for _ in range(n):  # type: ignore[call-overload]
        z = torch.tanh(LAYER(z) + x)
    return z


def asked_again(x: Tensor) -> Tensor:
    n = torch.randint(20, 60, ()).item()
    z = torch.zeros_like(x)
    for _ in range(n):  # type: ignore[arg-type]
        z = torch.tanh(LAYER(z) + x)
    return 2 * z if n > 30 else z


def seeded(run: Model, seed: int) -> list[Tensor]:
    random.seed(seed)
    torch.manual_seed(seed)
    return both(run)


@pytest.mark.parametrize("model", [by_python, by_torch, named, as_a_tensor])
def test_a_count_that_is_drawn_makes_one_graph_and_one_region(model: Model) -> None:
    run, report = compiled(model)  # in one graph, which the user asks for
    assert max(apart(seeded(run, k), seeded(model, k)) for k in range(6)) < 1e-4
    assert [r.kind for r in report.regions] == ["loop of n"]
    assert report.graphs == 1
    assert not report.skipped


def test_a_drawn_count_that_is_asked_for_elsewhere_is_pythons() -> None:
    run, report = compiled(asked_again, fullgraph=False)
    assert max(apart(seeded(run, k), seeded(asked_again, k)) for k in range(6)) < 1e-4
    assert Reason.VARYING in {s.reason for s in report.skipped}


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_drawn_counts_may_be_zero(inner: str) -> None:
    run, report = compiled(lambda x: by_python(x, 0, 3), inner=inner)
    assert max(apart(seeded(run, k), seeded(lambda x: by_python(x, 0, 3), k)) for k in range(8)) < 1e-12
    assert [r.kind for r in report.regions] == ["loop of n"]


def none_or_some(x: Tensor) -> Tensor:
    z, made, k = torch.zeros_like(x), 5, 7
    for k in range(random.randint(0, 3)):  # noqa: B007
        z = torch.tanh(LAYER(z) + x)
        made += 2
    return z + 10 * made + k


def counts_none(x: Tensor) -> Tensor:
    z, made = torch.zeros_like(x), 5
    for _ in range(random.randint(0, 3)):
        z = torch.tanh(LAYER(z) + x)
        made += 2
    return z + 10 * made


@pytest.mark.parametrize(("model", "kinds"), [(none_or_some, []), (counts_none, ["loop of n"])])
def test_where_there_may_be_no_iteration_a_number_is_what_it_was(model: Model, kinds: list[str]) -> None:
    run, report = compiled(model, fullgraph=False)
    assert max(apart(seeded(run, k), seeded(model, k)) for k in range(8)) < 1e-12
    assert [r.kind for r in report.regions] == kinds


# ---- what is not one map, whatever the count


def by_index(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for k in range(n):
        z = torch.tanh(LAYER(z) + x) * (1 - 0.5 ** (k + 1))
    return z


def later_another(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for k in range(n):
        z = torch.tanh(LAYER(z) + x)
        if k > 15:
            z = 0.5 * z
    return z


def last_another(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for k in range(n):
        z = torch.tanh(LAYER(z) + x)
        if k == n - 1:
            z = 2 * z
    return z


def first_another(x: Tensor, n: int) -> Tensor:
    z, first = torch.zeros_like(x), True
    for _ in range(n):
        z = torch.tanh(LAYER(z + x if first else z) + x)
        first = False
    return z


def trajectory(x: Tensor, n: int) -> Tensor:
    z, states = torch.zeros_like(x), []
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
        states.append(z)
    return torch.stack(states).sum(0)


def with_a_test(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(n):
        new = torch.tanh(LAYER(z) + x)
        if (new - z).norm() < 1e-12:
            break
        z = new
    return z


def with_a_schedule(x: Tensor, n: int) -> Tensor:
    z, a = torch.zeros_like(x), 1.0
    for _ in range(n):
        z, a = (1 - a) * z + a * torch.tanh(LAYER(z) + x), max(0.5 * a, 0.25)
    return z


ELSEWISE = [by_index, later_another, last_another, first_another, trajectory, with_a_test, with_a_schedule]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it resumes in a loop
@pytest.mark.parametrize("model", ELSEWISE)
def test_a_loop_of_more_than_one_map_is_no_region_of_any_count(model: Model) -> None:
    run, report = compiled(model, fullgraph=False)
    assert max(error(run, model, n) for n in (19, 18, 26, 22, 5)) < 1e-4
    assert "loop of n" not in {r.kind for r in report.regions}
    first = inspect.getsourcelines(model)[1]
    assert {s.location.line - first for s in report.skipped if s.reason is Reason.VARYING} == {2}
    assert _every_line_is_told_once(report, Reason.VARYING)


def _every_line_is_told_once(report: Report, reason: Reason) -> bool:
    lines = [s.location.line for s in report.skipped if s.reason is reason]
    return len(lines) == len(set(lines))


def test_past_the_limit_of_recompilations_such_a_function_runs_as_written() -> None:
    run, _ = compiled(by_index, fullgraph=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        found = [error(run, by_index, n) for n in (20, 21, 22)]
    assert found[2] == 0.0


def test_a_size_that_counts_a_loop_is_not_told() -> None:
    def rows(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(x.shape[0]):
            z = torch.tanh(LAYER(z) + x)
        return z

    run, report = compiled(rows)
    for n in (20, 21, 22):
        run(torch.ones(n, 4, dtype=torch.float64))
    assert not report.skipped
