"""`fixed_point(return_info=True)`: what the solve came to, sample by sample; and states of many shapes."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from deq_compile import SolveInfo, fixed_point

torch.manual_seed(0)
Q = torch.linalg.qr(torch.randn(8, 8))[0]


class Model(nn.Module):
    """tanh(a z Q + x), whose rows converge after different numbers of steps: a is 0.9 in some and 0.1 in others."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("a", torch.tensor([[0.9], [0.1], [0.5]]))

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.a * (z @ Q) + x)

    def forward(self, x: Tensor) -> Any:
        return fixed_point(lambda z: self.f(z, x), torch.zeros_like(x), return_info=True, **self.options)


def call_of(model: nn.Module, compiled: bool) -> Any:
    options = {"inner": "aot_eager"}
    return torch.compile(model, backend="deq", fullgraph=True, options=options) if compiled else model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_each_sample_has_its_residual_iterations_and_verdict(compiled: bool) -> None:
    model, x = Model(tol=1e-5), torch.randn(3, 8)
    z, info = call_of(model, compiled)(x)
    assert isinstance(info, SolveInfo)
    assert info.converged.tolist() == [True] * 3
    assert info.converged.dtype == torch.bool
    assert info.iterations[0] > info.iterations[1] >= 2
    left = torch.linalg.vector_norm(model.f(z, x) - z, dim=1) / torch.linalg.vector_norm(model.f(z, x), dim=1)
    torch.testing.assert_close(info.residual, left, rtol=1e-2, atol=1e-7)
    assert (info.residual <= 1e-5).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sample_that_missed_says_so(compiled: bool) -> None:
    model, x = Model(tol=1e-4, max_iter=5), torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, info = call_of(model, compiled)(x)
    assert info.converged.tolist() == [False, True, False]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_gradient_is_the_same_with_and_without(compiled: bool) -> None:
    x = torch.randn(3, 8)
    found = []
    for return_info in (False, True):
        model = Model(tol=1e-6, backward_tol=1e-6)
        given = x.clone().requires_grad_()

        def run(x: Tensor, model: Model = model, return_info: bool = return_info) -> Any:
            return fixed_point(lambda z: model.f(z, x), torch.zeros_like(x), return_info=return_info, **model.options)

        call = torch.compile(run, backend="deq", fullgraph=True, options={"inner": "aot_eager"}) if compiled else run
        out = call(given)
        (out[0] if return_info else out).square().sum().backward()
        found.append(given.grad)
        if return_info:
            assert not any(part.requires_grad for part in out[1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_one_coupled_system_has_one_answer_for_all_rows() -> None:
    x = torch.randn(3, 8)
    z, info = fixed_point(lambda z: torch.tanh(0.5 * (z @ Q) + z.mean(0) * 0.1 + x), torch.zeros(3, 8), return_info=True)
    assert z.shape == (3, 8)
    assert info.residual.shape == (3,)
    assert len(set(info.residual.tolist())) == 1
    scalar, info = fixed_point(lambda z: torch.cos(z), torch.tensor(0.5), return_info=True)
    assert info.converged.tolist() == [True]
    torch.testing.assert_close(scalar, torch.cos(scalar), rtol=1e-3, atol=1e-3)


@dataclasses.dataclass
class Pair:
    u: Tensor
    more: dict[str, Tensor]


class Named(NamedTuple):
    pair: Pair
    w: tuple[Tensor, ...]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_structure_goes_in_and_comes_out(compiled: bool) -> None:
    """Dataclasses that nobody registered, dicts, named tuples, one within the other."""
    x = torch.randn(3, 8)

    def f(state: Named) -> Named:
        u, v, w = state.pair.u, state.pair.more["v"], state.w[0]
        return Named(Pair(torch.tanh(0.3 * (v @ Q) + x), {"v": torch.tanh(0.3 * (w @ Q) + x)}), (torch.tanh(0.3 * u),))

    def run(x: Tensor) -> Any:
        zero = torch.zeros_like(x)
        return fixed_point(f, Named(Pair(zero, {"v": zero.clone()}), (zero.clone(),)), return_info=True, tol=1e-6)

    call = torch.compile(run, backend="deq", options={"inner": "aot_eager"}) if compiled else run
    found, info = call(x)
    assert isinstance(found, Named)
    assert isinstance(found.pair, Pair)
    assert info.converged.all()
    again = f(found)
    for ours, theirs in ((found.pair.u, again.pair.u), (found.pair.more["v"], again.pair.more["v"]), (found.w[0], again.w[0])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_flag_that_is_none() -> None:
    with pytest.raises(TypeError, match="expected return_info to be True or False, got 'yes'"):
        fixed_point(torch.cos, torch.zeros(1), return_info="yes")  # type: ignore[call-overload]
