"""Implicit layers: monotone operators, fixed-point networks, mean-field attention, the layers of a tutorial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..manifest import Case, Model
from ..sources import absent, definitions


def last(output: tuple[Tensor, ...]) -> Tensor:
    return output[-1]


def monotone(splitting: str, alpha: float, tight: bool) -> Case:
    """locuslab/monotone_op_net: a single fully connected layer and its output layer, at the settings of its script."""
    absent("torchvision", "torchvision.datasets", "torchvision.transforms")
    import mon
    import splitting as methods

    class SingleFc(nn.Module):
        """SingleFcNet of train.py, which cannot be imported for its data sets."""

        def __init__(self) -> None:
            super().__init__()
            tol, most = (1e-11, 5000) if tight else (1e-5, 300)
            self.mon = getattr(methods, splitting)(
                mon.MONSingleFc(64, 96, m=0.2), mon.MONReLU(), alpha=alpha, tol=tol, max_iter=most
            )
            self.Wout = nn.Linear(96, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.Wout(self.mon(x)[-1])

    return Case(SingleFc(), (torch.randn(32, 64),))


def fixed_point_network(tight: bool) -> Case:
    """howardheaton/fixed_point_networks: the MNIST network, its batch-norm in evaluation, without dropout."""
    import Networks

    model = Networks.MNIST_FPN()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, d: Tensor) -> Tensor:
            return self.net(d, eps=1e-11, max_depth=2000) if tight else self.net(d, eps=1e-4)

    return Case(Called(), (torch.randn(8, 1, 28, 28),))


def mean_field_attention(tight: bool) -> Case:
    """mcbal/deep-implicit-attention, as in its example of a single layer."""
    import numpy as np
    from deep_implicit_attention.attention import DEQMeanFieldAttention
    from deep_implicit_attention.deq import DEQFixedPoint
    from deep_implicit_attention.solvers import anderson

    spins, dim = 32, 16
    most, tol = (200, 1e-11) if tight else (30, 1e-4)
    inner = DEQMeanFieldAttention(num_spins=spins, dim=dim, weight_init_std=1 / np.sqrt(spins * dim**2), lin_response=True)
    options = {f"solver_{way}_{what}": value for way in ("fwd", "bwd") for what, value in (("max_iter", most), ("tol", tol))}
    return Case(DEQFixedPoint(inner, anderson, **options), (torch.randn(4, spins, dim) / np.sqrt(dim),))


def tutorial_anderson(tight: bool) -> Case:
    """nandometzger/DEQplayground: the tutorial's residual layer, Anderson and hook."""
    absent("torchvision")
    script = definitions("implicitlayer_cifar_DEQ.py")
    torch.manual_seed(0)
    layer = script.ResNetLayer(16, 32, num_groups=8)
    options = {"tol": 1e-11, "max_iter": 500} if tight else {"tol": 1e-4, "max_iter": 50}
    return Case(script.DEQFixedPoint(layer, script.anderson, **options), (torch.randn(4, 16, 16, 16),), first)


def first(output: tuple[Tensor, ...]) -> Tensor:
    return output[0]


def tutorial_tanh(tight: bool) -> Case:
    """nandometzger/DEQplayground: z = tanh(W z + x), a loop that counts on the module."""
    absent("jax", "jax.numpy")
    script = definitions("implicitlayer_pytorch.py")
    torch.manual_seed(0)
    layer = script.TanhFixedPointLayer(100, tol=1e-11 if tight else 1e-4, max_iter=1000 if tight else 50)
    return Case(nn.Sequential(nn.Linear(784, 100), layer, nn.Linear(100, 10)), (torch.randn(100, 784),))


def tutorial_newton(tight: bool) -> Case:
    """nandometzger/DEQplayground: the same by Newton's method, and a hook with a direct solve."""
    absent("torchvision")
    script = definitions("implicitlayer_mnist_newton.py", names=("device",))
    torch.manual_seed(0)
    layer = script.TanhNewtonImplicitLayer(100, tol=1e-12 if tight else 1e-4, max_iter=40)
    return Case(nn.Sequential(nn.Linear(784, 100), layer, nn.Linear(100, 10)), (torch.randn(100, 784),))


MON = ("locuslab/monotone_op_net", "6c224c4fb1caadd2362f8d72e8c3bac2f0fd8511", "none stated")
PLAYGROUND = ("nandometzger/DEQplayground", "a6b4e836deca45b904cc5f1273a1ac644f24719b", "none stated")

MODELS = (
    Model(
        "mon-forward-backward",
        *MON,
        "loop with a test, meters, a Function",
        lambda t: monotone("MONForwardBackwardSplitting", 0.3, t),
    ),
    Model(
        "mon-peaceman-rachford", *MON, "loop with a test, meters, a Function", lambda t: monotone("MONPeacemanRachford", 1.0, t)
    ),
    Model(
        "fixed-point-network",
        "howardheaton/fixed_point_networks",
        "60618c27b1b4b1abc6ea51e9392d196c59ce4768",
        "MIT",
        "loop with a test, Jacobian-free",
        fixed_point_network,
    ),
    Model(
        "mean-field-attention",
        "mcbal/deep-implicit-attention",
        "5662265834c2523cdacb30708a59f9ffb44b696d",
        "MIT",
        "Anderson with traces, a hook that solves",
        mean_field_attention,
    ),
    Model("tutorial-anderson", *PLAYGROUND, "Anderson with a list, a hook that solves", tutorial_anderson),
    Model("tutorial-tanh", *PLAYGROUND, "loop with a test, counts on the module", tutorial_tanh),
    Model("tutorial-newton", *PLAYGROUND, "Newton, a hook with a direct solve", tutorial_newton),
)
