"""What is not finite goes out as it would from the user's own loop: in that sample, in every call; the others are untouched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torchdeq import get_deq

from deq_compile import fixed_point
from tests.helpers import compiled

CAP = 60


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sample that misses is warned of; here the values count
        yield


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W, self.U = nn.Linear(6, 6), nn.Linear(6, 6)
        nn.init.orthogonal_(self.W.weight, gain=0.6)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.U(x))

    def loop(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z = self.f(z, x)
        return z


class Counted(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.loop(x)


class Breaks(Model):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            old, z = z, self.f(z, x)
            if (z - old).norm() < 1e-6:
                break
        return z


class BreaksOnTheWorst(Model):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            old, z = z, self.f(z, x)
            if (z - old).norm(dim=1).max().item() < 1e-6:
                break
        return z


class While(Model):
    """NaN > 1e-6 is false: the loop ends at once, and returns what it has."""

    def forward(self, x: Tensor) -> Tensor:
        z, gap, k = torch.zeros_like(x), torch.tensor(1.0), 0
        while gap > 1e-6 and k < CAP:
            new = self.f(z, x)
            gap, z, k = (new - z).norm() / new.norm(), new, k + 1
        return z


def forward_iteration(f: Callable[[Tensor], Tensor], x0: Tensor, max_iter: int, tol: float) -> Tensor:
    z = x0
    for _ in range(max_iter):
        new = f(z)
        if (new - z).norm() < tol * new.norm():
            return new
        z = new
    return z


class Calls(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = forward_iteration(lambda z: self.f(z, x), torch.zeros_like(x), CAP, 1e-6)
        return self.f(z, x)


class Library(Model):
    def __init__(self) -> None:
        super().__init__()
        self.deq = get_deq(ift=True, f_tol=1e-6, b_tol=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(lambda z: self.f(z, x), torch.zeros_like(x))[0][-1]


class Outright(Model):
    def forward(self, x: Tensor) -> Tensor:
        return fixed_point(lambda z: self.f(z, x), torch.zeros_like(x), tol=1e-6, backward_tol=1e-5)


MODELS = [Counted, Breaks, BreaksOnTheWorst, While, Calls, Library, Outright]


def results(model: Model, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.sum().backward()
    return [y.detach(), x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]  # type: ignore[list-item]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(torch.isfinite(a), torch.isfinite(b))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, equal_nan=True)


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_a_nan_sample_is_nan_in_every_call_and_harms_no_other(cls: type[Model]) -> None:
    """First in a later batch, then in the very first one of another model; a finite batch afterwards is right again."""
    good = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    bad = good.clone()
    bad[1, 2] = float("nan")
    for batches in ([good, good, good, bad, bad, good], [bad, bad, good, bad]):
        torch._dynamo.reset()
        model = cls()
        own = model.loop if cls is Outright else model
        run, _ = compiled(model, tol=None, backward_tol=1e-5)
        eager = model if cls is Outright else None
        for x in batches:
            # the linear solve of a library's adjoint does not keep NaN to its sample in the gradients of x
            rows = slice(None) if cls is not Library else slice(0, 1)
            same(results(model, run, x)[rows], results(model, own, x)[rows])
            if eager is not None:
                same(results(model, eager, x), results(model, own, x))


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_nan_weights_make_everything_nan(cls: type[Model]) -> None:
    """A guard on the loss has to fire."""
    model, x = cls(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    run, _ = compiled(model, tol=None)
    for _ in range(4):
        run(x)
    with torch.no_grad():
        model.W.weight[0, 0] = float("nan")
    for _ in range(2):
        found, expected = results(model, run, x), results(model, model.loop if cls is Outright else model, x)
        assert not torch.isfinite(found[0]).all(1).any()
        assert torch.equal(torch.isfinite(found[2]), torch.isfinite(expected[2]))
        assert not torch.isfinite(found[2]).all()


def test_a_state_in_logarithms_may_hold_infinities() -> None:
    """log 0 is a state like any other: the loop's own result."""

    def loop(x: Tensor) -> Tensor:
        z = torch.log_softmax(x, -1)
        for _ in range(40):
            z = torch.log_softmax(0.5 * z + x, -1)
        return z

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    x[:, 2] = float("-inf")
    run, _ = compiled(loop, tol=None)
    for _ in range(4):
        torch.testing.assert_close(run(x), loop(x), rtol=1e-4, atol=1e-5)


def test_a_probe_on_values_that_are_not_finite_decides_nothing() -> None:
    model = Counted()
    good = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    bad = good.clone()
    bad[0, 0] = float("nan")
    run, report = compiled(model, tol=None)
    run(bad)
    run(good)
    from deq_compile.region.site import site

    assert site(report.regions[0].key).rows is True
    assert report.regions[0].status == "solve"


def test_a_body_with_a_domain_is_probed_inside_it() -> None:
    """The probe's noise makes the logarithm NaN, which says nothing about how samples depend on each other."""

    def loop(x: Tensor) -> Tensor:
        z = torch.ones_like(x)
        for _ in range(40):
            z = 1.0 + 0.3 * torch.log(z) + 0.1 * x.square()
        return z

    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    run, report = compiled(loop, tol=None)
    torch.testing.assert_close(run(x), loop(x), rtol=1e-3, atol=1e-4)
    from deq_compile.region.site import site

    assert site(report.regions[0].key).rows is True


def test_a_nan_target_is_its_samples_own() -> None:
    """A cotangent that is NaN has no adjoint; the others have theirs, and no tolerance is lost to it."""
    model = Counted()
    run, report = compiled(model, tol=1e-6, backward_tol=None)
    from deq_compile.region.site import site

    for call in range(10):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(call))
        target = torch.zeros(4, 6)
        if call in (0, 3, 5, 6):
            target[1] = float("nan")
        grads = []
        for f in (run, model):
            leaf = x.clone().requires_grad_()
            ((f(leaf) - target) ** 2).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0][[0, 2, 3]], grads[1][[0, 2, 3]], rtol=2e-2, atol=2e-2)  # type: ignore[index]  # the default's
    assert 1e-4 <= site(report.regions[0].key).backward_tol <= 1e-2
