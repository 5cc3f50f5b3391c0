"""Loops whose exit depends on data, in the ways people write them, each with what is expected of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deq_compile import Reason

from .exit_tests import (
    Allclose,
    BoolOfTensor,
    MinimumSteps,
    NanGuard,
    OrDiverged,
    PerSampleAll,
    TestedEveryFifth,
    ToleranceIsABuffer,
    WhileNotDone,
)
from .exits_left import (
    AttributeWritten,
    CallsCounted,
    CosineTest,
    CounterReturned,
    DependsOnStep,
    EarlyReturnSaysHow,
    FlagReturned,
    GlobalCounter,
    Halving,
    IfInside,
    ListGrows,
    NonlocalCounter,
    Prints,
    StatisticsKept,
)
from .form import CAP, TOL, Cell, Form, iterate
from .parts import D, Linear


class WhileNorm(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z_new, k = self.f(z, x), 0
        while (z_new - z).norm() > TOL and k < CAP:
            z = z_new
            z_new = self.f(z, x)
            k += 1
        return z_new


class WhileItem(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z, err = torch.zeros_like(x), float("inf")
        while err > TOL:
            z_new = self.f(z, x)
            err = (z_new - z).abs().max().item()
            z = z_new
        return z


class WhileTensorError(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z, err = torch.zeros_like(x), torch.tensor(1e9)
        while err > TOL:
            z_new = self.f(z, x)
            err = (z_new - z).norm() / (z_new.norm() + 1e-9)
            z = z_new
        return z


class WhileTrue(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        while True:
            z_new = self.f(z, x)
            if float((z_new - z).detach().norm()) < TOL:
                break
            z = z_new
        return z_new


class ForBreak(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            res = (z_new - z).norm()
            z = z_new
            if res < TOL:
                break
        return z


class ForBreakItem(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            rel = (z_new - z).norm().item() / (1e-8 + z_new.norm().item())
            z = z_new
            if rel < TOL:
                break
        return z


class EarlyReturn(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            if (z_new - z).norm() < TOL:
                return z_new
            z = z_new
        return z


class DampedUndampedTest(Cell):
    """The test looks at the step before damping."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            v = self.f(z, x)
            if (v - z).norm() / (v.norm() + 1e-8) < TOL:
                break
            z = z + 0.7 * (v - z)
        return z


class TwoStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Linear(), Linear()

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(CAP):
            a_new = self.f(a, x + 0.3 * b)
            b_new = self.g(b, 0.3 * a)
            err = torch.maximum((a_new - a).norm(), (b_new - b).norm())
            a, b = a_new, b_new
            if err < TOL:
                break
        return a + b


class LastResidualReturned(Cell):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            res = (z_new - z).norm()
            z = z_new
            if res < TOL:
                break
        return z, res


