"""Training a model with each backward mode: accuracy and time, over several seeds.

corner  digits on an 8 x 8 grid of cells, a convolutional body, and a head that sees one corner cell only: the rest of the image
        has to travel there through the equilibrium.
recall  key, value, key, value, ..., query: name the value that followed the query's key. One transformer block; finding a
        predecessor and looking it up takes two rounds of attention, so it has to use its depth.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deq_compile
from deq_compile import fixed_point, record_solves
from deq_compile.testing import jac_reg, solve

from .bodies import CLASSES, TRAINING_SAMPLES, ConvBlock, TransformerBlock, digits
from .modes import MODES, Mode


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One training run.

    accuracy    on the test set, with the fixed point solved to 1e-4
    seconds     CPU time of the training steps; backward_seconds that of their backwards
    products    VJPs a step, mean; iterations evaluations of the body a step, mean over samples
    converged   share of the samples of the last 50 steps whose forward reached its tolerance
    """

    task: str
    mode: str
    seed: int
    accuracy: float
    seconds: float
    backward_seconds: float
    products: float
    iterations: float
    converged: float


class Corner(nn.Module):
    steps, batch, rate, regularise = 300, 24, 3e-3, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = ConvBlock(channels=12, residual=False), nn.Linear(12, CLASSES)
        images, labels = digits()
        self.x, self.y = images.view(-1, 1, 8, 8) * 2 - 0.6, labels
        self.width = 12 * 64

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        i = torch.randint(0, TRAINING_SAMPLES, (count,))
        return self.x[i], self.y[i]

    def test(self) -> tuple[Tensor, Tensor]:
        return self.x[TRAINING_SAMPLES:], self.y[TRAINING_SAMPLES:]

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def read(self, z: Tensor) -> Tensor:
        return self.head(z.view(-1, 12, 64)[:, :, 0])


class Recall(nn.Module):
    steps, batch, rate, regularise = 700, 48, 3e-3, 0.1
    pairs, symbols, dim = 2, 5, 32

    def __init__(self) -> None:
        super().__init__()
        length = 2 * self.pairs + 1
        self.body, self.head = TransformerBlock(length, self.dim), nn.Linear(self.dim, self.symbols)
        self.embed, self.position = nn.Embedding(2 * self.symbols, self.dim), nn.Parameter(torch.randn(length, self.dim) * 0.5)
        self.inject = nn.Linear(self.dim, 3 * self.dim)
        self.width = length * self.dim

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        keys = torch.rand(count, self.symbols, generator=generator).argsort(1)[:, : self.pairs]
        values = torch.randint(0, self.symbols, (count, self.pairs), generator=generator)
        asked = torch.randint(0, self.pairs, (count, 1), generator=generator)
        tokens = torch.stack((keys, values + self.symbols), 2).flatten(1)
        return torch.cat((tokens, keys.gather(1, asked)), 1), values.gather(1, asked)[:, 0]

    def test(self) -> tuple[Tensor, Tensor]:
        return self.draw(1000, torch.Generator().manual_seed(1234))

    def prepare(self, tokens: Tensor) -> Tensor:
        return self.inject(self.embed(tokens) + self.position)

    def read(self, z: Tensor) -> Tensor:
        return self.head(z.view(-1, 2 * self.pairs + 1, self.dim)[:, -1])


# Modes that train by `fixed_point`, as users call it: the recycled factors of earlier batches, and nothing of them.
REGIONS = {"region": "never", "region recycled": "auto"}

TASKS: dict[str, Callable[[], Corner | Recall]] = {"corner": Corner, "recall": Recall}


def train(task: str, mode: str, seed: int, steps: int | None = None) -> Outcome:
    """Train the model of a task with one backward mode; everything but the backward is the same for all modes of a seed."""
    deq_compile.reset()
    torch.manual_seed(seed)
    model = TASKS[task]()
    step = (
        functools.partial(_region_step, model, REGIONS[mode])
        if mode in REGIONS
        else functools.partial(_step, model, MODES[mode]())
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=model.rate)
    steps = model.steps if steps is None else steps
    spent = products = iterations = 0.0
    converged = []
    begin = time.process_time()
    for _ in range(steps):
        x, y = model.draw(model.batch)
        optimizer.zero_grad()
        found = step(x, y)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent, products, iterations = spent + found[0], products + found[1], iterations + found[2]
        converged.append(found[3])
    seconds = time.process_time() - begin
    with torch.no_grad():
        x, y = model.test()
        u = model.prepare(x)
        z = solve(lambda z: model.body(z, u), torch.zeros(len(y), model.width), tol=1e-4, max_iter=60).z
        accuracy = float((model.read(z).argmax(1) == y).double().mean())
    last = converged[-50:]
    return Outcome(task, mode, seed, accuracy, seconds, spent, products / steps, iterations / steps, sum(last) / len(last))


def _step(model: Corner | Recall, backward: Mode, x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """Accumulate the gradients of one batch; CPU seconds of the backward, products, iterations, share that converged."""
    u = model.prepare(x)
    fixed = u.detach()
    solution = solve(lambda z: model.body(z, fixed), torch.zeros(len(y), model.width), tol=1e-3, max_iter=30)
    z = solution.z.requires_grad_()
    loss = F.cross_entropy(model.read(z), y)
    loss.backward()
    assert z.grad is not None
    q, z.grad = z.grad, None
    begin = time.process_time()
    fz = model.body(z, u)
    leaves = list(model.body.parameters()) + ([u] if u.requires_grad else [])

    def vjp(w: Tensor) -> Tensor:
        return torch.autograd.grad(fz, z, w, retain_graph=True)[0]

    def vjp_full(w: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        jw, *grads = torch.autograd.grad(fz, [z, *leaves], w, retain_graph=True)
        return jw, tuple(grads)

    found = backward(vjp, vjp_full, q, solution.state)
    spent = time.process_time() - begin
    grads = [torch.nan_to_num(g) for g in found.payload]
    for p, g in zip(model.body.parameters(), grads, strict=False):
        p.grad = g if p.grad is None else p.grad + g
    if u.requires_grad:
        u.backward(grads[-1])
    (model.regularise * jac_reg(lambda z: model.body(z, fixed), z)).backward()
    done = (solution.status <= 2).double().mean()
    return spent, found.vjps, float(solution.iterations.double().mean()), float(done)


def _region_step(model: Corner | Recall, recycle: str, x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """The same by `fixed_point`; what is recycled serves the forward as well."""
    u = model.prepare(x)
    with record_solves(tensors=True) as solves:
        z0 = torch.zeros(len(y), model.width)
        z = fixed_point(lambda z: model.body(z, u), z0, tol=1e-3, max_iter=30, recycle=recycle)
        loss = F.cross_entropy(model.read(z), y)
        begin = time.process_time()
        loss.backward()
        spent = time.process_time() - begin
    (found,) = solves
    assert found.z is not None
    fixed = u.detach()
    (model.regularise * jac_reg(lambda z: model.body(z, fixed), found.z)).backward()
    return spent, found.vjps or 0, found.iterations, found.converged
