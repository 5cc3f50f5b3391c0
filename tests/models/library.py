"""Models built with TorchDEQ, as its documentation writes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq import apply_norm, get_deq, reset_deq

from deq_compile import Reason

from .parts import ConvNorm, D, Linear, contract


class One(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.f, self.deq = Linear(), get_deq(**config)

    def forward(self, x: Tensor) -> Tensor:
        z_out, _ = self.deq(lambda z: self.f(z, x), torch.zeros_like(x))
        return z_out[-1]


class Two(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.f, self.g, self.deq = Linear(), Linear(), get_deq(**config)

    def forward(self, x: Tensor) -> Tensor:
        def func(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.f(a, x + 0.3 * b), self.g(b, 0.3 * a)

        z_out, info = self.deq(func, [torch.zeros_like(x), torch.zeros_like(x)])
        a, b = z_out[-1]
        return a + b + 0 * info["nstep"].mean()


class Image(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.f, self.deq = ConvNorm(), get_deq(**config)

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(lambda z: self.f(z, x), torch.zeros_like(x))[0][-1]


class Normed(nn.Module):
    """Weights normalised afresh in every forward."""

    norm = "weight_norm"

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.f, self.deq = Linear(), get_deq(**config)
        contract(self.f)
        apply_norm(self.f, norm_type=self.norm)

    def forward(self, x: Tensor) -> Tensor:
        reset_deq(self.f)
        return self.deq(lambda z: self.f(z, x), torch.zeros_like(x))[0][-1]


class SpectralNormed(Normed):
    norm = "spectral_norm"


class Sampled(One):
    """A loss is put on every state that is returned."""

    def forward(self, x: Tensor) -> Tensor:
        z_out, _ = self.deq(lambda z: self.f(z, x), torch.zeros_like(x))
        return torch.stack(list(z_out)).mean(0)


class Asked(One):
    """Solver arguments of one call."""

    asked: dict[str, Any] = {"f_max_iter": 60, "tau": 0.9}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(lambda z: self.f(z, x), torch.zeros_like(x), solver_kwargs=self.asked)[0][-1]


class AskedFinal(Asked):
    asked: dict[str, Any] = {"return_final": True}  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class Library:
    model: type[nn.Module]
    config: dict[str, Any]
    train: bool = True
    refused: Reason | None = None
    shape: tuple[int, ...] = (4, D)

    @property
    def regions(self) -> int:
        return 0 if self.refused is not None else 1

    @property
    def breaks(self) -> int:
        return 1 if self.refused is not None else 0

    @property
    def kind(self) -> str:
        return f"TorchDEQ {_SOLVERS[self.config.get('f_solver', 'fixed_point_iter')]}"

    @property
    def options(self) -> dict[str, Any]:
        return {"tol": None, "backward_tol": None}  # theirs hold

    def make(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        cap = 80 if self.refused is None else 8  # their own solver is traced in pieces, a graph for each of its functions
        tight = {"f_tol": 1e-6, "b_tol": 1e-6, "f_max_iter": cap, "b_max_iter": cap}
        model = self.model(**{**tight, **self.config})
        if not isinstance(model, Normed):
            contract(model)
        return model.train(self.train), torch.randn(self.shape, dtype=torch.float64).float()


_SOLVERS = {"fixed_point_iter": "fixed_point_iter", "broyden": "broyden_solver", "anderson": "anderson_solver"}
IFT, HOOK = {"ift": True}, {"hook_ift": True}
INDEXING = {"core": "indexing"}
IMAGE = (2, 8, 6, 6)

LIBRARY: dict[str, Library] = {
    "ift": Library(One, IFT),
    "ift, relative": Library(One, {**IFT, "f_stop_mode": "rel", "b_stop_mode": "rel"}),
    "ift, broyden": Library(One, {**IFT, "f_solver": "broyden", "b_solver": "broyden"}),
    "ift, anderson": Library(One, {**IFT, "f_solver": "anderson", "b_solver": "anderson"}),
    "ift, broyden, then fixed point": Library(One, {**IFT, "f_solver": "broyden", "b_solver": "fixed_point_iter"}),
    "hook_ift": Library(One, HOOK),
    "hook_ift, broyden": Library(One, {**HOOK, "f_solver": "broyden", "b_solver": "broyden"}),
    "hook_ift, anderson": Library(One, {**HOOK, "f_solver": "anderson", "b_solver": "anderson"}),
    "phantom": Library(One, {}),
    "phantom, 4 damped steps": Library(One, {"grad": 4, "tau": 0.5}),
    "phantom, broyden, 2 steps": Library(One, {"grad": 2, "f_solver": "broyden"}),
    "phantom, sampled steps": Library(Sampled, {"grad": 4, "sup_gap": 2, "tau": 0.8}),
    "phantom, chosen steps": Library(Sampled, {"grad": 4, "sup_loc": [1, 3]}),
    "indexing, ift": Library(One, {**INDEXING, **IFT}),
    "indexing, ift, broyden": Library(One, {**INDEXING, **IFT, "f_solver": "broyden", "b_solver": "broyden"}),
    "indexing, hook_ift, anderson": Library(One, {**INDEXING, **HOOK, "f_solver": "anderson"}),
    "indexing, phantom": Library(One, {**INDEXING, "grad": 3, "tau": 0.7}),
    "two states, ift": Library(Two, IFT),
    "two states, ift, broyden": Library(Two, {**IFT, "f_solver": "broyden", "b_solver": "broyden"}),
    "two states, hook_ift": Library(Two, HOOK),
    "two states, phantom": Library(Two, {"grad": 2, "tau": 0.8}),
    "two states, indexing, ift": Library(Two, {**INDEXING, **IFT}),
    "image, ift, broyden": Library(Image, {**IFT, "f_solver": "broyden"}, shape=IMAGE),
    "image, phantom": Library(Image, {"grad": 2}, shape=IMAGE),
    "weight norm": Library(Normed, IFT),
    "spectral norm": Library(SpectralNormed, IFT),
    "solver arguments of one call": Library(Asked, IFT),
    "eval, ift": Library(One, IFT, train=False),
    "eval, broyden": Library(One, {**IFT, "f_solver": "broyden", "eval_factor": 2.0}, train=False),
    "eval, indexing": Library(One, {**INDEXING, **IFT}, train=False),
    "eval, two states": Library(Two, IFT, train=False),
    "trajectory, sliced": Library(Sampled, {**IFT, "n_states": 2}, refused=Reason.TRAJECTORY),
    "trajectory, indexing": Library(Sampled, {**INDEXING, "indexing": [3, 6]}, refused=Reason.TRAJECTORY),
    "return_final": Library(AskedFinal, IFT, refused=Reason.LIBRARY),
}
