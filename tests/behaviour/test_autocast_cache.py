"""What autocast remembers of a parameter is never what a solve made of it without gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deq_compile
from deq_compile import fixed_point

D = 8


class Model(nn.Module):
    """z <- tanh(layer(z) + x), and the layer once more behind it; in front of it too, where `tied`."""

    def __init__(self, layer: nn.Module, tied: bool = False, declared: bool = False) -> None:
        super().__init__()
        self.layer, self.tied, self.declared = layer, tied, declared
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() > 1:
                    p.mul_(0.4 / torch.linalg.matrix_norm(p.flatten(1), 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).float() + x if self.tied else x
        z = torch.zeros_like(x)
        if self.declared:
            z = fixed_point(lambda z: torch.tanh(self.layer(z).float() + x), z)
        else:
            for _ in range(30):
                z = torch.tanh(self.layer(z).float() + x)
        return z + self.layer(z)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.project(z).chunk(3, -1))
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return out


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.heads(z, z, z, need_weights=False)[0]
        return out


TOKENS = (2, 5, D)
MODELS: dict[str, tuple[Callable[[], Model], tuple[int, ...]]] = {
    "linear": (lambda: Model(nn.Linear(D, D)), (4, D)),
    "in front too": (lambda: Model(nn.Linear(D, D), tied=True), (4, D)),
    "declared": (lambda: Model(nn.Linear(D, D), declared=True), (4, D)),
    "norm": (lambda: Model(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))), (4, D)),
    "convolution": (lambda: Model(nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 5, 5)),
    "attention": (lambda: Model(Attention()), TOKENS),
    "heads": (lambda: Model(Heads()), TOKENS),
}
HOW = [
    *((name, "eager", "broyden") for name in MODELS if name != "heads"),
    ("linear", "eager", "auto"),
    ("heads", "aot_eager", "auto"),
]


@pytest.mark.parametrize(("name", "inner", "solver"), HOW)
def test_a_layer_that_is_used_behind_its_loop_has_its_whole_gradient(name: str, inner: str, solver: str) -> None:
    """Also where an evaluation comes first, and another one between forward and backward."""
    deq_compile.reset()
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    run = torch.compile(model, backend="deq", options={"inner": inner, "solver": solver})

    def gradients(call: nn.Module) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                call(x)
            out = call(x)
            with torch.no_grad():
                call(x)
            (out + call(x)).float().square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients(model)
    largest = max(float(g.norm()) for g in want)
    for _ in range(2):
        got = gradients(run)
        assert len(got) == len(want)
        for mine, theirs in zip(got, want, strict=True):
            assert float((mine - theirs).norm()) < 0.05 * max(float(theirs.norm()), 0.1 * largest)
    if name == "linear":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(x)
            assert model.layer(x).requires_grad
