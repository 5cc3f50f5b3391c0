"""What the fuzzer found, each as small as it gets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from bench.fuzz.grammar import Recipe, source
from bench.fuzz.oracle import judge
from deq_compile.passes.find_loops import clip
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.loops import CASES
from tests.models.parts import D, Linear

BODY = Recipe(form="plain", first=("linear_tanh",), second=("linear_tanh",))


def form(name: str, **changes: object) -> str:
    return source(dataclasses.replace(BODY, form=name, **changes))  # type: ignore[arg-type]


def test_a_loop_whose_result_is_the_next_ones_operand() -> None:
    """The second region named a node of the first loop, which was gone."""
    assert judge(form("same_body_twice")).kind == "rewritten-right"


@pytest.mark.parametrize("name", ["carried_unchanged", "idempotent_state"])
def test_a_state_that_remembers_its_start_is_kept(name: str) -> None:
    """Value of the fixed point, but not its gradient: J has the eigenvalue 1, and the start matters."""
    assert judge(form(name)).kind == "kept-right"


def test_a_conserved_mean_is_kept() -> None:
    assert judge(form("conserved", count=60, initial="ones", seed=892)).kind == "kept-right"


class Repelled(nn.Module):
    """LayerNorm of 0 is 0, and its Jacobian is 1/sqrt(eps): a fixed point that the loop never leaves, and that repels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(10):
            z = 0.01 * self.norm(z)
        return z


def test_a_fixed_point_that_repels_is_kept() -> None:
    torch.manual_seed(0)
    model, x = Repelled().double(), torch.randn(3, D, dtype=torch.float64)
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert [r.status for r in report.regions] == ["kept"]
    assert "its gradient is not that of the fixed point" in str(report)
    assert largest_error(found, reference(model, x)) < 1e-9


class Unexcited(nn.Module):
    """Two modes, 0.99 and 0.1. The input excites the second only, so values agree at once, and gradients never do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.99, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            z = torch.sin(self.scale * z) + x * 1.0
        return z


def test_a_slow_mode_that_the_input_does_not_excite_is_kept() -> None:
    model, x = Unexcited().double(), torch.tensor([[0.0, 1.0], [0.0, -0.5]], dtype=torch.float64)
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert [r.status for r in report.regions] == ["kept"]
    # The value of the call that decided is the solve's, at tol=1e-6.
    assert largest_error(found, reference(model, x)) < 1e-6


def test_misses_of_the_adjoint_send_a_loop_back() -> None:
    """A backward that misses its tolerance returns the loop's own gradient; three in a row, and the loop is kept."""
    model, x = CASES["linear"].make(torch.float64)
    run, report = compiled(model, tol=1e-10, backward_tol=1e-12, backward_max_iter=2)
    expected = reference(model, x)
    for _ in range(3):
        assert [r.status for r in report.regions] in ([], ["solve"])
        assert largest_error(value_and_grads(run, model, x), expected) < 1e-8
    assert [r.status for r in report.regions] == ["kept"]
    assert "3 adjoint solves in a row missed the tolerance" in str(report)


def test_no_refinement_is_no_miss() -> None:
    """backward_max_iter=0 and backward_tol=inf ask for the approximate gradient, and get it."""
    model, x = CASES["linear"].make()
    for options in ({"backward_max_iter": 0}, {"backward_tol": float("inf")}):
        run, report = compiled(model, **options)
        for _ in range(4):
            value_and_grads(run, model, x)
        assert [r.status for r in report.regions] == ["solve"]


def test_inner_loops_of_a_short_outer_one() -> None:
    """Three outer repeats are too few for a region, and hid the inner loops."""
    verdict = judge(form("nested_long"))
    assert (verdict.kind, verdict.reasons) == ("rewritten-right", ())


@pytest.mark.parametrize("stage", ["add_part", "setitem", "setitem_inj", "empty_copy"])
@pytest.mark.parametrize("domain", ["vec", "img"])
def test_writes_into_parts_of_a_temporary(stage: str, domain: str) -> None:
    verdict = judge(source(Recipe(form="plain", domain=domain, first=(stage,))))
    assert (verdict.kind, verdict.reasons) == ("rewritten-right", ())


class WritesParts(nn.Module):
    """Writes by index, slice, mask and tensor of another dtype, with values that need gradients and that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Linear()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            y = 0.7 * self.f(z, x)
            y[:, 0] = 0.0
            y[..., 1:3] = z[..., :2].half()
            y[:, 3:5] += 0.2 * x[:, 3:5]
            y[x > 1.0] = 0.3
            y[1, -1] -= 0.5
            z = y
        return z


def test_all_kinds_of_item_assignment() -> None:
    torch.manual_seed(0)
    model, x = WritesParts(), torch.randn(4, D)
    with torch.no_grad():
        model.f.W.weight.mul_(0.5)
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert [r.status for r in report.regions] == ["solve"], str(report)
    # The cast to half rounds the gradient, in eager as well.
    assert largest_error(found, value_and_grads(model, model, x)) < 5e-3


def test_clip() -> None:
    taken = [(10, 20)]
    assert clip(0, 8, taken) == (0, 8)
    assert clip(5, 12, taken) == (5, 10)
    assert clip(18, 30, taken) == (20, 30)
    low, high = clip(12, 18, taken)
    assert high <= low
    low, high = clip(5, 30, taken)
    assert high <= low
