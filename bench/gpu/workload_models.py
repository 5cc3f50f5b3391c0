"""Equilibrium models at the shapes of public ones, written here in their forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.common import scale_weights
from bench.models.flow import SepConvGRU
from bench.models.mdeq import MDEQModule, conv3x3, scale_norms

from .workloads import Equilibrium, State, Workload


class LanguageModelBlock(Equilibrium):
    """One weight-tied block of a causal language model: attention, then a feed-forward, norms behind both (arXiv 1909.01377).

    The injection enters queries, keys and values, as in the public DEQ-Transformer, and the residual, without which the norms of
    random weights do not contract. inputs: embeddings (B, T, width); z: the same shape.
    """

    def __init__(self, width: int, heads: int, n_iter: int, gain: float = 1.0) -> None:
        super().__init__()
        self.heads, self.n_iter, self.width = heads, n_iter, width
        self.enter = nn.Linear(width, 3 * width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.f1, self.f2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for layer in (self.qkv, self.o, self.f1, self.f2):
            scale_weights(layer, 0.8)
        with torch.no_grad():
            self.norm1.weight.fill_(gain)
            self.norm2.weight.fill_(gain)

    def inject(self, *inputs: Tensor) -> State:
        return self.enter(inputs[0]), inputs[0]

    def start(self, u: State) -> State:
        B, T, _ = u[0].shape
        wide = u[0].dtype if u[0].dtype == torch.float64 else torch.float32  # the norms' dtype under autocast
        return (torch.zeros(B, T, self.width, dtype=wide, device=u[0].device),)

    def body(self, z: State, u: State) -> State:
        (y,) = z
        B, T, width = y.shape
        q, k, v = (self.qkv(y) + u[0]).view(B, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, width)
        y = self.norm1(y + self.o(mixed) + u[1])
        return (self.norm2(y + self.f2(F.relu(self.f1(y)))),)


def language_model(dry: bool) -> Workload:
    """B 8, T 512, width 768, 12 heads, bf16 autocast: a block of GPT-2's width and half its context, in the form of the public
    DEQ-Transformer (locuslab/deq, DEQ-Sequence: width 700, 150 tokens, 14 sequences a GPU)."""
    B, T, width, heads = (2, 6, 16, 2) if dry else (8, 512, 768, 12)
    model = LanguageModelBlock(width, heads, 12 if dry else 30)
    source = "width and heads of GPT-2 small; form of locuslab/deq, DEQ-Sequence"
    return Workload("lm", model, (torch.randn(B, T, width),), source, tol=3e-2 if dry else 1e-2, autocast=torch.bfloat16)


class Mdeq(Equilibrium):
    """The multiscale body of MDEQ (arXiv 2006.08656), one state tensor a scale. inputs: (B, 3, H, W)."""

    def __init__(self, channels: tuple[int, ...], groups: int, expansion: int, n_iter: int) -> None:
        super().__init__()
        self.n_iter = n_iter
        self.stems = nn.ModuleList(conv3x3(3, c) for c in channels)
        self.f = MDEQModule(channels, groups, expansion)
        scale_weights(self, 1.0)
        scale_norms(self.f, 0.1)

    def inject(self, *inputs: Tensor) -> State:
        return tuple(stem(F.avg_pool2d(inputs[0], 2**scale)) for scale, stem in enumerate(self.stems))

    def start(self, u: State) -> State:
        return tuple(torch.zeros_like(t) for t in u)

    def body(self, z: State, u: State) -> State:
        return tuple(self.f(list(z), list(u)))


def mdeq_cifar(dry: bool) -> Workload:
    """MDEQ for CIFAR-10, LARGE: 32, 64, 128 and 256 channels at 32x32 to 4x4, 8 groups, expansion 5, 32 images a GPU, 18 solver
    steps: 61440 numbers a sample. All from locuslab/deq, MDEQ-Vision/experiments/cifar/cls_mdeq_LARGE.yaml; its weight norm and
    dropout, which are applied outside the body or off in evaluation, are left out."""
    if dry:
        return Workload("mdeq", Mdeq((4, 4), 2, 1, 12), (torch.randn(2, 3, 8, 8),), "rehearsal", tol=1e-3)
    model = Mdeq((32, 64, 128, 256), 8, 5, 18)
    return Workload("mdeq", model, (torch.randn(32, 3, 32, 32),), "locuslab/deq, cls_mdeq_LARGE.yaml")


class Flow(Equilibrium):
    """The update of DEQ-Flow (arXiv 2204.08442): a separable ConvGRU and the flow iterate together; the correlation volume is
    looked up around the present flow, as in RAFT. inputs: two feature maps (B, C, H, W) and a context (B, hidden, H, W).

    Unlike the public code, which adds the head's output to the flow, the head's output *is* the flow: a net with random weights
    has a fixed point in this form only.
    """

    def __init__(
        self, hidden: int, features: int, levels: int, radius: int, widths: tuple[int, int, int, int], n_iter: int
    ) -> None:
        super().__init__()
        self.hidden, self.levels, self.radius, self.n_iter = hidden, levels, radius, n_iter
        c1, c2, f1, f2 = widths
        self.convc1, self.convc2 = nn.Conv2d(levels * (2 * radius + 1) ** 2, c1, 1), nn.Conv2d(c1, c2, 3, padding=1)
        self.convf1, self.convf2 = nn.Conv2d(2, f1, 7, padding=3), nn.Conv2d(f1, f2, 3, padding=1)
        self.conv = nn.Conv2d(c2 + f2, hidden - 2, 3, padding=1)
        self.gru = SepConvGRU(hidden, 2 * hidden)
        self.head1, self.head2 = nn.Conv2d(hidden, 2 * hidden, 3, padding=1), nn.Conv2d(2 * hidden, 2, 3, padding=1)
        scale_weights(self, 0.5)

    def inject(self, *inputs: Tensor) -> State:
        first, second, context = inputs
        B, C, H, W = first.shape
        volume = torch.einsum("bchw,bcyx->bhwyx", first, second).reshape(B * H * W, 1, H, W) / C**0.5
        pyramid = [volume]
        for _ in range(self.levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return (torch.relu(context), *pyramid)

    def start(self, u: State) -> State:
        B, _, H, W = u[0].shape
        return (torch.zeros(B, self.hidden, H, W).to(u[0]), torch.zeros(B, 2, H, W).to(u[0]))

    def lookup(self, flow: Tensor, pyramid: State) -> Tensor:
        """Correlations around each pixel's target: (B, levels (2 radius + 1)^2, H, W)."""
        B, _, H, W = flow.shape
        ys, xs = torch.meshgrid(torch.arange(H, device=flow.device), torch.arange(W, device=flow.device), indexing="ij")
        target = (flow + torch.stack([xs, ys]).to(flow)).permute(0, 2, 3, 1).reshape(B * H * W, 1, 1, 2)
        steps = torch.arange(-self.radius, self.radius + 1, device=flow.device, dtype=flow.dtype)
        window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)[None]
        found = []
        for level, volume in enumerate(pyramid):
            x, y = (target / 2**level + window).unbind(-1)
            at = torch.stack([2 * x / max(volume.shape[3] - 1, 1) - 1, 2 * y / max(volume.shape[2] - 1, 1) - 1], -1)
            found.append(F.grid_sample(volume, at, align_corners=True).reshape(B, H, W, -1))
        return torch.cat(found, -1).permute(0, 3, 1, 2)

    def body(self, z: State, u: State) -> State:
        net, flow = z
        seen = F.relu(self.convc2(F.relu(self.convc1(self.lookup(flow, u[1:])))))
        moving = F.relu(self.convf2(F.relu(self.convf1(flow))))
        motion = torch.cat([F.relu(self.conv(torch.cat([seen, moving], 1))), flow], 1)
        net = self.gru(net, torch.cat([u[0], motion], 1))
        return net, self.head2(F.relu(self.head1(net)))


