"""Run on every rank by `torch.distributed.run`: trains a small model in many ways for STEPS steps, and prints as JSON how far each
training is from that of one process on all ranks' samples together, what became of the loop, and how long it took.

The reference is the user's own loop in eager mode, computed on every rank without any collective.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from deq_compile import Report, explain, fixed_point
from deq_compile.backend import Backend
from tests.helpers import TIGHT

STEPS, EACH, WIDTH = 10, 3, 7  # samples of a rank; 7 rows are no multiple of 2 or 4 ranks


class Cell(nn.Module):
    """tanh(W z + injected). (B, WIDTH) -> (B, WIDTH)"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.inner.weight, gain=0.4)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + injected)


class Model(nn.Module):
    """x (B, 5) -> (B, 3), by forty iterations of the cell, or by `fixed_point` of it."""

    def __init__(self, declared: bool = False) -> None:
        super().__init__()
        self.declared = declared
        self.inject, self.cell, self.head = nn.Linear(5, WIDTH), Cell(), nn.Linear(WIDTH, 3)
        self.spare = nn.Linear(WIDTH, 3)  # that no loss depends on

    def forward(self, x: Tensor) -> Tensor:
        injected = self.inject(x)
        z = torch.zeros_like(injected)
        if self.declared:
            return self.head(fixed_point(lambda z: self.cell(z, injected), z, tol=1e-6, backward_tol=1e-5))
        for _ in range(40):
            z = self.cell(z, injected)
        return self.head(z)


