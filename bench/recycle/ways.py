"""What an adjoint may be preconditioned with: products by each way, on the same weights, batches and cotangents, over training.

none               nothing
M                  the type-II operator of this batch's own forward, one for each sample
own                secant pairs of this batch's own forward, transposed: as sums over samples ("own"), or all of them ("own, all")
earlier            the same of earlier forwards: what a forward with recycling begins with
own and earlier    both in one low-rank inverse
adjoints           pairs that earlier adjoints have left: what recycling uses
M + ...            the mean of M and of another one

Each is I or I - A^T Y of rank 16; generalised conjugate residuals to the tolerance of the adjoint, by samples, until the batch is
there. "net" takes off what a way costs beside its products: making it, applying it, counted in operations of products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.gradients.bodies import TRAINING_SAMPLES
from bench.gradients.train import BATCH
from deq_compile import fixed_point
from deq_compile.testing import apply_multisecant, jac_reg, multisecant, recycle_pool, recycle_shared, recycle_sketch, solve

from .training import CAP, begun

FORWARD_TOL, ADJOINT_TOL, MOST_PRODUCTS = 1e-4, 1e-2, 40
EVERY, FIRST = 10, 3  # steps between two that are measured; of these, those that only feed
WAYS = ("none", "M", "own", "own, all", "earlier", "own and earlier", "adjoints", "M + own", "M + earlier", "M + adjoints")

Vector = Callable[[Tensor], Tensor]


class Known:
    """What earlier batches have left: of forwards, and of adjoints."""

    def __init__(self) -> None:
        self.forward: Any = None
        self.adjoint: Any = None


def row(body: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """One training: mean products of each way, and net of what it costs beside them."""
    recipe, inputs, labels, module, head, optimizer = begun(body, seed)
    known, begin = Known(), time.process_time()
    found: list[tuple[dict[str, int], dict[str, float]]] = []
    for i in range(steps or recipe.steps):
        chosen = torch.randint(0, TRAINING_SAMPLES, (BATCH,))
        x, y = inputs[chosen], labels[chosen]

        def f(z: Tensor, x: Tensor = x) -> Tensor:
            return module(z, x)

        if i % EVERY == 0:
            found.append(_measured(f, lambda z, y=y: F.cross_entropy(head(z), y), recipe.width, i, known))  # type: ignore[misc]
        optimizer.zero_grad()
        z = fixed_point(f, torch.zeros(BATCH, recipe.width), tol=FORWARD_TOL, max_iter=CAP, verify="first")
        F.cross_entropy(head(z), y).backward()
        if recipe.regularise:
            (recipe.regularise * jac_reg(f, z.detach())).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    measured = found[FIRST:] or found
    return {
        "body": body, "seed": seed, "measured": len(measured),
        "products": {way: statistics.mean(counts[way] for counts, _ in measured) for way in WAYS},
        "net": {way: statistics.mean(net[way] for _, net in measured) for way in WAYS},
        "seconds": time.process_time() - begin,
    }  # fmt: skip


def _measured(f: Vector, loss: Vector, width: int, seed: int, known: Known) -> tuple[dict[str, int], dict[str, float]]:
    """Products by each way on this batch, and net; afterwards its pairs are known."""
    z0 = torch.zeros(BATCH, width)
    sums, every = recycle_sketch.Sketch(recycle_sketch.sums_for(CAP // 4), CAP, seed), _Pairs()
    with torch.no_grad():
        for taker in (sums, every):
            solved = solve(f, z0, tol=FORWARD_TOL, max_iter=CAP, sketch=taker)
    z = solved.z.detach().requires_grad_()
    image, out = f(z), solved.z.detach().requires_grad_()
    (q,) = torch.autograd.grad(loss(out), out)

    def vjp(w: Tensor) -> Tensor:
        return torch.autograd.grad(image, z, w, retain_graph=True)[0]

    with FlopCounterMode(display=False) as counter:
        vjp(q)
    product = counter.get_total_flops() + 10.0 * q.numel()
    with torch.no_grad():
        counts, net, adjoint_pairs = _by_way(vjp, q, solved.state, sums, every, known, product)
    known.forward = _compressed(sums.rows(), known.forward)
    known.adjoint = _compressed(adjoint_pairs, known.adjoint)
    return counts, net


def _by_way(
    vjp: Vector, q: Tensor, factors: Any, sums: Any, every: _Pairs, known: Known, product: float
) -> tuple[dict[str, int], dict[str, float], Any]:
    M = multisecant(factors)
    n, D = factors.n.double(), q.shape[1]
    making_m = float(2 * (n * n * D + 4 * n**3).sum())
    apply_m, thin = float(2 * (4 * n * D).sum()), 4.0 * recycle_shared.rank_for(D) * q.numel()
    rows = sums.rows()
    pooling = 0.0 if rows is None else 4.0 * len(rows[0]) * q.numel() + recycle_pool.compressing(D, len(rows[0]))
    own = _transposed(_compressed(rows, None))
    pooled = {
        "own": (own, pooling), "own, all": (_transposed(_compressed(every.rows(), None)), 0.0),
        "earlier": (_transposed(known.forward), 0.0), "own and earlier": (_transposed(_compressed(rows, known.forward)), pooling),
        "adjoints": (known.adjoint, 0.0),
    }  # fmt: skip

    def by_m(r: Tensor) -> Tensor:
        return apply_multisecant(M, r)

    ways: dict[str, tuple[Vector, float, float]] = {"none": (lambda r: r, 0.0, 0.0), "M": (by_m, making_m, apply_m)}
    for name, (shared, making) in pooled.items():
        ways[name] = (_by(shared), making, thin if shared is not None else 0.0)
    for name in ("own", "earlier", "adjoints"):
        by, making, applying = ways[name]
        ways[f"M + {name}"] = (lambda r, by=by: (by_m(r) + by(r)) / 2, making_m + making, apply_m + applying)  # type: ignore[misc]
    counts, net, pairs = {}, {}, None
    for name, (pre, making, applying) in ways.items():
        counts[name], basis = residuals(vjp, q, pre)
        net[name] = counts[name] + (making + applying * (counts[name] + 1)) / product
        if name == "none":
            sketch = recycle_sketch.Sketch(recycle_sketch.sums_for(len(basis)), len(basis), 1)
            for p, image in basis:
                sketch.add(p, image, negative=True)
            pairs = sketch.rows()
    return counts, net, pairs


def residuals(vjp: Vector, q: Tensor, pre: Vector) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Products that (I - J^T) w = q takes by generalised conjugate residuals, and the directions with their images."""
    w = pre(q)
    r, count = q - (w - vjp(w)), 1
    basis: list[tuple[Tensor, Tensor]] = []
    while bool(r.norm() > ADJOINT_TOL * q.norm()) and count < MOST_PRODUCTS:
        p = pre(r)
        image, count = p - vjp(p), count + 1
        for _ in range(2):
            for p0, image0 in basis:
                along = (image * image0).sum(1, keepdim=True)
                p, image = p - along * p0, image - along * image0
        size = image.norm(dim=1, keepdim=True).clamp_min(1e-30)
        p, image = p / size, image / size
        along = (r * image).sum(1, keepdim=True)
        w, r = w + along * p, r - along * image
        basis.append((p, image))
    return count, basis


