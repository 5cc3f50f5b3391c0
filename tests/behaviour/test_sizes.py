"""A body is compiled for its first sizes, and once more for all others; what was assumed meanwhile is asked of each new call."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deq_compile.region import shapes
from deq_compile.region.body import BodySpec, EagerRunner, Runner
from deq_compile.region.compiled import CompiledRunner
from deq_compile.region.dynamic import SymbolicProgram
from deq_compile.region.layout import Layout
from deq_compile.region.modes import Ambient
from deq_compile.region.program import Program
from deq_compile.region.runners import MAX_COMPILED_SHAPES, MAX_SHAPES, runner_for
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.loops import CASES

Body = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """Those that were compiled for gradients, in order."""
    shapes.clear()
    found: list[Program] = []
    original = Program._compile_joint

    def count(self: Program, *args: Any) -> Any:
        found.append(self)
        return original(self, *args)

    monkeypatch.setattr(Program, "_compile_joint", count)
    yield found
    shapes.clear()


class Cell(nn.Module):
    """A layer's fixed point on (B, 8), or on (B, T, 8) with T mixed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.lin, self.norm = kind, nn.Linear(8, 8), nn.LayerNorm(8)
        nn.init.orthogonal_(self.lin.weight, gain=0.4)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        if self.kind == "attention":
            q = self.lin(z)[:, None]
            return self.norm(0.3 * F.scaled_dot_product_attention(q, q, q)[:, 0] + x)
        if self.kind == "reshaped":
            rows = z.reshape(x.shape[0] * x.shape[1], 8)
            return torch.tanh(self.lin(rows)).reshape(x.shape) + x
        return torch.tanh(self.lin(z) + x)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = self.f(z, x)
        return z


def gradients(run: Callable[[Tensor], Tensor], cell: Cell, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    return [out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), [x, cell.lin.weight])]


def sizes_of(kind: str) -> list[tuple[int, ...]]:
    rng = random.Random(0)
    if kind == "batches":
        return [(b, 8) for b in rng.sample(range(2, 400), 300)]
    return [(rng.randint(2, 12), t, 8) for t in rng.sample(range(2, 120), 50)]


@pytest.mark.parametrize(("kind", "dynamic"), [("batches", None), ("attention", None), ("reshaped", True)])
def test_three_hundred_batches_and_fifty_lengths(kind: str, dynamic: bool | None, programs: list[Program]) -> None:
    """At most three compilations of a body; values and gradients are those of the loop."""
    cell = Cell(kind)
    run, report = compiled(cell, dynamic=dynamic, inner="aot_eager")
    for i, shape in enumerate(sizes_of(kind)):
        x = torch.randn(shape)
        found = gradients(run, cell, x)
        if i % 12 < 2:
            for own, right in zip(found, gradients(cell, cell, x), strict=True):
                assert (own - right).norm() <= 1e-4 * right.norm()
    assert 1 <= len(programs) <= 2
    assert isinstance(programs[-1], SymbolicProgram)
    assert {region.status for region in report.regions} == {"solve"}


@pytest.mark.parametrize("name", ["two_states"])
def test_models_that_save_views(name: str, programs: list[Program]) -> None:
    """What the body saves for its products may be a part of a larger tensor; that is no reason to compile each size."""
    model, x = CASES[name].make()
    run, _ = compiled(model, inner="aot_eager")
    for count in (2, 4, 5, 3):
        inputs = x[:1].expand(count, *x.shape[1:]) + 0.1 * torch.randn(count, *x.shape[1:])
        assert largest_error(value_and_grads(run, model, inputs), reference(model, inputs)) < 2e-3
    assert len(programs) == 2


# ---- what may be assumed, on runners alone


def make(call: Body, name: str = "sizes", inner: str = "aot_eager") -> BodySpec:
    return BodySpec(call, name, Ambient.now(), inner)