def fresh(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def batch(step: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` samples of a step, the same in every process: (count, 5), (count, 3)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 5, generator=generator), torch.randn(count, 3, generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters()], lr=0.1, momentum=0.9)


def shares(step: int) -> list[slice]:
    """Which samples of a step each rank has: in the last one, one rank has one less and the last one only one."""
    sizes = [EACH] * dist.get_world_size()
    if step == STEPS - 1:
        sizes[0], sizes[-1] = EACH - 1, 1
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def alone() -> Model:
    """One process, the user's own loop, all samples of each step."""
    model = fresh()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        x, y = batch(step, shares(step)[-1].stop)
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum().div(len(x)).backward()
        optimizer.step()
    return model


def loss_of(run: Callable[[Tensor], Tensor], step: int, part: slice | None = None) -> Tensor:
    """This rank's part of a step's loss, such that the mean over the ranks is the mean over the samples."""
    own = shares(step)
    x, y = batch(step, own[-1].stop)
    mine = own[dist.get_rank()]
    x, y = x[mine][part or slice(None)], y[mine][part or slice(None)]
    return ((run(x) - y) ** 2).sum() * dist.get_world_size() / own[-1].stop


def train(run: Callable[[Tensor], Tensor], model: nn.Module, steps: Any = range(STEPS), optimizer: Any = None) -> Any:
    optimizer = optimizer or optimizer_of(model)
    for step in steps:
        optimizer.zero_grad()
        loss_of(run, step).backward()
        optimizer.step()
    return optimizer


def compiled(model: Any, **options: Any) -> tuple[Any, Report]:
    torch._dynamo.reset()
    report = Report()
    return torch.compile(model, backend=Backend({**TIGHT, **options}, report)), report


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' parameters, each relative to its norm; parts that nothing depends on are left out."""
    found = []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        mine = whole(p).to(q.dtype)
        if "spare" not in name:
            found.append(float((mine - whole(q)).norm() / whole(q).norm()))
    return max(found)


# ---- data parallel


def ddp(around: bool = True, **how: Any) -> tuple[nn.Module, Any]:
    net = fresh()
    if "find_unused_parameters" not in how:
        net.spare.requires_grad_(False)
    if around:  # the compiler sees DDP too
        run, report = compiled(DistributedDataParallel(net, **how))
    else:
        inner, report = compiled(net)
        run = DistributedDataParallel(inner, **how)
    train(run, net)
    return net, report


def ddp_no_sync() -> tuple[nn.Module, Any]:
    """Each rank's samples in two parts, of which the first is not reduced."""
    net = fresh()
    net.spare.requires_grad_(False)
    wrapped = DistributedDataParallel(net)
    run, report = compiled(wrapped)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        with wrapped.no_sync():
            loss_of(run, step, slice(0, 1)).backward()
        loss_of(run, step, slice(1, None)).backward()
        optimizer.step()
    return net, report


def ddp_join() -> tuple[nn.Module, Any]:
    """The last rank has one batch less than the others: DDP's join answers for it. The reference leaves its samples out."""
    net = fresh()
    net.spare.requires_grad_(False)
    inner, report = compiled(net)
    run = DistributedDataParallel(inner)
    last = dist.get_rank() == dist.get_world_size() - 1
    with run.join():
        train(run, net, range(STEPS - last))
    return net, report


def alone_without_the_last() -> Model:
    model = fresh()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        own = shares(step)
        x, y = batch(step, own[-1].stop)
        count = len(x)
        if step == STEPS - 1:
            x, y = x[: own[-1].start], y[: own[-1].start]
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum().div(count).backward()
        optimizer.step()
    return model


def ddp_saved() -> tuple[nn.Module, Any]:
    """Half of the steps, then state dictionaries through a file into a new model, compiled anew, and the other half; in between
    one rank evaluates and explains alone."""
    net = fresh()
    net.spare.requires_grad_(False)
    run, report = compiled(DistributedDataParallel(net))
    optimizer = train(run, net, range(STEPS // 2))
    if dist.get_rank() == 0:
        with torch.no_grad():
            net.eval()(batch(0, 5)[0])
            torch.compile(net, backend="deq", options=TIGHT)(batch(0, 5)[0])
        explain(net, **TIGHT)(batch(0, 2)[0])
        net.train()
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    again = Model()
    again.spare.requires_grad_(False)
    other = optimizer_of(again)
    weights, state = torch.load(io.BytesIO(file.getvalue()))
    again.load_state_dict(weights)
    other.load_state_dict(state)
    run, report = compiled(DistributedDataParallel(again))
    train(run, again, range(STEPS // 2, STEPS), other)
    return again, report


# ---- sharded


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp(cell: bool = True, root: bool = True, on: Any = None, **how: Any) -> nn.Module:
    net = fresh()
    if cell:
        fully_shard(net.cell, mesh=on or mesh(), **how)
    if root:
        fully_shard(net, mesh=on or mesh(), **how)
    return net


def fsdp_trained(**how: Any) -> tuple[nn.Module, Any]:
    net = fsdp(**how)
    run, report = compiled(net)
    train(run, net)
    return net, report


def fsdp_saved() -> tuple[nn.Module, Any]:
    net = fsdp()
    run, report = compiled(net)
    optimizer = train(run, net, range(STEPS // 2))
    weights, state = net.state_dict(), optimizer.state_dict()
    again = fsdp()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(weights)
    other = optimizer_of(again)
    other.load_state_dict(state)
    run, report = compiled(again)
    train(run, again, range(STEPS // 2, STEPS), other)
    return again, report


def fsdp_no_sync() -> tuple[nn.Module, Any]:
    net = fsdp()
    run, report = compiled(net)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        net.set_requires_gradient_sync(False)
        loss_of(run, step, slice(0, 1)).backward()
        net.set_requires_gradient_sync(True)
        loss_of(run, step, slice(1, None)).backward()
        optimizer.step()
    return net, report


def fsdp_cell_alone() -> tuple[nn.Module, Any]:
    """The cell is sharded and nothing else is; the others' gradients are averaged by hand."""
    net = fsdp(root=False)
    run, report = compiled(net)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(run, step).backward()
        for p in net.parameters():
            if p.grad is not None and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        optimizer.step()
    return net, report


def fsdp_declared() -> tuple[nn.Module, Any]:
    """fixed_point without a compiler."""
    net = fresh(declared=True)
    fully_shard(net.cell, mesh=mesh())
    fully_shard(net, mesh=mesh())
    train(net, net)
    return net, None


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def fsdp_half_eager() -> nn.Module:
    net = fsdp(mp_policy=HALF)
    train(lambda x: net(x).float(), net)
    return net


def fsdp_half() -> tuple[nn.Module, Any]:
    net = fsdp(mp_policy=HALF)
    run, report = compiled(net, tol=1e-2, backward_tol=1e-2)
    train(lambda x: run(x).float(), net)
    return net, report


def tensor_parallel() -> tuple[nn.Module, Any]:
    """The cell's rows on different ranks: all ranks see the same samples."""
    net = fresh()
    parallelize_module(net.cell, mesh(), {"inner": ColwiseParallel(output_layouts=Replicate())})
    run, report = compiled(net)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        x, y = batch(step, shares(step)[-1].stop)
        optimizer.zero_grad()
        out = run(x)
        out = out.full_tensor() if isinstance(out, DTensor) else out
        ((out - y) ** 2).sum().div(len(x)).backward()
        optimizer.step()
    return net, report


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ddp around": lambda: ddp(),
    "ddp under": lambda: ddp(around=False),
    "ddp static_graph": lambda: ddp(static_graph=True),
    "ddp find_unused": lambda: ddp(find_unused_parameters=True),
    "ddp no_sync": ddp_no_sync,
    "ddp join": ddp_join,
    "ddp saved": ddp_saved,
    "fsdp root": lambda: fsdp_trained(cell=False),
    "fsdp cell": fsdp_trained,
    "fsdp cell alone": fsdp_cell_alone,
    "fsdp no_sync": fsdp_no_sync,
    "fsdp saved": fsdp_saved,
    "fsdp replicated": lambda: fsdp_trained(on=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))),
    "fsdp declared": fsdp_declared,
    "fsdp half": fsdp_half,
    "tensor parallel": tensor_parallel,
}


@contextlib.contextmanager
def counted() -> Any:
    """Counts of collectives by name, while it is entered."""
    counts: dict[str, int] = {}
    names = [n for n in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
             if hasattr(dist, n)]  # fmt: skip
    yield counts
    del names


def main(names: list[str]) -> None:
    dist.init_process_group("gloo")
    references = {"ddp join": alone_without_the_last, "fsdp half": fsdp_half_eager}
    common = alone()
    for name in names or CASES:
        begun, cpu = time.monotonic(), time.process_time()
        said: dict[str, Any] = {"rank": dist.get_rank(), "case": name}
        net, report = CASES[name]()
        reference = references[name]() if name in references else common
        said |= {"distance": distance(net, reference), "seconds": time.monotonic() - begun, "cpu": time.process_time() - cpu}
        if report is not None:
            said["statuses"] = sorted({region.status for region in report.regions})
            said["regions"] = len(report.regions)
            said["graphs"] = report.graphs
            said["skipped"] = sorted({skipped.reason.name for skipped in report.skipped})
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
