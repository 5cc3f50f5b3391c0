"""Every form of loop, end to end: found or refused as expected, and right against float64 backprop through the loop."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from deq_compile import Reason, record_solves
from tests.helpers import compiled, largest_error, reference, tensor_of, value_and_grads
from tests.models.loops import CASES, IMAGE
from tests.models.parts import Block, Case, ConvNorm, Loop

SOLVED = [name for name, case in CASES.items() if case.regions]
LEFT = [name for name, case in CASES.items() if not case.regions]
# Rounded to bf16 in every iteration (unit round-off 8e-3), against a loop that rounds elsewhere.
ROUNDED = {"autocast": 3e-2, "autocast_inside": 3e-2}


@pytest.mark.parametrize("name", SOLVED)
def test_solved(name: str) -> None:
    case = CASES[name]
    model, x = case.make()
    run, report = compiled(model)
    if name == "in_place_state":  # eager autograd refuses this loop, so there is no gradient to compare with
        with torch.no_grad(), record_solves() as solves:
            found, expected = [run(x).double()], [copy.deepcopy(model).double()(x.double())]
    else:
        with record_solves() as solves:
            found = value_and_grads(run, model, x)
        expected = value_and_grads(model, model, x) if name in ROUNDED else reference(model, x)
    assert [r.status for r in report.regions] == ["solve"] * case.regions, str(report)
    assert len(solves) == case.regions
    assert largest_error(found, expected) < ROUNDED.get(name, 2e-3)


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    case = CASES[name]
    model, x = case.make()
    run, report = compiled(model)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    found = value_and_grads(run, model, x)
    model.load_state_dict(state)
    torch.manual_seed(1)
    expected = value_and_grads(model, model, x)
    assert report.regions == []
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    (skipped,) = report.skipped
    assert skipped.reason is case.refused
    assert Path(skipped.location.file).parent.name == "models"
    assert skipped.location.line > 0


def test_nothing_to_find() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    run, report = compiled(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert (report.graphs, report.regions, report.skipped) == (1, [], [])


def test_channels_last() -> None:
    model, x = Case(lambda: Loop(ConvNorm()), 1, shape=IMAGE).make()
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert len(report.regions) == 1
    assert largest_error(found, reference(model, x)) < 2e-3
    assert run(x).stride() == model(x).stride()


class Expanded(Loop):
    """An initial state that is no dense tensor, and a permuted one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros(1, x.shape[1]).to(x).expand(x.shape[0], x.shape[1])
        for _ in range(self.n):
            z = self.f(z, x)
        return z.view(-1)


class Permuted(Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(x).t()
        for _ in range(self.n):
            z = self.f(z.t(), x).t()
        return z.t().view(-1)


@pytest.mark.parametrize("form", [Expanded, Permuted])
def test_odd_strides(form: type[Loop]) -> None:
    model, x = Case(lambda: form(CASES["linear"].build().f), 1).make()
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert [r.status for r in report.regions] == ["solve"]
    assert largest_error(found, reference(model, x)) < 2e-3


class Reshaping(Loop):
    """The body needs the sizes themselves: reshape(B * T, D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, d = x.shape
        z = torch.zeros_like(x)
        for _ in range(self.n):
            z = self.f(z.reshape(B * T, d), x.reshape(B * T, d)).reshape(B, T, d)
        return z


def test_sizes_in_the_body() -> None:
    model, _ = Case(lambda: Reshaping(CASES["linear"].build().f), 1).make()
    run, report = compiled(model, dynamic=True)
    for batch, length in ((3, 4), (5, 2)):
        x = torch.randn(batch, length, 16)
        assert largest_error(value_and_grads(run, model, x), reference(model, x)) < 2e-3
    assert len(report.regions) == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes(dynamic: bool | None) -> None:
    model, _ = CASES["linear"].make()
    run, report = compiled(model, dynamic=dynamic)
    for batch in (3, 5, 1, 0, 2):
        x = torch.randn(batch, 16)
        found = value_and_grads(run, model, x)
        assert largest_error(found, reference(model, x)) < 2e-3, batch
        assert found[0].shape == (batch, 16)
    assert report.regions
    assert all(r.status in ("solve", "pending") for r in report.regions)


class Coupled(torch.nn.Module):
    """A graph net: rows are nodes, and they read each other."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.n = torch.nn.Linear(8, 8), 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adjacency = torch.roll(torch.eye(x.shape[0], dtype=x.dtype), 1, 0)
        z = torch.zeros_like(x)
        for _ in range(self.n):
            z = torch.tanh(adjacency @ self.lin(z) + x)
        return z


def test_a_state_without_batch_is_one_system() -> None:
    model, x = Case(Coupled, 1, shape=(6, 8)).make()
    run, _ = compiled(model)
    with record_solves(tensors=True) as solves:
        found = value_and_grads(run, model, x)
    assert largest_error(found, reference(model, x)) < 2e-3
    assert solves[0].z is not None
    assert solves[0].z.shape == (1, 48)


def test_rows_are_a_batch() -> None:
    model, x = CASES["linear"].make()
    run, _ = compiled(model)
    with record_solves(tensors=True) as solves:
        run(x).sum().backward()
    assert solves[0].z is not None
    assert solves[0].z.shape == (4, 16)


def test_no_grad_solve_keeps_the_attached_gradient() -> None:
    """The Jacobian-free gradient of one attached step stays what it is."""
    model, x = CASES["no_grad_attached"].make()
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert report.regions[0].backward == "-"
    assert largest_error(found, reference(model, x)) < 1e-5


def test_dropout_in_eval_is_a_region() -> None:
    model, x = CASES["dropout"].make()
    model.eval()
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert len(report.regions) == 1
    assert largest_error(found, reference(model, x)) < 2e-3


def test_batch_norm_in_eval_is_a_region() -> None:
    model, x = CASES["batch_norm"].make()
    model.eval()
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert len(report.regions) == 1
    assert largest_error(found, reference(model, x)) < 2e-3


def test_attention_with_dropout_is_refused() -> None:
    class Noisy(Block):
        def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            y = z + x
            return 0.3 * torch.nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.1)

    run, report = compiled(Loop(Noisy(), 10))
    run(torch.randn(2, 5, 32))
    assert [s.reason for s in report.skipped] == [Reason.RANDOM]


def test_outputs_do_not_alias_inputs() -> None:
    model, x = CASES["starts_at_input"].make()
    run, _ = compiled(model)
    with torch.no_grad():
        before = x.clone()
        out = tensor_of(run(x))
        out.add_(1.0)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