def runner(spec: BodySpec, shape: Sequence[int], operands: Sequence[Tensor], rows: bool = True) -> Runner:
    layout = Layout((tuple(shape),), (torch.float32,), (tuple(range(len(shape))),), rows)
    return runner_for(spec, layout, operands, ())


def check(spec: BodySpec, shape: Sequence[int], operands: list[Tensor], rows: bool = True) -> Runner:
    """Value and products are autograd's."""
    found = runner(spec, shape, operands, rows)
    eager = EagerRunner(spec, Layout((tuple(shape),), (torch.float32,), (tuple(range(len(shape))),), rows), ())
    z = torch.randn(shape[0], int(torch.tensor(shape[1:]).prod())) if rows else torch.randn(1, int(torch.tensor(shape).prod()))
    w, needs = torch.randn_like(z), (True,) * len(operands)
    torch.testing.assert_close(found.apply(z, operands), eager.apply(z, operands))
    (jw, grads), (right, expected) = (r.linearise(z, operands, needs).vjp_full(w) for r in (found, eager))
    torch.testing.assert_close(jw, right, rtol=1e-4, atol=1e-5)
    for own, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other, rtol=1e-4, atol=1e-4)
    return found


def general(found: Runner) -> bool:
    return isinstance(found, CompiledRunner) and found.program.general


def affine(z: Tensor, a: Tensor) -> tuple[Tensor]:
    return (torch.tanh(z * 0.5 + a),)


def test_the_second_size_compiles_for_all() -> None:
    spec = make(affine)
    assert not general(check(spec, (5, 3), [torch.randn(5, 3)]))
    second = check(spec, (7, 3), [torch.randn(7, 3)])
    assert general(second)
    third = check(spec, (9, 3), [torch.randn(9, 3)])
    assert isinstance(third, CompiledRunner)
    assert isinstance(second, CompiledRunner)
    assert third.program is second.program
    assert spec.shapes.compiled == 2
    assert runner(spec, (5, 3), [torch.randn(5, 3)]).owns_code  # the first is still there


def test_a_batch_of_one_is_not_taken_for_any() -> None:
    """It broadcasts where another does not."""

    def call(z: Tensor, a: Tensor) -> tuple[Tensor]:
        return (torch.tanh(z * 0.5 + a.sum(0, keepdim=True).expand_as(z)),)

    spec = make(call)
    kinds = [general(check(spec, (batch, 3), [torch.randn(batch, 3)])) for batch in (4, 6, 1, 5, 1)]
    assert kinds == [False, True, False, True, False]
    kinds = [general(check(make(affine, "one"), (4, 3), [torch.randn(n, 3)])) for n in (4, 1, 4)]
    assert kinds == [False, False, False]


def test_sizes_that_were_equal_by_chance() -> None:
    """Batch and length are one number at the second call, and two at the third."""

    def call(z: Tensor, a: Tensor) -> tuple[Tensor]:
        return (torch.tanh(z @ a),)

    spec = make(call)
    for batch, width in ((3, 4), (6, 6), (5, 7), (8, 8), (2, 9)):
        check(spec, (batch, width), [torch.randn(width, width) * 0.1])
    assert spec.shapes.compiled == 2


def test_a_body_that_asks_for_its_size_is_compiled_for_the_answers() -> None:
    """Each answer is a program; all values are right."""

    def call(z: Tensor, a: Tensor) -> tuple[Tensor]:
        return (torch.tanh(z * (0.5 if z.shape[0] > 10 else 0.25) + a),)

    spec = make(call)
    for batch in (4, 6, 20, 9, 31, 5, 12):
        check(spec, (batch, 3), [torch.randn(batch, 3)])
    assert spec.shapes.compiled == 3


