"""Small models with a loop in every form users write, each with what is expected of it.

`regions` is the number of solves, `refused` the Reason by which the loop is left alone (None: no loop is seen at all).
Bodies are scaled to contract, so that a loop of 60 reaches its fixed point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deq_compile import Reason

from .parts import Block, Case, ConvNorm, D, LayerNormMLP, Linear, Loop, N, Parts


class Damped(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = 0.5 * z + 0.5 * self.f(z, x)
        return z


class ResidualList(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, residuals = torch.zeros_like(x), []
        for _ in range(N):
            new = self.f(z, x)
            residuals.append((new - z).norm())
            z = new
        return z, torch.stack(residuals)


class LastResidual(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.zeros_like(x)
        for _ in range(N):
            new = self.f(z, x)
            residual = (new - z).norm()
            z = new
        return z, residual


class TwoStates(Parts):
    """The second state reads the new first one."""

    def forward(self, x: Tensor) -> Tensor:
        z, w = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(N):
            z = self.f(z, w)
            w = self.g(w, x + z)
        return z + w


class TwoStatesJacobi(Parts):
    def forward(self, x: Tensor) -> Tensor:
        state = (torch.zeros_like(x), torch.ones_like(x))
        for _ in range(N):
            state = (self.f(state[0], state[1] + x), self.g(state[1], state[0]))
        return state[0] + state[1]


class SameInitial(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = w = torch.zeros_like(x)
        for _ in range(N):
            z, w = self.f(z, w), self.g(w, x)
        return z + w


class SpecialFirst(Parts):
    """The initial guess repeats an operation of the body."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.f.U(x))
        for _ in range(N):
            z = self.f(z, x)
        return z


class StartsAtInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(N):
            z = self.f(z, x)
        return z


