"""Models whose loop prints, logs, or shows a bar: progress that people watch."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .observations import CAP, TOL, Told

log = logging.getLogger("a users model")


class PrintsNumbers(Told):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            print("at", k, gap)
            z = new
            if gap < TOL:
                break
        return z


class PrintsText(Told):
    def forward(self, x: Tensor) -> Tensor:
        z, k, gap = torch.zeros_like(x), 0, 1.0
        while gap > TOL and k < CAP:
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            k += 1
            print(f"iteration {k} of {CAP}: {gap:.2e}", flush=True)
            z = new
        return z


class Logs(Told):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            gap = (new - z).norm() / new.norm()
            log.warning("iteration %d: %.2e", k + 1, gap.item())
            z = new
            if gap < TOL:
                break
        return z


class PrintsATensor(Told):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            new = self.f(z, x)
            gap = (new - z).norm() / new.norm()
            print("gap", gap)
            z = new
            if gap < TOL:
                break
        return z


class PrintsBehindTheTest(Told):
    """The last line is of the iteration before the last."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < TOL:
                break
            print(f"iteration {k}: {gap:.2e}")
        return z


class PrintsInAFixedCount(Told):
    """No test ends it: each line is one of so many."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            print(k, (new - z).norm())
            z = new
        return z


class PrintsARate(Told):
    """A number that is neither one of the solve's nor the same in all iterations."""

    def forward(self, x: Tensor) -> Tensor:
        z, rate = torch.zeros_like(x), 1.0
        for _ in range(CAP):
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            rate *= 0.5
            print(rate, gap)
            z = new
            if gap < TOL:
                break
        return z


class PrintsAModule(Told):
    """What it says is no number, and no text."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            print(self.W, gap)
            z = new
            if gap < TOL:
                break
        return z


class PrintsEveryTenth(Told):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if self.calls == 0 and k % 10 == 0:
                print(f"iteration {k}: {gap:.2e}")
            if gap < TOL:
                break
        return z


class PrintsEveryThird(Told):
    """First in the third iteration, among other statements."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            if (k + 1) % 3 == 0:
                print("step", k + 1)
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < TOL:
                break
        self.depth = k + 1
        return z


class PrintsAndDoes(Told):
    """The branch does more than it says: in every tenth iteration only."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            if k % 10 == 9:
                print(k)
                new = 0.5 * new
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < 1e-12:
                break
        return z


class AFunctionOfThatName(Told):
    """`log` is no logger's."""

    def log(self, z: Tensor) -> None:
        self.residual = z.detach().sum()
        z.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            if k % 10 == 9:
                self.log(new)
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < 1e-12:
                break
        return z


class OftenAFunctionOfThatName(AFunctionOfThatName):
    """The same in a loop that nothing but its count ends."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(30):
            new = self.f(z, x)
            if k % 10 == 9:
                self.log(new)
            z = new
        return z


class PrintsACall(Told):
    """What is printed is made by a function that does something."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.ones(())

    def shrink(self) -> int:
        self.gain = self.gain * 0.5
        return 1

    def forward(self, x: Tensor) -> Tensor:
        self.gain = torch.ones(())
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x) * self.gain
            if k % 10 == 9:
                print(self.shrink())
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < 1e-12:
                break
        return z


class PrintsAProperty(PrintsACall):
    @property
    def shrunk(self) -> int:
        return self.shrink()

    def forward(self, x: Tensor) -> Tensor:
        self.gain = torch.ones(())
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x) * self.gain
            if k % 10 == 9:
                print(self.shrunk)
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < 1e-12:
                break
        return z


class PrintsAWrite(Told):
    def forward(self, x: Tensor) -> Tensor:
        z, gain = torch.zeros_like(x), torch.ones(())
        for k in range(CAP):
            new = self.f(z, x) * gain
            if k % 10 == 9:
                print(gain.mul_(0.5).sum())
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < 1e-12:
                break
        return z


SERVED = (PrintsNumbers, PrintsText, Logs, PrintsATensor, PrintsBehindTheTest, PrintsEveryTenth, PrintsEveryThird)
LEFT_ALONE = (
    PrintsInAFixedCount, PrintsARate, PrintsAModule, PrintsAndDoes, PrintsACall, PrintsAProperty, PrintsAWrite,
    AFunctionOfThatName,
)  # fmt: skip
