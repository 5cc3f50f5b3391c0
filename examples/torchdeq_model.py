"""A model written with TorchDEQ, unchanged, under `torch.compile(backend="deq")`.

Value, gradients and the time of a training step, by TorchDEQ in eager mode and compiled. Needs: pip install torchdeq

    python examples/torchdeq_model.py --width 512
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from torchdeq import get_deq

from deq_compile import explain


class Model(nn.Module):
    """As TorchDEQ's documentation writes one: the fixed point of z = tanh(W z + U x), then a linear head. x [B, D] -> [B, 10]"""

    def __init__(self, width=256, f_tol=1e-4):
        super().__init__()
        self.inject, self.cell, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 10)
        nn.init.orthogonal_(self.cell.weight, gain=0.8)
        self.deq = get_deq(
            ift=True, f_solver="broyden", f_max_iter=40, f_tol=f_tol, b_solver="broyden", b_max_iter=40, b_tol=f_tol
        )

    def forward(self, x):
        injected = self.inject(x)
        z, _ = self.deq(lambda z: torch.tanh(self.cell(z) + injected), torch.zeros_like(injected))
        return self.head(z[-1])


def gradients(call, model, x):
    """The value [B, 10] of a call and the gradients of all parameters for the loss (value ** 2).sum() / 2, in float64."""
    model.zero_grad()
    value = call(x)
    (value.square().sum() / 2).backward()
    return [value.detach().double(), *(p.grad.double() for p in model.parameters())]


def error(found, exact):
    """The largest relative difference of value and gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def step_times(calls, model, x, repeats):
    """Median seconds of a forward and backward, the calls taken in turns so that all meet the same machine."""
    taken = [[] for _ in calls]
    for _ in range(repeats):
        for call, seconds in zip(calls, taken, strict=True):
            begun = time.perf_counter()
            call(x).sum().backward()
            seconds.append(time.perf_counter() - begun)
    return [statistics.median(seconds) for seconds in taken]


def main(width=256, batch=32, repeats=15, options=None):
    """The report, the errors of TorchDEQ's gradients and of ours against float64, and the times of a step."""
    torch.manual_seed(0)
    model, x = Model(width), torch.randn(batch, width)
    precise = Model(width, f_tol=1e-10).double()
    precise.load_state_dict(copy.deepcopy(model.state_dict()))
    exact = gradients(precise, precise, x.double())
    compiled = torch.compile(model, backend="deq", options=options)
    found = {"torchdeq_error": error(gradients(model, model, x), exact), "deq_error": error(gradients(compiled, model, x), exact)}
    for _ in range(3):  # the first calls are compared with the library's own
        gradients(compiled, model, x)
    found["torchdeq_seconds"], found["deq_seconds"] = step_times([model, compiled], model, x, repeats)
    found["report"] = explain(model, **(options or {}))(x)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="size of the state (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps (default %(default)s)")
    found = main(**vars(parser.parse_args()))
    print(found["report"])
    for name in ("torchdeq", "deq"):
        seconds, off = found[f"{name}_seconds"], found[f"{name}_error"]
        print(f"{name:<9} a step {1e3 * seconds:6.1f} ms, error of value and gradients {off:.0e}")
