"""A DEQ-Transformer layer (Bai et al., arXiv 1909.01377): causal relative attention and a feed-forward, both residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import scale_weights


class RelativeAttention(nn.Module):
    """Multi-head attention whose queries, keys and values get an injection, with a learned bias for each distance."""

    mask: Tensor
    distance: Tensor

    def __init__(self, d: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, d // heads
        self.qkv_net = nn.Linear(d, 3 * d, bias=False)
        self.o_net = nn.Linear(d, d, bias=False)
        self.r_bias = nn.Parameter(0.1 * torch.randn(heads, length))
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1))
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        self.register_buffer("distance", distance.clamp_min(0))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        B, T, d = z.shape
        heads = self.qkv_net(z) + u
        q, k, v = torch.chunk(heads, 3, dim=-1)
        q, k, v = (t.view(B, T, self.heads, self.head_size) for t in (q, k, v))
        score = torch.einsum("bihd,bjhd->bhij", q, k) * self.head_size**-0.5
        score = score + self.r_bias[:, self.distance]
        score = score.masked_fill(self.mask, float("-inf"))
        attended = torch.einsum("bhij,bjhd->bihd", F.softmax(score, dim=-1), v).reshape(B, T, d)
        return self.o_net(attended)


class Layer(nn.Module):
    def __init__(self, d: int, heads: int, inner: int, length: int) -> None:
        super().__init__()
        self.attention = RelativeAttention(d, heads, length)
        self.ff = nn.Sequential(nn.Linear(d, inner), nn.ReLU(inplace=True), nn.Linear(inner, d))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        z = self.norm1(z + self.attention(z, u))
        return self.norm2(z + self.ff(z))


class DEQTransformer(nn.Module):
    """A language model with one weight-tied layer. tokens: (B, T) int64, T <= length. Returns logits (B, T, vocabulary)."""

    def __init__(
        self, vocabulary: int = 50, d: int = 32, heads: int = 4, length: int = 10, iterations: int = 50, gain: float = 0.3
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.embedding, self.inject = nn.Embedding(vocabulary, d), nn.Linear(d, 3 * d)
        self.layer = Layer(d, heads, 2 * d, length)
        self.out = nn.Linear(d, vocabulary)
        scale_weights(self.layer, 0.8)
        with torch.no_grad():
            self.layer.norm1.weight.fill_(gain)
            self.layer.norm2.weight.fill_(gain)

    def forward(self, tokens: Tensor) -> Tensor:
        u = self.inject(self.embedding(tokens))
        z = torch.zeros(*tokens.shape, self.embedding.embedding_dim, dtype=u.dtype, device=u.device)
        for _ in range(self.iterations):
            z = self.layer(z, u)
        return self.out(z)


def make() -> tuple[DEQTransformer, tuple[Tensor, ...]]:
    """Two sequences of ten tokens."""
    torch.manual_seed(0)
    model = DEQTransformer()
    return model, (torch.randint(0, 50, (2, 10)),)
