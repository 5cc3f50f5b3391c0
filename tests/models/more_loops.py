"""More forms of loops, as users write them; each with what is expected of it, as in `loops.py`."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_compile import Reason
from tests.models.checkpoints import Checkpointed, CheckpointedDropout, CheckpointedLayers
from tests.models.parts import Case, D, Linear, N, Parts


class FirstFromNetwork(Parts):
    """The initial guess comes from a network of another shape, the first iteration from another map."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.guess(x)) * 0.5
        for i in range(N):
            z = self.g(z, x) if i == 0 else self.f(z, x)
        return z


class FirstInHalf(Parts):
    """The initial state has another dtype than the iterates: the first iteration stays outside."""

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = torch.zeros(x.shape, dtype=torch.bfloat16)
        for _ in range(N):
            z = torch.tanh(self.f.W(z.to(x.dtype)) + self.f.U(x))
        return z


class SecondLast(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.zeros_like(x)
        for _ in range(N):
            old = z
            z = self.f(z, x)
        return z + 0.5 * old, old


class LastInner(Parts):
    """A value from the middle of the last iteration is used."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            h = self.f(z, x)
            z = 0.5 * torch.sin(h)
        return z * h


class Velocity(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = v = torch.zeros_like(x)
        for _ in range(N):
            v = 0.2 * v + 0.8 * (self.f(z, x) - z)
            z = z + v
        return z


class Inner(nn.Module):
    """A module that holds a loop of its own."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.f, self.n = Linear(), n

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        for _ in range(self.n):
            y = self.f(y, x)
        return y


class Nested(nn.Module):
    """Short inner loops: the outer one is the region."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.g = Inner(3), Linear()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(20):
            z = self.g(self.inner(z, x), x)
        return z


class NestedLong(nn.Module):
    """Long inner loops in a short outer one: the inner ones are regions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner(40)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(3):
            z = torch.tanh(self.inner(z, x))
        return z


class OneModuleList(nn.Module):
    """A ModuleList that repeats one module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Linear()] * N)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for layer in self.layers:
            z = layer(z, x)
        return z


class TwoModuleList(nn.Module):
    """Two modules in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Linear(), Linear()] * (N // 2))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for layer in self.layers:
            z = layer(z, x)
        return z


class DictState(Parts):
    def forward(self, x: Tensor) -> Tensor:
        state = {"z": torch.zeros_like(x), "w": torch.zeros(x.shape[0], 2 * D, dtype=x.dtype)}
        for _ in range(N):
            z = self.f(state["z"], x + state["w"][:, :D])
            state = {"w": 0.5 * torch.cat([self.g(z, x), z], 1), "z": z}
        return state["z"] + state["w"].sum(1, keepdim=True)


@dataclasses.dataclass
class State:
    z: Tensor
    memory: Tensor


class DataclassState(Parts):
    """Two tensors of different ranks in a dataclass."""

    def forward(self, x: Tensor) -> Tensor:
        state = State(torch.zeros_like(x), torch.zeros(x.shape[0], 2, D, dtype=x.dtype))
        for _ in range(N):
            z = self.f(state.z, x + 0.2 * state.memory.mean(1))
            state = State(z, 0.4 * torch.stack([z, state.memory[:, 0]], 1))
        return state.z


class MaskInvariant(Parts):
    """A bool and an integer tensor that the loop reads and carries unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        z, mask, order = torch.zeros_like(x), x > 0, torch.arange(D - 1, -1, -1)
        state = (z, mask, order)
        for _ in range(N):
            z, mask, order = state
            state = (torch.where(mask, self.f(z, x), 0.5 * z[:, order]), mask, order)
        return state[0]


class ChunkCat(Parts):
    """A reversible-style update of two halves of the state, and views of it."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(x.shape[0], 2 * D, dtype=x.dtype)
        for _ in range(N):
            a, b = z.chunk(2, dim=1)
            a = self.f(b, x)
            z = torch.cat([a, self.g(a, b)], 1)
        return z


class SetItem(Parts):
    """Writes into slices of a temporary."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            y = 0.9 * self.f(z, x)
            y[:, :2] = 0.1 * x[:, :2]
            y[:, 2:4] *= 0.5
            z = y
        return z


class FillBuffer(Parts):
    """An empty tensor that each iteration makes and fills."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            y = torch.empty_like(z)
            y.copy_(self.f(z, x))
            z = y
        return z


class Einsum(nn.Module):
    """Attention by einsum with a mask, made in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            score = torch.einsum("bid,bjd->bij", self.q(z), z + x).masked_fill(~mask, float("-inf"))
            z = 0.5 * torch.tanh(self.o(torch.einsum("bij,bjd->bid", score.softmax(-1), z + x)))
        return z


class MaskedSDPA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        z, mask = torch.zeros_like(x), torch.ones(T, T, dtype=torch.bool).tril()
        for _ in range(N):
            q, k, v = (t.view(B, T, 2, D // 2).transpose(1, 2) for t in self.qkv(z + x).chunk(3, -1))
            z = 0.5 * F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, D)
        return z


class Convolutions(nn.Module):
    """Strided grouped convolution down, transposed up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = 0.5 * torch.tanh(self.up(F.relu(self.down(z), inplace=True)) + x)
        return z


class InPlaceStep(Parts):
    """`z += h * f(z)` on a state made in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z += 0.5 * (self.f(z.clone(), x) - z)
        return z


class InPlaceInput(Parts):
    """The same on the caller's tensor, which sees it."""

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(10):
            z += 0.5 * (self.f(z.clone(), x.sin()) - z)
        return z


class Closure(Parts):
    """The body is a closure, a partial and a lambda."""

    def forward(self, x: Tensor) -> Tensor:
        def body(gain: float, z: Tensor) -> Tensor:
            return gain * self.f(z, x)

        step = functools.partial(body, 0.9)
        solve = lambda z: step(z)  # noqa: E731
        z = torch.zeros_like(x)
        for _ in range(N):
            z = solve(z)
        return z


class FunctionalCall(Parts):
    """Weights handed to the module from outside: the same tensors in every iteration."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: 0.9 * p for name, p in self.f.named_parameters()}
        z = torch.zeros_like(x)
        for _ in range(N):
            z = torch.func.functional_call(self.f, weights, (z, x))
        return z


class ResultOfALoop(Parts):
    """One loop's result is the next one's operand and the third one's start."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = self.f(z, x)
        w = torch.zeros_like(x)
        for _ in range(N):
            w = self.f(w, z)
        for _ in range(N):
            w = self.g(w, x)
        return w


class CarriedCopy(Parts):
    """A tensor carried through the loop by copies: J has the eigenvalue 1, and the state remembers its start."""

    def forward(self, x: Tensor) -> Tensor:
        z, c = torch.zeros_like(x), 0.5 * x
        for _ in range(N):
            z, c = self.f(z, c), c.clone()
        return z


class Counter(Parts):
    """An integer tensor that counts."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, count = torch.zeros_like(x), torch.zeros((), dtype=torch.int64)
        for _ in range(N):
            z = self.f(z, x)
            count = count + 1
        return z, count


IMAGE, TOKENS = (2, 8, 4, 4), (2, 5, D)

MORE: dict[str, Case] = {
    "first_from_network": Case(FirstFromNetwork, 1),
    "first_in_half": Case(FirstInHalf, 1),
    "second_last": Case(SecondLast, 1),
    "last_inner": Case(LastInner, 1),
    "velocity": Case(Velocity, 1),
    "nested": Case(Nested, 1),
    "nested_long": Case(NestedLong, 3),
    "one_module_list": Case(OneModuleList, 1),
    "two_module_list": Case(TwoModuleList, 1),
    "dict_state": Case(DictState, 1),
    "dataclass_state": Case(DataclassState, 1),
    "mask_invariant": Case(MaskInvariant, 1),
    "chunk_cat": Case(ChunkCat, 1),
    "set_item": Case(SetItem, 1),
    "fill_buffer": Case(FillBuffer, 1),
    "einsum": Case(Einsum, 1, shape=TOKENS),
    "masked_sdpa": Case(MaskedSDPA, 1, shape=TOKENS),
    "convolutions": Case(Convolutions, 1, shape=IMAGE),
    "in_place_step": Case(InPlaceStep, 1),
    "checkpointed": Case(Checkpointed, 1),
    "closure": Case(Closure, 1),
    "functional_call": Case(FunctionalCall, 1),
    "result_of_a_loop": Case(ResultOfALoop, 3),
    # found, and kept: the gradient is not the implicit one
    "carried_copy": Case(CarriedCopy, 1),
    # left alone
    "checkpointed_layers": Case(CheckpointedLayers, 0, Reason.CONTROL_FLOW),
    "checkpointed_dropout": Case(CheckpointedDropout, 0, Reason.RANDOM),
    "counter": Case(Counter, 1),
}
KEPT = {"carried_copy"}
