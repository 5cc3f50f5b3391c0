"""Models of TorchDEQ, unmodified. The table of configurations is in test_forms.py."""

from __future__ import annotations

import pytest
import torch

from deq_compile import explain, record_solves
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.library import HOOK, IFT, Library, One, Two


@pytest.mark.parametrize("mode", ["abs", "rel"])
@pytest.mark.parametrize("train", [True, False])
def test_statistics(mode: str, train: bool) -> None:
    """All keys, and numbers that are true of the state that the solve ended at: in training the library returns its image."""

    class Told(One):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # type: ignore[override]
            z_out, info = self.deq(lambda z: self.f(z, x), torch.zeros_like(x))
            return z_out[-1], info

    library = Library(Told, {**IFT, "f_stop_mode": mode, "f_tol": 1e-3}, train=train)
    model, x = library.make()
    run, _ = compiled(model, tol=None, backward_tol=None)
    with record_solves(tensors=True) as solves:
        returned, info = run(x)
    _, theirs = model(x)
    z = solves[0].z
    assert z is not None
    torch.testing.assert_close(returned, model.f(z, x) if train else z)
    assert type(info) is type(theirs)
    assert info.keys() == theirs.keys()
    image = model.f(z, x)
    absolute = (image - z).norm(dim=1).detach()
    # relative to |z|, which is |f(z)| but for the residual itself
    torch.testing.assert_close(info["abs_lowest"], absolute, rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(info["rel_lowest"], absolute / image.norm(dim=1).detach(), rtol=2e-3, atol=1e-7)
    assert info[f"{mode}_lowest"].max() <= 1e-3
    assert 2 <= info["nstep"].min() <= info["nstep"].max() <= theirs["nstep"].max()
    for key in ("abs", "rel"):
        torch.testing.assert_close(info[f"{key}_trace"], info[f"{key}_lowest"][:, None], rtol=0, atol=0)


def test_their_settings_are_the_defaults_and_options_beat_them() -> None:
    model, x = Library(One, {**IFT, "f_tol": 1e-2}).make()
    exact = reference(Library(One, IFT).make()[0], x)
    loose = largest_error(value_and_grads(compiled(model, tol=None, backward_tol=None)[0], model, x), exact)
    torch._dynamo.reset()
    tight = largest_error(value_and_grads(compiled(model)[0], model, x), exact)
    assert tight < 1e-4 < loose


def test_explain_says_what_becomes_of_the_gradient() -> None:
    for config, word in ((IFT, "implicit gradient"), ({"grad": 2}, "phantom gradient stays")):
        model, x = Library(One, config).make()
        assert word in str(explain(model, inner="eager")(x))


@pytest.mark.parametrize("config", [IFT, HOOK, {"grad": 2}])
@pytest.mark.parametrize("kind", [One, Two])
@pytest.mark.parametrize("train", [True, False])
def test_a_gradient_where_the_library_has_one(kind: type[torch.nn.Module], config: dict[str, object], train: bool) -> None:
    """In eval it solves without gradients, whatever it does in training; parts of the model beside it have theirs."""
    model, x = Library(kind, config, train=train).make()
    x.requires_grad_()
    run, report = compiled(model, tol=None)
    found, theirs = run(x), model(x)
    assert found.requires_grad is theirs.requires_grad is train
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-4)
    assert len(report.regions) == 1
    beside, _ = compiled(lambda x: model(x) + x)
    (grad,) = torch.autograd.grad(beside(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x)) is not train
