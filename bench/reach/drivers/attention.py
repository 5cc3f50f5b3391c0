"""Attention, transport and message passing that iterate: Hopfield recall, Sinkhorn, mean-field, planning."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from ..manifest import Case, Model
from ..sources import absent
from .sequence import Called, first


def hopfield(tight: bool) -> Case:
    """ml-jku/hopfield-layers: association with up to 30 updates, until no head moves by 1e-4."""
    from hflayers import Hopfield

    eps, most = (1e-11, 500) if tight else (1e-4, 30)
    layer = Hopfield(input_size=16, num_heads=2, update_steps_max=most, update_steps_eps=eps, scaling=0.5)
    model = nn.ModuleDict({"hopfield": layer, "head": nn.Linear(16, 4)})
    call = Called(model, lambda net, x: net["head"](net["hopfield"]((x, x, x))))
    return Case(call, (torch.randn(4, 10, 16),))


def hyper_connections(log_domain: bool) -> Case:
    """lucidrains/hyper-connections: three layers with manifold-constrained streams, twenty Sinkhorn steps each."""
    from hyper_connections.manifold_constrained_hyper_connections import get_init_and_expand_reduce_stream_functions

    init, expand, reduce = get_init_and_expand_reduce_stream_functions(4, log_domain_sinkhorn=log_domain)

    def branch() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    layers = nn.ModuleList([init(dim=32, branch=branch()) for _ in range(3)])

    def call(layers: nn.Module, x: Tensor) -> Tensor:
        x = expand(x)
        for layer in layers:  # type: ignore[attr-defined]
            x = layer(x)
        return reduce(x)

    return Case(Called(layers, call), (torch.randn(2, 8, 32),))


def matching(tight: bool) -> Case:
    """magicleap/SuperGluePretrainedNetwork: its optimal transport, a hundred steps, behind a projection."""
    from models.superglue import log_optimal_transport

    model = nn.ModuleDict({"project": nn.Linear(32, 32)})
    bin_score = nn.Parameter(torch.tensor(1.0))

    def call(model: Any, a: Tensor, b: Tensor) -> Tensor:
        scores = model["project"](a) @ model["project"](b).transpose(1, 2) / 32**0.5
        return log_optimal_transport(scores, bin_score.to(scores), iters=100)

    return Case(Called(model, call), (torch.randn(2, 40, 32), torch.randn(2, 30, 32)))


def structural_matching(tight: bool) -> Case:
    """wl-zhao/DIML: Sinkhorn until the scalings stand still, behind a projection."""
    from utilities.diml import calc_similarity

    model = nn.Linear(32, 32)

    def call(model: nn.Module, anchor: Tensor, bank: Tensor) -> Tensor:
        a, b = (nn.functional.normalize(model(x), dim=-1).transpose(-1, -2) for x in (anchor, bank))
        return calc_similarity(a, a.mean(1), b, b.mean(2), stage=1, use_uniform=True)

    return Case(Called(model, call), (torch.randn(16, 32), torch.randn(8, 16, 32)))


def mean_field(tight: bool) -> Case:
    """MarvinTeichmann/ConvCRF: fifteen iterations of mean-field behind a convolution, at its configuration for small images."""
    absent("gpustat", "imageio", "skimage", "matplotlib", "matplotlib.pyplot")
    from convcrf import convcrf

    shape = [12, 12]
    crf = convcrf.GaussCRF(
        convcrf.get_test_conf() | {"final_softmax": False, "unary_weight": 1, "pyinn": False}, shape, 4, use_gpu=False
    )
    model = nn.ModuleDict({"unary": nn.Conv2d(3, 4, 3, padding=1), "crf": crf})

    def call(model: Any, image: Tensor) -> Tensor:
        return model["crf"](unary=model["unary"](image), img=image * 0.5, num_iter=15)

    return Case(Called(model, call), (torch.rand(1, 3, *shape),))


def planning(tight: bool) -> Case:
    """kentsommer/pytorch-value-iteration-networks: twenty iterations of value iteration, with the weights of a discount."""
    from model import VIN

    net = VIN(types.SimpleNamespace(l_i=2, l_h=32, l_q=6))
    with torch.no_grad():
        net.w.copy_(torch.rand(6, 1, 3, 3) * 0.09)
    x, y = torch.randint(0, 12, (16,)), torch.randint(0, 12, (16,))
    return Case(Called(net, lambda net, view: net(view, x, y, 40)), (torch.randn(16, 2, 12, 12),), first)


def equilibrium_propagation(tight: bool) -> Case:
    """automenta/eqprop: the looped perceptron, thirty steps; its spectral norms in evaluation."""
    from eqprop_torch.models import LoopedMLP

    model = LoopedMLP(64, 96, 10, use_spectral_norm=True, max_steps=30)
    for module in model.modules():
        if type(module).__name__ == "_SpectralNorm":
            module.eval()
    return Case(model, (torch.randn(32, 64),))


def hamburger(tight: bool) -> Case:
    """Gsunshine/Enjoy-Hamburger: non-negative matrix factorisation, six steps without gradients and one with, given bases."""
    absent("sync_bn", "settings")
    from hamburger.ham import NMF2D

    ham = NMF2D(types.SimpleNamespace(RAND_INIT=False, MD_D=16, MD_R=8, TRAIN_STEPS=6))
    ham.register_buffer("bases", nn.functional.normalize(torch.rand(1, 16, 8), dim=1))
    return Case(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), ham), (torch.randn(2, 3, 12, 12),))


CONNECTIONS = ("lucidrains/hyper-connections", "47751035f6e92f73121f1da56603f0d410115799", "MIT")

MODELS: tuple[Model, ...] = (
    Model(
        "hopfield",
        "ml-jku/hopfield-layers",
        "f56f929c95b77a070ae675ea4f56b6d54d36e730",
        "BSD-style",
        "updates until every head stands still",
        hopfield,
    ),
    Model("hyper-connections", *CONNECTIONS, "20 Sinkhorn steps a layer", lambda tight: hyper_connections(False)),
    Model("hyper-connections-log", *CONNECTIONS, "20 Sinkhorn steps a layer", lambda tight: hyper_connections(True)),
    Model(
        "superglue-transport",
        "magicleap/SuperGluePretrainedNetwork",
        "ddcf11f42e7e0732a0c4607648f9448ea8d73590",
        "non-commercial research",
        "100 Sinkhorn steps",
        matching,
    ),
    Model(
        "diml-sinkhorn",
        "wl-zhao/DIML",
        "c15dbea696f68ddf889dcacfcaacd315d16a34ac",
        "none stated",
        "Sinkhorn until a test",
        structural_matching,
    ),
    Model(
        "convcrf",
        "MarvinTeichmann/ConvCRF",
        "09306378ebc76e38f91aeaf57be5ce36ec2b873c",
        "MIT",
        "15 steps of mean-field",
        mean_field,
    ),
    Model(
        "value-iteration",
        "kentsommer/pytorch-value-iteration-networks",
        "2205fce8ac9f1d9f01f81996f7deef9a7b197a8d",
        "BSD-3-Clause",
        "39 steps of value iteration",
        planning,
    ),
    Model(
        "looped-mlp",
        "automenta/eqprop",
        "d5eaefd94c1773c48dce0e670fb1d306fa506343",
        "none stated",
        "30 steps to an equilibrium",
        equilibrium_propagation,
    ),
    Model(
        "hamburger",
        "Gsunshine/Enjoy-Hamburger",
        "d9b51f6f197486df68c6e059e396520680157c08",
        "GPL-3.0",
        "6 steps without gradients, one with",
        hamburger,
        path=("seg/HamNet",),
    ),
)
