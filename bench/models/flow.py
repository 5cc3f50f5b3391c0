"""A DEQ-Flow-like update (Bai et al., arXiv 2204.08442): a separable ConvGRU whose hidden state and flow iterate together.

The correlation volume is looked up at the current flow by bilinear sampling, as in RAFT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import scale_weights


class SepConvGRU(nn.Module):
    """A GRU of 1x5 convolutions, then one of 5x1."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        total = hidden + inputs
        self.convz1, self.convr1, self.convq1 = (nn.Conv2d(total, hidden, (1, 5), padding=(0, 2)) for _ in range(3))
        self.convz2, self.convr2, self.convq2 = (nn.Conv2d(total, hidden, (5, 1), padding=(2, 0)) for _ in range(3))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        hx = torch.cat([h, x], dim=1)
        z, r = torch.sigmoid(self.convz1(hx)), torch.sigmoid(self.convr1(hx))
        q = torch.tanh(self.convq1(torch.cat([r * h, x], dim=1)))
        h = (1 - z) * h + z * q
        hx = torch.cat([h, x], dim=1)
        z, r = torch.sigmoid(self.convz2(hx)), torch.sigmoid(self.convr2(hx))
        q = torch.tanh(self.convq2(torch.cat([r * h, x], dim=1)))
        return (1 - z) * h + z * q


class UpdateBlock(nn.Module):
    def __init__(self, hidden: int, context: int, correlation: int) -> None:
        super().__init__()
        self.convc, self.convf = nn.Conv2d(correlation, 8, 1), nn.Conv2d(2, 8, 3, padding=1)
        self.conv = nn.Conv2d(16, 6, 3, padding=1)
        self.gru = SepConvGRU(hidden, context + 8)
        self.flow_head = nn.Sequential(nn.Conv2d(hidden, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3, padding=1))

    def forward(self, net: Tensor, inp: Tensor, corr: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        motion = F.relu(self.conv(torch.cat([F.relu(self.convc(corr)), F.relu(self.convf(flow))], dim=1)))
        net = self.gru(net, torch.cat([inp, motion, flow], dim=1))
        return net, self.flow_head(net)


class DEQFlow(nn.Module):
    """Optical flow from two feature maps. first, second: (B, C, H, W). Returns the flow (B, 2, H, W), in pixels."""

    def __init__(self, features: int = 6, hidden: int = 8, context: int = 4, iterations: int = 30, radius: int = 1) -> None:
        super().__init__()
        self.hidden, self.iterations, self.radius = hidden, iterations, radius
        self.context = nn.Conv2d(features, hidden + context, 3, padding=1)
        self.update_block = UpdateBlock(hidden, context, (2 * radius + 1) ** 2)
        scale_weights(self.update_block, 0.5)

    def lookup(self, first: Tensor, second: Tensor, coords: Tensor) -> Tensor:
        """Correlation of `first` with `second` around `coords` (B, 2, H, W): (B, (2 radius + 1)^2, H, W)."""
        H, W = first.shape[2:]
        found = []
        for dy in range(-self.radius, self.radius + 1):
            for dx in range(-self.radius, self.radius + 1):
                x = 2 * (coords[:, 0] + dx) / (W - 1) - 1
                y = 2 * (coords[:, 1] + dy) / (H - 1) - 1
                sampled = F.grid_sample(second, torch.stack([x, y], dim=-1), align_corners=True)
                found.append((first * sampled).mean(1))
        return torch.stack(found, dim=1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        B, _, H, W = first.shape
        net, inp = torch.split(self.context(first), [self.hidden, self.context.out_channels - self.hidden], dim=1)
        net, inp = torch.tanh(net), torch.relu(inp)
        ys, xs = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        coords0 = torch.stack([xs, ys]).to(first)[None].repeat(B, 1, 1, 1)
        coords1 = coords0.clone()
        for _ in range(self.iterations):
            corr = self.lookup(first, second, coords1)
            net, delta = self.update_block(net, inp, corr, coords1 - coords0)
            coords1 = coords0 + delta
        return coords1 - coords0


def make() -> tuple[DEQFlow, tuple[Tensor, ...]]:
    """Two pairs of 8x8 feature maps."""
    torch.manual_seed(0)
    return DEQFlow(), (torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8))