class Submodule(nn.Module):
    """A solver module inside a model, called on something computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.solve, self.head = nn.Linear(D, D), ForBreak(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.solve(torch.relu(self.embed(x))))


class InAFunction(Cell):
    def forward(self, x: Tensor) -> Tensor:
        return iterate(lambda z: self.f(z, x), torch.zeros_like(x))


class NoGradAttached(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(CAP):
                z_new = self.f(z, x)
                if (z_new - z).norm() < TOL:
                    z = z_new
                    break
                z = z_new
        return self.f(z, x)


class InsideALoop(Cell):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(2):
            z = torch.zeros_like(x)
            for _ in range(CAP):
                z_new = self.f(z, y)
                diff = (z_new - z).abs().max()
                z = z_new
                if diff < TOL:
                    break
            y = 2 * z
        return y


class InsideCheckpoint(Cell):
    def solve(self, x: Tensor) -> Tensor:
        return iterate(lambda z: self.f(z, x), torch.zeros_like(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.solve, x, use_reentrant=False)


class BreakElsewhere(nn.Module):
    """A graph break before the region, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = Linear(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        torch._dynamo.graph_break()
        z = iterate(lambda z: self.f(z, y), torch.zeros_like(y))
        torch._dynamo.graph_break()
        return self.head(z)


class OneOfTwo(nn.Module):
    """Two loops, of which one grows a list."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Linear(), Linear()

    def forward(self, x: Tensor) -> Tensor:
        z = iterate(lambda z: self.f(z, x), torch.zeros_like(x))
        trace = []
        for _ in range(CAP):
            z_new = self.g(z, x)
            trace.append((z_new - z).norm())
            z = z_new
            if trace[-1] < TOL:
                break
        return z * len(trace)


class GradientDescent(Cell):
    """The test looks at the step, not at an image."""

    def forward(self, x: Tensor) -> Tensor:
        A = self.f.W.weight.T @ self.f.W.weight + torch.eye(D).to(x)
        z = torch.zeros_like(x)
        while True:
            g = z @ A - x
            if g.norm() < TOL:
                break
            z = z - 0.5 * g
        return z


class StatesUpdatedInPlace(nn.Module):
    """One dictionary, whose entries are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Linear()

    def forward(self, x: Tensor) -> Tensor:
        state = {"z": torch.zeros_like(x)}
        for _ in range(CAP):
            z_new = self.f(state["z"], x)
            err = (z_new - state["z"]).norm()
            state["z"] = z_new
            if err < TOL:
                break
        return state["z"]


class DictOfStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Linear(), Linear()

    def forward(self, x: Tensor) -> Tensor:
        state = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
        for _ in range(CAP):
            new = {"a": self.f(state["a"], x), "b": self.g(state["b"], 0.3 * state["a"])}
            err = max((new[name] - state[name]).norm().item() for name in state)
            state = new
            if err < TOL:
                break
        return state["a"] + state["b"]


FORMS: dict[str, Form] = {
    "while_norm": Form(WhileNorm),
    "while_item": Form(WhileItem),
    "while_tensor_error": Form(WhileTensorError),
    "while_true": Form(WhileTrue),
    "for_break": Form(ForBreak),
    "for_break_item": Form(ForBreakItem),
    "per_sample_all": Form(PerSampleAll),
    "allclose": Form(Allclose),
    "early_return": Form(EarlyReturn),
    "damped": Form(DampedUndampedTest),
    "nan_guard": Form(NanGuard),
    "two_states": Form(TwoStates),
    "while_not_done": Form(WhileNotDone),
    "bool_of_tensor": Form(BoolOfTensor),
    "or_diverged": Form(OrDiverged),
    "minimum_steps": Form(MinimumSteps, refused=Reason.TOO_SHORT),
    "tolerance_is_a_buffer": Form(ToleranceIsABuffer),
    "gradient_descent": Form(GradientDescent),
    "states_updated_in_place": Form(StatesUpdatedInPlace),
    "dict_of_states": Form(DictOfStates),
    "last_residual_returned": Form(LastResidualReturned),
    "submodule": Form(Submodule),
    "in_a_function": Form(InAFunction),
    "no_grad_attached": Form(NoGradAttached),
    "inside_a_loop": Form(InsideALoop, regions=2),
    "inside_checkpoint": Form(InsideCheckpoint),
    "break_elsewhere": Form(BreakElsewhere, breaks=2),
    "one_of_two": Form(OneOfTwo, breaks=1, refused=Reason.SIDE_EFFECT),
    "counter_returned": Form(CounterReturned),
    "flag_returned": Form(FlagReturned, 0, 1, Reason.COUNTER),
    "early_return_says_how": Form(EarlyReturnSaysHow, 0, 1, Reason.COUNTER),
    "attribute_written": Form(AttributeWritten),
    "calls_counted": Form(CallsCounted, 0, 1, Reason.SIDE_EFFECT),
    "statistics_kept": Form(StatisticsKept, 0, 1, Reason.SIDE_EFFECT),
    "global_counter": Form(GlobalCounter, 0, 1, Reason.SIDE_EFFECT),
    "nonlocal_counter": Form(NonlocalCounter, 0, 1, Reason.SIDE_EFFECT),
    "list_grows": Form(ListGrows, 0, 1, Reason.SIDE_EFFECT),
    "halving": Form(Halving, 0, 1, Reason.EXIT_TEST),
    "cosine_test": Form(CosineTest, 0, 1, Reason.EXIT_TEST),
    "depends_on_step": Form(DependsOnStep, 0, 1, Reason.OTHER_CONSTANT),
    "tested_every_fifth": Form(TestedEveryFifth, 0, 1),
    "prints": Form(Prints),
    "if_inside": Form(IfInside, 0, 1),
}