class _Pairs:
    """All pairs of a solve, each divided by the length of its step: what a sketch makes sums of."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None
        self.largest = torch.zeros(())

    def note(self, z: Tensor, g: Tensor) -> None:
        if self.last is None:
            self.largest = g.norm(dim=1)
        else:
            S, Y = z - self.last[0], g - self.last[1]
            size = S.norm(dim=1, keepdim=True)
            far = torch.maximum(g.norm(dim=1), self.last[1].norm(dim=1)) / self.largest
            good = size[:, 0] > 1e3 * torch.finfo(z.dtype).eps * z.norm(dim=1)
            weight = 1 / (size * (1 + recycle_sketch.FAR * far[:, None]))
            self.found.append(((S * weight)[good], (Y * weight)[good]))
        self.last = z.clone(), g.clone()

    def rows(self) -> tuple[Tensor, Tensor] | None:
        return (torch.cat([S for S, _ in self.found]), torch.cat([Y for _, Y in self.found])) if self.found else None


def _compressed(rows: tuple[Tensor, Tensor] | None, old: Any) -> Any:
    if rows is None or not len(rows[0]):
        return old
    return recycle_shared.compress(*rows, recycle_shared.rank_for(rows[0].shape[1]), old) or old


def _transposed(shared: Any) -> Any:
    return None if shared is None else shared.T


def _by(shared: Any) -> Vector:
    return lambda r: r if shared is None else shared.apply_(r.clone())


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean products by body, a column a way, and in brackets net of what the way costs."""
    lines = []
    for body in dict.fromkeys(row["body"] for row in rows):
        mine = [row for row in rows if row["body"] == body]
        means = {what: {way: statistics.mean(row[what][way] for row in mine) for way in WAYS} for what in ("products", "net")}
        lines.append({"body": body} | {way: f"{means['products'][way]:.1f} ({means['net'][way]:.1f})" for way in WAYS})
    return lines
