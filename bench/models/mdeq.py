"""A multiscale DEQ (Bai et al., arXiv 2006.08656): four scales, a residual block each, every scale fused into every other.

Written in the style of the public code: GroupNorm, in-place ReLU, `out += residual`, a list of states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import scale_weights


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm, the injection added in between, and a residual connection; `expansion` times as many
    channels between the two."""

    def __init__(self, channels: int, groups: int, expansion: int = 1) -> None:
        super().__init__()
        inner = channels * expansion
        self.conv1, self.conv2 = conv3x3(channels, inner), conv3x3(inner, channels)
        self.gn1, self.gn2, self.gn3 = (nn.GroupNorm(groups, c) for c in (inner, channels, channels))
        self.relu, self.relu3 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, injection: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.gn1(self.conv1(x)))
        out = self.conv2(out) + injection
        out = self.gn2(out)
        out += residual
        return self.gn3(self.relu3(out))


class Downsample(nn.Module):
    """A fine scale to one `steps` octaves coarser: that many strided convolutions."""

    def __init__(self, inputs: int, outputs: int, steps: int, groups: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in range(steps):
            last = step == steps - 1
            width = outputs if last else inputs
            layers += [conv3x3(inputs, width, 2), nn.GroupNorm(groups, width)]
            layers += [] if last else [nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Upsample(nn.Module):
    def __init__(self, inputs: int, outputs: int, steps: int, groups: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.GroupNorm(groups, outputs))
        self.factor = 2.0**steps

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.net(x), scale_factor=self.factor, mode="nearest")


class MDEQModule(nn.Module):
    """One application of f: a block a scale, then the sum over all scales in each."""

    def __init__(self, channels: tuple[int, ...], groups: int, expansion: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(BasicBlock(c, groups, expansion) for c in channels)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._fuse(j, i, channels, groups) for j in range(len(channels))) for i in range(len(channels))
        )
        self.post = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c, c, 1, bias=False), nn.GroupNorm(groups, c)) for c in channels
        )

    @staticmethod
    def _fuse(source: int, target: int, channels: tuple[int, ...], groups: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        kind = Upsample if source > target else Downsample
        return kind(channels[source], channels[target], abs(source - target), groups)

    def forward(self, x: list[Tensor], injection: list[Tensor]) -> list[Tensor]:
        x = [branch(z, u) for branch, z, u in zip(self.branches, x, injection, strict=True)]
        fused: list[Tensor] = []
        for fuse, post in zip(self.fuse, self.post, strict=True):
            y = torch.zeros_like(x[len(fused)])
            for layer, z in zip(fuse, x, strict=True):  # type: ignore[call-overload]
                y += layer(z)
            fused.append(post(y))
        return fused


@torch.no_grad()
def scale_norms(f: MDEQModule, gain: float) -> None:
    """Make a body contract. A norm divides by its input's size, so it does where norms on the state's way are small beside those
    on the injection's way: the first of a block, those between scales, and the last of all."""
    for branch in f.branches:
        branch.gn1.weight.fill_(0.2 * gain)  # type: ignore[union-attr, operator]
    for norm in [*f.fuse.modules(), *f.post.modules()]:
        if isinstance(norm, nn.GroupNorm):
            norm.weight.fill_(gain)


class MDEQ(nn.Module):
    """Image classifier; the state is one tensor a scale, each coarser one half the size.

    x: (B, 3, H, W), H and W multiples of 8. Returns (B, classes).
    """

    def __init__(
        self, channels: tuple[int, ...] = (4, 4, 8, 8), classes: int = 10, iterations: int = 25, gain: float = 0.1
    ) -> None:
        super().__init__()
        self.channels, self.iterations = channels, iterations
        self.stems = nn.ModuleList(conv3x3(3, c) for c in channels)
        self.f = MDEQModule(channels, groups=2)
        self.head = nn.Linear(sum(channels), classes)
        scale_weights(self, 1.0)
        scale_norms(self.f, gain)

    def forward(self, x: Tensor) -> Tensor:
        injection = [stem(F.avg_pool2d(x, 2**scale)) for scale, stem in enumerate(self.stems)]
        z = [torch.zeros_like(u) for u in injection]
        for _ in range(self.iterations):
            z = self.f(z, injection)
        return self.head(torch.cat([y.mean((2, 3)) for y in z], 1))


def make() -> tuple[MDEQ, tuple[Tensor, ...]]:
    """Four scales of 16x16 to 2x2, two images."""
    torch.manual_seed(0)
    return MDEQ(), (torch.randn(2, 3, 16, 16),)