class InPlaceState(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = z.mul_(0.5).add_(0.5 * self.f(z, x))
        return z


class NoGradAttached(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(N):
                z = self.f(z, x)
        return self.f(z.detach(), x)


class BatchNorm(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = self.bn(self.f(z, x))
        return z


class Guarded(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            assert torch.isfinite(z).all(), "diverged"  # at the end CPython 3.12 makes a branch of it that Dynamo breaks at
            z = self.f(z, x)
        return z


class Dropout(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = self.drop(self.f(z, x))
        return z


class Recurrent(Parts):
    """A recurrent net over a sequence: another input each step."""

    def forward(self, x: Tensor) -> Tensor:
        z, sequence = torch.zeros_like(x), torch.stack([x * i for i in range(10)])
        for i in range(10):
            z = self.f(z, sequence[i])
        return z


class GRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = self.cell(x, z)
        return z


class StepSize(Parts):
    """A constant that depends on the iteration."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for i in range(10):
            z = z + (self.f(z, x) - z) * (1.0 / (i + 1))
        return z


class Momentum(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = old = torch.zeros_like(x)
        for _ in range(N):
            z, old = self.f(z, x) + 0.1 * (z - old), z
        return z


class ThirdOrder(Parts):
    """Reads an iterate three back: no rotation of the loop body turns that into one state."""

    def forward(self, x: Tensor) -> Tensor:
        z = a = b = torch.zeros_like(x)
        for _ in range(N):
            z, a, b = self.f(z, x) + 0.1 * b, z, a
        return z


class TwoLoops(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = self.f(z, x)
        y, w = torch.relu(z), torch.zeros_like(x)
        for _ in range(N - 10):
            w = self.g(w, y)
        return w


class Stacked(nn.Module):
    """Distinct weights: a deep network, not a fixed point."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Linear() for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for layer in self.layers:
            z = layer(z, x)
        return z


class Trajectory(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z, zs = torch.zeros_like(x), []
        for _ in range(10):
            z = self.f(z, x)
            zs.append(z)
        return zs[-1] + 0.1 * zs[4]


class Cat(Parts):
    """The injection is computed before the loop; the body slices and concatenates."""

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.f.U(x), torch.zeros_like(x)
        for _ in range(N):
            z = torch.cat([torch.tanh(self.f.W(z) + u)[:, :8], z[:, 8:] * 0.5], 1)
        return z


class MultiScale(Parts):
    """Three states, all of which read the sum."""

    def forward(self, x: Tensor) -> Tensor:
        zs = [torch.zeros_like(x) for _ in range(3)]
        for _ in range(N):
            zs = [self.f(z, x + 0.3 * sum(zs)) for z in zs]
        return sum(zs)  # type: ignore[return-value]


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = torch.tanh(0.3 * self.layer(z) + x)
        return z


class SpectralNorm(nn.Module):
    """In training, reading the weight updates the power iteration's vectors: read once, before the loop."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(D, D))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        z, weight = torch.zeros_like(x), self.layer.weight
        for _ in range(N):
            z = torch.tanh(0.5 * F.linear(z, self.layer.weight if self.inside else weight) + x)
        return z


class Autocast(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(N):
                z = self.f(z, x)
        return z


class AutocastInside(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.f(z, x).float()
        return z


class Mutates(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            self.count += 1  # type: ignore[assignment]
            z = self.f(z, x)
        return z


class Short(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            z = self.f(z, x)
        return z


IMAGE = (2, 8, 6, 6)
TOKENS = (2, 5, 32)

CASES: dict[str, Case] = {
    "linear": Case(lambda: Loop(Linear()), 1),
    "linear_100": Case(lambda: Loop(Linear(), 100), 1),
    "layernorm_mlp": Case(lambda: Loop(LayerNormMLP()), 1),
    "conv": Case(lambda: Loop(ConvNorm()), 1, shape=IMAGE),
    "transformer": Case(lambda: Loop(Block()), 1, shape=TOKENS),
    "damped": Case(Damped, 1),
    "two_states": Case(TwoStates, 1),
    "two_states_jacobi": Case(TwoStatesJacobi, 1),
    "same_initial": Case(SameInitial, 1),
    "special_first": Case(SpecialFirst, 1),
    "starts_at_input": Case(StartsAtInput, 1),
    "in_place_state": Case(InPlaceState, 1),
    "no_grad_attached": Case(NoGradAttached, 1),
    "last_residual": Case(LastResidual, 1),
    "gru": Case(GRU, 1),
    "momentum": Case(Momentum, 1),
    "two_loops": Case(TwoLoops, 2),
    "cat": Case(Cat, 1),
    "multi_scale": Case(MultiScale, 1),
    "weight_norm": Case(WeightNorm, 1),
    "spectral_norm": Case(SpectralNorm, 1),
    "autocast": Case(Autocast, 1),
    "autocast_inside": Case(AutocastInside, 1),
    # left alone
    "short": Case(Short, 0, Reason.TOO_SHORT),
    "three": Case(lambda: Loop(Linear(), 3), 0, Reason.TOO_SHORT),
    "residual_list": Case(ResidualList, 0, Reason.ESCAPES),
    "trajectory": Case(Trajectory, 0, Reason.ESCAPES),
    "batch_norm": Case(BatchNorm, 0, Reason.BATCH_NORM),
    "guarded": Case(Guarded, 0, Reason.ASSERTION),
    "dropout": Case(Dropout, 0, Reason.RANDOM),
    "recurrent": Case(Recurrent, 0, Reason.OTHER_CONSTANT),
    "stacked": Case(Stacked, 0, Reason.OTHER_INPUT),
    "step_size": Case(StepSize, 0, Reason.OTHER_CONSTANT),
    "third_order": Case(ThirdOrder, 0, Reason.HIGHER_ORDER),
    "mutates": Case(Mutates, 0, Reason.MUTATION),
    "spectral_norm_inside": Case(lambda: SpectralNorm(inside=True), 0, Reason.MUTATION),
}