def test_guards_that_come_with_the_gradient() -> None:
    """Runners that were bound before the products were compiled ask again, and get a program of their own."""

    class Choosy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z * 0.5

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * (0.5 if g.shape[0] < 10 else 0.25)  # a wrong gradient, and not the same for all

    def call(z: Tensor, a: Tensor) -> tuple[Tensor]:
        return (torch.tanh(Choosy.apply(z) + a),)

    spec = make(call)
    operands = {batch: [torch.randn(batch, 3)] for batch in (3, 6, 20)}
    for batch, own in operands.items():
        runner(spec, (batch, 3), own).apply(torch.randn(batch, 3), own)
    assert spec.shapes.compiled == 2
    for batch, own in operands.items():
        check(spec, (batch, 3), own)
    assert spec.shapes.compiled == 3


def test_operands_that_lie_otherwise() -> None:
    """Transposed, broadcast or cut out of a larger tensor: each is read where it lies."""

    def call(z: Tensor, a: Tensor) -> tuple[Tensor]:
        return (torch.tanh(z * 0.5 + a),)

    spec = make(call)
    ways: list[Callable[[int, int], Tensor]] = [
        lambda b, d: torch.randn(b, d),
        lambda b, d: torch.randn(d, b).T,
        lambda b, d: torch.randn(d).expand(b, d),
        lambda b, d: torch.randn(b, 2 * d)[:, ::2],
    ]
    for batch, width in ((4, 3), (6, 5), (7, 9), (2, 11)):
        for way in ways:
            check(spec, (batch, width), [way(batch, width)])
    assert spec.shapes.compiled <= MAX_COMPILED_SHAPES


def test_images_in_channels_last_order() -> None:
    weight = torch.randn(3, 3, 3, 3) * 0.1

    def call(z: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor]:
        return (torch.tanh(F.conv2d(z, w, padding=1) + x),)

    spec = make(call)
    for batch, side in ((2, 5), (3, 6), (4, 9), (2, 4)):
        layout = Layout(((batch, 3, side, side),), (torch.float32,), ((0, 2, 3, 1),), True)
        operands = [weight, torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)]
        found, eager = runner_for(spec, layout, operands, ()), EagerRunner(spec, layout, ())
        z = torch.randn(batch, layout.width)
        torch.testing.assert_close(found.apply(z, operands), eager.apply(z, operands))
        a, b = (r.linearise(z, operands, (True, True)).vjp_full(z)[1] for r in (found, eager))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert spec.shapes.compiled == 2


def test_a_body_that_takes_no_symbols_is_compiled_size_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a number; then it runs in eager mode."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no symbols here")

    monkeypatch.setattr(SymbolicProgram, "trace", refuse)
    spec = make(affine)
    runners = [check(spec, (batch, 3), [torch.randn(batch, 3)]) for batch in range(2, MAX_COMPILED_SHAPES + 5)]
    kinds = [isinstance(found, EagerRunner) for found in runners]
    assert kinds == [False] * (MAX_COMPILED_SHAPES - 1) + [True] * (len(kinds) - MAX_COMPILED_SHAPES + 1)
    assert not any(general(found) for found in runners)


def test_what_was_compiled_for_one_size_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make(affine)
    first = runner(spec, (2, 3), [torch.randn(2, 3)])
    for batch in range(3, MAX_SHAPES + 20):
        runner(spec, (batch, 3), [torch.randn(batch, 3)])
    assert len(spec.shapes.runners) == MAX_SHAPES
    assert runner(spec, (2, 3), [torch.randn(2, 3)]) is first


def test_one_coupled_system_of_many_sizes() -> None:
    """The flat state is one row, whose length is a product of sizes."""

    def call(z: Tensor, a: Tensor) -> tuple[Tensor]:
        return (torch.tanh(z - z.mean(0, keepdim=True) + a) * 0.5,)

    spec = make(call)
    for shape in ((4, 3), (6, 5), (7, 4), (9, 9)):
        check(spec, shape, [torch.randn(shape)], rows=False)
    assert spec.shapes.compiled == 2
