"""`fixed_point(f, z0)`: eager and compiled, against float64 backprop through a long loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import RegionWarning, explain, fixed_point, record_solves
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.explicit import AModule, Autocast, Closure, Coupled, Dict, Model, Named, PassedThrough, Tuple
from tests.models.parts import contract

FORMS = [Closure, Tuple, Dict, Named, PassedThrough, Autocast, Coupled, AModule]


def make(form: type[Model]) -> tuple[Model, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = form()
    contract(model)
    x = torch.randn(4, 16)
    long = copy.deepcopy(model)
    long.loop = True
    return model, x, reference(long, x)


@pytest.mark.parametrize("form", FORMS)
def test_eager(form: type[Model]) -> None:
    model, x, expected = make(form)
    with record_solves(tensors=True) as solves:
        found = value_and_grads(model, model, x)
    assert largest_error(found, expected) < 1e-4
    (solve,) = solves
    assert solve.vjps is not None
    assert solve.adjoint_residual_batch is not None
    assert solve.adjoint_residual_batch < 1e-5
    assert solve.z is not None
    assert solve.z.shape[0] == (1 if form is Coupled else 4)


@pytest.mark.parametrize("form", FORMS)
def test_compiled(form: type[Model]) -> None:
    model, x, expected = make(form)
    run, report = compiled(model, tol=None, backward_tol=None)  # those of the call hold
    assert largest_error(value_and_grads(run, model, x), expected) < 1e-4
    assert [r.kind for r in report.regions] == ["fixed_point"]
    assert report.regions[0].location.file.endswith("explicit.py")
    assert report.skipped == []


def test_its_options_beat_those_of_the_model() -> None:
    model, x, expected = make(Closure)
    run, _ = compiled(model, tol=0.3, backward_tol=0.3)
    assert largest_error(value_and_grads(run, model, x), expected) < 1e-4


def test_another_backend_breaks_its_graph() -> None:
    model, x, expected = make(Closure)
    run = torch.compile(model, backend="eager")
    assert largest_error(value_and_grads(run, model, x), expected) < 1e-4


def test_a_body_that_is_no_map_stays_outside_of_the_graph() -> None:
    """Dropout in training: no region; the call runs eagerly, and the report names it."""
    drop = nn.Dropout(0.1)

    def model(x: Tensor) -> Tensor:
        return fixed_point(lambda z: 0.3 * drop(torch.tanh(z + x)), torch.zeros_like(x), max_iter=3)

    with pytest.warns(RegionWarning):
        report = explain(model, inner="eager")(torch.randn(3, 4))
    assert report.regions == []
    assert [s.reason.name for s in report.skipped] == ["RANDOM"]
    assert report.skipped[0].location.file == __file__


def test_without_gradients() -> None:
    model, x, expected = make(Closure)
    with torch.no_grad():
        z = model(x)
    assert not z.requires_grad
    assert largest_error([z.double()], expected[:1]) < 1e-5
    z = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3))  # nothing here requires gradients
    assert not z.requires_grad
    torch.testing.assert_close(z, torch.full((3,), 2.0), rtol=1e-4, atol=0)


def test_jacobian_free() -> None:
    x, w = torch.randn(3, 4), torch.tensor(0.5, requires_grad=True)
    z = fixed_point(lambda z: torch.tanh(w * z + x), torch.zeros(3, 4), backward="jfb", tol=1e-6)
    (found,) = torch.autograd.grad(z.sum(), w)
    start = z.detach()
    (expected,) = torch.autograd.grad(torch.tanh(w * start + x).sum(), w)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "anderson"},
        {"solver": "picard"},
        {"backward": "neumann", "backward_steps": 60},
        {"backward": "phantom", "backward_steps": 60, "backward_damping": 0.8},
    ],
    ids=str,
)
def test_other_solvers_and_gradients(options: dict[str, Any]) -> None:
    """Each is near the implicit gradient where its series is long; eager and compiled agree."""
    model, x, expected = make(Closure)
    model.more = options
    assert largest_error(value_and_grads(model, model, x), expected) < 1e-4
    run, _ = compiled(model, tol=None, backward_tol=None)
    assert largest_error(value_and_grads(run, model, x), expected) < 1e-4


def test_gradcheck() -> None:
    torch.manual_seed(0)
    w = (0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(w: Tensor, x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.tanh(z @ w + x), torch.zeros_like(x), tol=1e-12, backward_tol=1e-11)

    assert torch.autograd.gradcheck(run, (w, x))


def test_a_double_backward_raises() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    z = fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros(3, 4))
    (grad,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_retain_graph() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    z = fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros(3, 4))
    (first,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(first, second)


def test_a_missed_tolerance_is_said() -> None:
    with pytest.warns(RegionWarning, match="missed tol"):
        fixed_point(lambda z: torch.cos(3 * z) + 2, torch.zeros(2, 3), max_iter=3)


@pytest.mark.parametrize(
    ("f", "z0", "error", "message"),
    [
        (lambda z: z[:1], torch.zeros(2, 3), ValueError, "keep shape, dtype and device"),
        (lambda z: z.double(), torch.zeros(2, 3), ValueError, "keep shape, dtype and device"),
        (lambda z: (z, z), torch.zeros(2, 3), ValueError, "structure"),
        (lambda z: z, torch.zeros(2, dtype=torch.long), TypeError, "floating"),
        (lambda z: z, [1.0], TypeError, "got float"),
        (lambda z: z, [], TypeError, "at least one tensor"),
    ],
)
def test_bad_input(f: Any, z0: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fixed_point(f, z0)


def test_bad_option() -> None:
    with pytest.raises(ValueError, match="did you mean 'tol'"):
        fixed_point(lambda z: z, torch.zeros(2, 3), toll=1e-3)


@pytest.mark.parametrize("mode", ["phantom", "neumann"])
def test_truncated_modes_in_eager_mode(mode: str) -> None:
    """Against autograd through three (damped) applications at the fixed point."""
    W = (0.1 * torch.randn(5, 5, dtype=torch.float64)).requires_grad_()
    x = torch.randn(3, 5, dtype=torch.float64)
    damping = 0.6 if mode == "phantom" else 1.0
    options = {"backward_damping": 0.6} if mode == "phantom" else {}
    z = fixed_point(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x), tol=1e-12, backward=mode, backward_steps=3, **options)
    (found,) = torch.autograd.grad(z.square().sum(), W)
    y = z.detach()
    for _ in range(3):
        y = damping * torch.tanh(y @ W + x) + (1 - damping) * y
    (expected,) = torch.autograd.grad(y.square().sum(), W)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # at a fixed point to 1e-12


def test_anderson_in_eager_mode_and_no_loop_to_unroll() -> None:
    x = torch.randn(3, 5)
    z = fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), solver="anderson", tol=1e-6)
    torch.testing.assert_close(z, torch.tanh(0.5 * z + x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a declared fixed point has none"):
        fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), backward="unroll")
