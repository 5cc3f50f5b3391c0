"""jac_reg and spectral_radius against the dense Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deq_compile import jac_reg, spectral_radius


def dense(f, z: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.stack([torch.autograd.functional.jacobian(lambda s: f(s[None])[0], row) for row in z])


def test_jac_reg_is_the_mean_square_of_the_jacobian() -> None:
    net = nn.Sequential(nn.Linear(9, 9), nn.Tanh()).double()
    z = torch.randn(4, 9, dtype=torch.float64)
    expected = dense(net, z).square().sum() / z.numel()
    found = jac_reg(net, z, samples=4000)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=0.05)  # 1/sqrt of the random vectors


def test_jac_reg_trains_the_parameters() -> None:
    net = nn.Linear(5, 5).double()
    jac_reg(net, torch.randn(3, 5, dtype=torch.float64), samples=500).backward()
    assert net.weight.grad is not None
    # |J|^2 / numel = |W|^2 / 5 for each sample: the gradient is 2 W / 5
    torch.testing.assert_close(net.weight.grad, 0.4 * net.weight.detach(), rtol=0.3, atol=0.05)  # an estimate
    assert net.bias.grad is None or not net.bias.grad.any()


def test_spectral_radius_of_every_sample() -> None:
    W = torch.randn(4, 7, 7, dtype=torch.float64)
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    found = spectral_radius(lambda z: torch.einsum("bij,bj->bi", W, z), z, iterations=400)
    expected = torch.linalg.eigvals(W).abs().amax(1)  # pairs of complex eigenvalues among them
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.0)  # converges like 1 / iterations
    assert not found.requires_grad
    assert spectral_radius(lambda z: 0 * z, z).tolist() == [0.0] * 4


def test_states_of_any_shape() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    z = torch.randn(3, 2, 5, 5)
    assert jac_reg(conv, z).shape == ()
    assert spectral_radius(conv, z, iterations=10).shape == (3,)
    with torch.no_grad():  # they record what they need themselves
        assert float(jac_reg(conv, z)) > 0


def test_a_body_that_does_not_depend_on_its_argument() -> None:
    """Of parameters alone, of nothing, detached, or multiplied away: the Jacobian is 0."""
    z, w = torch.randn(3, 4), nn.Parameter(torch.randn(4))
    unused = torch.randn(3, 4, requires_grad=True)
    for f in (lambda z: w.expand(3, 4), lambda z: torch.ones(3, 4), lambda z: z.detach(), lambda z: unused * 2, lambda z: 0 * z):
        assert float(jac_reg(f, z, samples=2).detach()) == 0.0
        assert spectral_radius(f, z, iterations=4).tolist() == [0.0] * 3
    loss = w.sum() + jac_reg(lambda z: w.expand(3, 4), z)  # still a term of a loss
    loss.backward()
    assert w.grad is not None
    assert w.grad.tolist() == [1.0] * 4


def test_a_state_of_one_number_a_sample() -> None:
    z = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(spectral_radius(lambda z: -0.5 * z.square(), z, iterations=5), z.abs())
    found = jac_reg(lambda z: -0.5 * z.square(), z, samples=4000)
    assert float(found.detach()) == pytest.approx(float(z.square().mean()), rel=0.1)  # 1/sqrt of the random vectors


@pytest.mark.parametrize("shape", [(0, 4), (0,), (3, 0), (2, 0, 3)])
def test_empty_states(shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape)
    assert float(jac_reg(torch.sin, z).detach()) == 0.0
    assert spectral_radius(torch.sin, z, iterations=3).tolist() == [0.0] * shape[0]


def test_bad_arguments() -> None:
    z = torch.randn(2, 3)
    with pytest.raises(ValueError, match="samples >= 1"):
        jac_reg(lambda z: z, z, samples=0)
    with pytest.raises(ValueError, match="iterations >= 2"):
        spectral_radius(lambda z: z, z, iterations=1)
    with pytest.raises(ValueError, match=r"maps \(2, 3\) to itself, got \(2, 2\)"):
        jac_reg(lambda z: z[:, :2], z)
    with pytest.raises(ValueError, match="without dimensions"):
        spectral_radius(lambda z: z, torch.tensor(1.0))
    for samples in (1.5, True, "1"):
        with pytest.raises(ValueError, match="expected samples >= 1, an int, got"):
            jac_reg(torch.sin, z, samples=samples)  # type: ignore[arg-type]
    for call in (jac_reg, spectral_radius):
        for returned, got in ((None, "NoneType"), ((z,), "tuple"), (z.long(), "torch.int64")):
            with pytest.raises(TypeError, match=f"body that returns one real floating-point tensor, got {got}"):
                call(lambda z, returned=returned: returned, z)  # type: ignore[misc]
        for state, got in ((z.long(), "torch.int64"), (z.to(torch.complex64), "torch.complex64"), ([z], "list")):
            with pytest.raises(TypeError, match=f"{call.__name__}: expected a state that is one .* tensor, got {got}"):
                call(torch.sin, state)
        with pytest.raises(TypeError, match="expected a callable f, got int"):
            call(0, z)
