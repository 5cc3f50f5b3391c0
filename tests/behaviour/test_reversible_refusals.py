"""What `solver="reversible"` does not do, and options that contradict it: one sentence each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from deq_compile import deq_compile, explain, fixed_point
from deq_compile.option_rules import OptionError
from deq_compile.region.verdict import RegionWarning
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.reversible import B, D, Model, Product, errors, gradients, layer, leaky, pairs, steps

MISSED = "ignore:fixed-point region:deq_compile.region.verdict.RegionWarning"
pytestmark = pytest.mark.filterwarnings(MISSED)


def test_a_function_that_sees_the_state_alone() -> None:
    *given, q = leaky(0.6)
    frozen = given[0].detach()
    z = steps(lambda z: torch.tanh(Product.apply(z, frozen) + given[1]), given[2], 12)  # type: ignore[no-untyped-call]
    want = pairs(lambda z: torch.tanh(z @ frozen.T + given[1]), given[2], 6)
    assert errors(gradients(z, q, given[1:]), gradients(want, q, given[1:])) < 1e-10


def tangent() -> None:
    W, x, z0, _ = leaky(0.5)
    with forward_ad.dual_level():
        steps(layer(W, forward_ad.make_dual(x.detach(), x.detach())), z0, 4)


def twice() -> None:
    W, x, z0, q = leaky(0.5)
    (g,) = torch.autograd.grad((steps(layer(W, x), z0, 4) * q).sum(), x, create_graph=True)
    g.sum().backward()


def transformed() -> None:
    W, x, z0, _ = leaky(0.5)
    torch.func.grad(lambda x: steps(layer(W.detach(), x), z0.detach(), 4).sum())(x.detach())


def unseen() -> None:
    W, x, z0, _ = leaky(0.5)
    each = iter([x, 2 * x, 3 * x])
    steps(lambda z: torch.tanh(z @ W.T + next(each)), z0, 4)


def past() -> None:
    W, x, z0, _ = leaky(0.5)
    steps(lambda z: torch.tanh(Product.apply(z, W) + x), z0, 4)  # type: ignore[no-untyped-call]


def transforming() -> None:
    W, x, z0, _ = leaky(0.5)
    steps(lambda z: torch.tanh(torch.func.vmap(lambda row: W @ row)(z) + x), z0, 4)


def exported() -> None:
    model = deq_compile(Model("fixed_point"), solver="reversible").eval()
    try:
        torch.export.export(model, (torch.randn(B, D),), strict=False)
    finally:  # an export that fails leaves a hook on all buffers behind, by torch 2.11
        getattr(nn.modules.module, "_global_buffer_registration_hooks", {}).clear()


REFUSED: dict[Callable[[], None], str] = {
    tangent: "no forward-mode derivative",
    twice: "a double backward .* backward='exact' and derivatives=2",
    transformed: "inside of a torch.func transform is not implemented",
    past: "gives a tensor which needs a gradient to an autograd.Function",
    unseen: "with solver='reversible': f reads a tensor that it did not read when it was called first",
    transforming: "with solver='reversible': f reads a tensor .* that it makes outside of torch's functions",
    exported: "expected a solver whose result does not hang on its steps",
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself, at a first tangent
@pytest.mark.parametrize("ask", REFUSED, ids=lambda ask: ask.__name__)
def test_refused_in_a_sentence(ask: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match=REFUSED[ask]):
        ask()


@pytest.mark.parametrize("other", [{"backward": "exact"}, {"recycle": "auto"}, {"reuse": "always"}])
def test_options_that_contradict_it(other: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=r"contradict each other.*Fix: drop one of them"):
        fixed_point(torch.cos, torch.zeros(1), solver="reversible", **other)
    with pytest.raises(OptionError, match="solver='picard'"):
        fixed_point(torch.cos, torch.zeros(1), solver="picard", backward="reversible")
    with pytest.raises(ValueError, match="expected an implicit gradient for derivatives=2, got backward='reversible'"):
        fixed_point(torch.cos, torch.zeros(1), solver="reversible", derivatives=2)


def test_an_inner_decorator_replaces_it_and_the_other_way_around() -> None:
    from deq_compile import Options

    ours, others = Options(solver="reversible"), Options(backward="exact", recycle="auto")
    assert (settled := others.merge(ours).resolve()).backward == settled.solver == "reversible"
    assert (settled := ours.merge(others).resolve()).solver == "auto"
    assert settled.recycle == "auto"
    assert Options(backward="reversible").resolve(backward="jfb").solver == "reversible"


def test_several_fixed_points_are_left_to_the_loop() -> None:
    class Bistable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.5))

        def forward(self, x: Tensor) -> Tensor:
            z = torch.sin(5 * x.detach())
            for _ in range(40):
                z = torch.tanh(self.w * z + 0.01 * x)
            return z

    model, x = Bistable(), torch.linspace(-1, 1, 32).reshape(4, 8)
    run, report = compiled(model, solver="reversible", backward_tol=None)
    found = value_and_grads(run, model, x)
    assert largest_error(found, reference(model, x)) < 1e-5
    assert report.regions[0].status.startswith("kept"), str(report)
    assert "steps that may end in another one" in str(report)


def test_it_trains_and_explain_names_it() -> None:
    model, x = Model("counted"), torch.randn(B, D)
    assert "reversible" in str(explain(model, solver="reversible", inner="eager")(x))
    run = deq_compile(copy.deepcopy(model), solver="reversible", inner="eager")
    optimiser = torch.optim.SGD(run.parameters(), lr=0.5)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionWarning)
        for _ in range(6):
            loss = (run(x) - 0.3).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