def deq_flow(dry: bool) -> Workload:
    """DEQ-Flow-B on Things: 400 x 720 pixels at an eighth, 50 x 90; hidden 128, four levels of radius 4, batch 6 on two GPUs:
    3 samples of 585000 numbers. From locuslab/deq-flow, train_B.sh, and the base widths of core/update.py (256, 192, 128, 64)."""
    B, H, W, hidden, features = (1, 4, 6, 6, 4) if dry else (3, 50, 90, 128, 256)
    widths = (4, 4, 4, 4) if dry else (256, 192, 128, 64)
    model = Flow(hidden, features, 2 if dry else 4, 1 if dry else 4, widths, 12 if dry else 24)
    inputs = (torch.randn(B, features, H, W), torch.randn(B, features, H, W), torch.randn(B, hidden, H, W))
    return Workload("flow", model, inputs, "locuslab/deq-flow, train_B.sh")


class GraphNet(Equilibrium):
    """An implicit graph net (arXiv 2009.06211), Z = tanh(W Z A + b(X)): all nodes are one coupled system. inputs: features
    (nodes, inputs), edges (2, E) int64. The state has a first dimension of 1."""

    def __init__(self, inputs: int, hidden: int, n_iter: int, gain: float = 0.7) -> None:
        super().__init__()
        self.n_iter = n_iter
        self.enter, self.W = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden, bias=False)
        scale_weights(self.W, gain)

    def inject(self, *inputs: Tensor) -> State:
        features, edges = inputs
        source, target = edges
        degree = torch.zeros(features.shape[0]).to(features).index_add(0, target, torch.ones(target.shape).to(features))
        weight = (degree[source] * degree[target]).clamp_min(1).rsqrt()
        return (self.enter(features), source, target, weight[:, None])

    def start(self, u: State) -> State:
        return (torch.zeros_like(u[0])[None],)

    def body(self, z: State, u: State) -> State:
        b, source, target, weight = u
        messages = self.W(z[0][0])[source] * weight
        return (torch.tanh(torch.zeros_like(b).index_add(0, target, messages) + b)[None],)


def graph_net(dry: bool) -> Workload:
    """IGNN on PPI: 256 hidden units (SwiftieH/IGNN, train_IGNN_PPI.py), 50 features; PPI's graphs have 2373 nodes and 28.8 edges
    a node on average (Hamilton et al. 2017, arXiv 1706.02216). A random graph of that size stands in for a protein's."""
    nodes, degree, inputs, hidden = (12, 2, 5, 6) if dry else (2373, 14, 50, 256)
    generator = torch.Generator().manual_seed(2)
    source = torch.arange(nodes).repeat_interleave(degree)
    target = torch.randint(0, nodes, source.shape, generator=generator)
    edges = torch.cat([torch.stack([source, target]), torch.stack([target, source])], 1)  # both directions: 28 a node
    model = GraphNet(inputs, hidden, 12 if dry else 30, 0.3 if dry else 0.7)
    return Workload("graph", model, (torch.randn(nodes, inputs), edges), "SwiftieH/IGNN on PPI", tol=1e-3 if dry else 1e-4)
