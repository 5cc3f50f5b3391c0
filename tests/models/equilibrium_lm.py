"""A language model with an equilibrium block, as it is trained: a prelude, one looped block with a gate, a head.

The block is solved by Anderson's method to 3e-4 without gradients; a `torch.autograd.Function` attaches the implicit gradient,
solved by plain iteration or by Anderson's method again, or one step of its Neumann series. Its numbers lie on the module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Map = Any


def anderson(
    f: Map, z0: Tensor, tol: float = 3e-4, max_iter: int = 50, memory: int = 5, ridge: float = 1e-4
) -> tuple[Tensor, dict[str, Any]]:
    """The fixed point of f by Anderson's method, each sample with weights of its own."""
    B = z0.shape[0]
    n = z0[0].numel()
    X, G = z0.new_zeros(B, memory, n), z0.new_zeros(B, memory, n)
    X[:, 0], G[:, 0] = z0.flatten(1), f(z0).flatten(1)
    X[:, 1], G[:, 1] = G[:, 0], f(G[:, 0].view_as(z0)).flatten(1)
    H = z0.new_zeros(B, memory + 1, memory + 1)
    H[:, 0, 1:] = H[:, 1:, 0] = 1
    y = z0.new_zeros(B, memory + 1, 1)
    y[:, 0] = 1
    k, rel, converged = 1, float("inf"), False
    for k in range(2, max_iter):
        m = min(k, memory)
        R = G[:, :m] - X[:, :m]
        H[:, 1 : m + 1, 1 : m + 1] = R @ R.transpose(1, 2) + ridge * torch.eye(m, dtype=z0.dtype, device=z0.device)
        alpha = torch.linalg.solve(H[:, : m + 1, : m + 1], y[:, : m + 1])[:, 1 : m + 1, 0]
        X[:, k % memory] = (alpha[:, None] @ G[:, :m])[:, 0]
        G[:, k % memory] = f(X[:, k % memory].view_as(z0)).flatten(1)
        gap = G[:, k % memory] - X[:, k % memory]
        rel = (gap.norm() / (1e-5 + G[:, k % memory].norm())).item()
        if rel < tol:
            converged = True
            break
    z = X[:, k % memory].view_as(z0)
    return z, {"iters": k + 1, "rel_residual": rel, "converged": converged, "trajectory": None}


def picard(f: Map, z0: Tensor, tol: float = 3e-4, max_iter: int = 50) -> tuple[Tensor, dict[str, Any]]:
    """The same by plain iterations."""
    z, k, rel = z0, 0, float("inf")
    for k in range(max_iter):  # noqa: B007
        new = f(z)
        rel = ((new - z).norm() / (1e-5 + new.norm())).item()
        z = new
        if rel < tol:
            break
    return z, {"iters": k + 1, "rel_residual": rel, "converged": rel < tol, "trajectory": None}


class Implicit(torch.autograd.Function):
    """z as it is; backwards w = q + J^T w, by plain iteration ("ift") or "anderson", or q + J^T q ("onestep")."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, graph: dict[str, Any], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.graph, ctx.inputs = graph, (x, *parameters)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, q: Tensor) -> Any:
        start, image = ctx.graph["start"], ctx.graph["image"]

        def step(w: Tensor) -> Tensor:
            return q + torch.autograd.grad(image, start, w, retain_graph=True)[0]

        settings = {"tol": ctx.graph["tol"], "max_iter": ctx.graph["max_iter"]}
        if ctx.graph["gradient"] == "onestep":
            w = step(q)
        else:
            w, _ = (picard if ctx.graph["gradient"] == "ift" else anderson)(step, torch.zeros_like(q), **settings)
        wanted = [t for t in ctx.inputs if t.requires_grad]
        grads = iter(torch.autograd.grad(image, wanted, w))
        return (None, None, *(next(grads) if t.requires_grad else None for t in ctx.inputs))


class Attention(nn.Module):
    """Causal, with several heads."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        B, T, d = z.shape
        q, k, v = self.qkv(z).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(B, T, d))


class Block(nn.Module):
    """Attention and a feed-forward, both residual; with x a gate between the injected x and the state."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm = nn.RMSNorm(d), nn.RMSNorm(d), nn.RMSNorm(d)
        self.attention = Attention(d, heads)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.gate = nn.Parameter(torch.full((d,), -0.5))

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        h = z + self.attention(self.norm1(z))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        if x is not None:
            g = self.gate.sigmoid()
            h = g * h + (1 - g) * x
        return self.norm(h)


class EquilibriumLM(nn.Module):
    """Logits [B, T, vocabulary] of tokens [B, T], or the cross entropy with the targets."""

    def __init__(
        self,
        vocabulary: int = 512,
        d: int = 192,
        heads: int = 4,
        length: int = 64,
        gradient: str = "ift",
        tol: float = 3e-4,
        max_iter: int = 50,
    ) -> None:
        super().__init__()
        self.gradient, self.tol, self.max_iter = gradient, tol, max_iter
        self.embedding, self.position = nn.Embedding(vocabulary, d), nn.Parameter(0.1 * torch.randn(length, d))
        self.prelude, self.block = Block(d, heads), Block(d, heads)
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, vocabulary, bias=False)
        self.info: dict[str, Any] = {}

    def equilibrium(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, self.info = anderson(lambda z: self.block(z, x), torch.zeros_like(x), tol=self.tol, max_iter=self.max_iter)
        if not torch.is_grad_enabled():
            return z
        start = z.detach().requires_grad_()
        graph = {"start": start, "image": self.block(start, x)}
        graph |= {"gradient": self.gradient, "tol": self.tol, "max_iter": self.max_iter}
        out: Tensor = Implicit.apply(z, graph, x, *self.block.parameters())
        return out

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.prelude(self.embedding(tokens) + self.position[: tokens.shape[1]])
        logits: Tensor = self.head(self.norm(self.equilibrium(x)))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def converged(model: EquilibriumLM, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and gradients of all parameters, of a model in float64: 300 plain iterations each way, or one step of the backward."""
    x = model.prelude(model.embedding(tokens) + model.position[: tokens.shape[1]])
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(300):
            z = model.block(z, x)
    start = z.clone().requires_grad_()
    image, out = model.block(start, x.detach()), model.block(z, x)

    def solve(q: Tensor) -> Tensor:
        w = q
        for _ in range(1 if model.gradient == "onestep" else 300):
            w = q + torch.autograd.grad(image, start, w, retain_graph=True)[0]
        return w

    out.register_hook(solve)
    loss = F.cross_entropy(model.head(model.norm(out)).flatten(0, 1), targets.flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    like = zip(grads, model.parameters(), strict=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for g, p in like)]


def make(gradient: str = "ift", batch: int = 8, length: int = 64, **settings: Any) -> tuple[EquilibriumLM, tuple[Tensor, Tensor]]:
    """A model and a batch of tokens with their successors."""
    torch.manual_seed(0)
    model = EquilibriumLM(gradient=gradient, length=length, **settings)
    tokens = torch.randint(0, model.embedding.num_embeddings, (batch, length + 1))
    return model, (tokens[:, :-1], tokens[:, 1:])
