"""Run on every rank by `ranks_launch.py`: trains a small model in many ways for STEPS steps, and says how far each training is from
that of one process on all ranks' samples together, what became of the loop, and how long it took.

The reference is the user's own loop in eager mode, computed on every rank without any collective.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from deq_compile import Report, explain, fixed_point, record_solves
from deq_compile.backend import Backend
from tests.helpers import TIGHT
from tests.models.ranks import decisions

STEPS, EACH, WIDTH = 10, 4, 7  # samples of a rank; 7 rows are no multiple of 2 or 4 ranks
ROUNDS = 24  # 0.4^24 is 3e-10


class Cell(nn.Module):
    """tanh(W z + injected). (B, WIDTH) -> (B, WIDTH)"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.inner.weight, gain=0.4)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + injected)


class Model(nn.Module):
    """x (B, 5) -> (B, 3), by ROUNDS iterations of the cell, or by `fixed_point` of it."""

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
        for _ in range(ROUNDS):
            z = self.cell(z, injected)
        return self.head(z)


def fresh(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def batch(step: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` samples of a step, the same in every process: (count, 5), (count, 3). Later ones are larger: ranks need different
    numbers of evaluations."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(count, 5, generator=generator), torch.randn(count, 3, generator=generator)
    return x * torch.linspace(0.05, 1.5, count)[:, None], y


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters()], lr=0.05, momentum=0.9)


def shares(step: int, uneven: bool = False) -> list[slice]:
    """Which samples of a step each rank has. `uneven`: in the last step the first rank has one less, and the last one a single
    sample."""
    sizes = [EACH] * dist.get_world_size()
    if uneven and step == STEPS - 1:
        sizes[0], sizes[-1] = EACH - 1, 1
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def alone(uneven: bool = False, last: bool = True) -> Model:
    """One process, the user's own loop, all samples of each step; without `last` those of the last rank are left out of the last
    step, and its mean is still one over all ranks."""
    model = fresh()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        own = shares(step, uneven)
        x, y = batch(step, own[-1].stop)
        count = len(x)
        if step == STEPS - 1 and not last:
            x, y = x[: own[-1].start], y[: own[-1].start]
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum().div(count).backward()
        optimizer.step()
    return model


def loss_of(run: Callable[[Tensor], Tensor], step: int, part: slice | None = None, uneven: bool = False) -> Tensor:
    """This rank's part of a step's loss, such that the mean over the ranks is the mean over the samples."""
    own = shares(step, uneven)
    x, y = batch(step, own[-1].stop)
    mine = own[dist.get_rank()]
    x, y = x[mine][part or slice(None)], y[mine][part or slice(None)]
    return ((run(x) - y) ** 2).sum() * dist.get_world_size() / own[-1].stop


def train(
    run: Callable[[Tensor], Tensor], model: nn.Module, steps: Any = range(STEPS), optimizer: Any = None, uneven: bool = False
) -> Any:
    optimizer = optimizer or optimizer_of(model)
    for step in steps:
        optimizer.zero_grad()
        loss_of(run, step, uneven=uneven).backward()
        optimizer.step()
    return optimizer


def accumulate(run: Callable[[Tensor], Tensor], steps: Any, optimizer: Any, unreduced: Callable[[], Any]) -> None:
    """Each step in two halves, of which the first is not reduced."""
    for step in steps:
        optimizer.zero_grad()
        with unreduced():
            loss_of(run, step, slice(0, EACH // 2)).backward()
        loss_of(run, step, slice(EACH // 2, None)).backward()
        optimizer.step()


def compiled(model: Any, **options: Any) -> tuple[Any, Report]:
    torch._dynamo.reset()
    report = Report()
    return torch.compile(model, backend=Backend({**TIGHT, **options}, report)), report


def whole(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' parameters, each relative to its norm; parts that nothing depends on are left out."""
    found = []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        mine = whole(p).to(q.dtype)
        if "spare" not in name:
            found.append(float((mine - whole(q)).norm() / whole(q).norm()))
    return max(found)


# ---- data parallel


def net_of_ddp() -> Model:
    net = fresh()
    net.spare.requires_grad_(False)  # DDP waits for the gradient of everything that has one
    return net


def ddp(uneven: bool = False, **how: Any) -> tuple[nn.Module, Any]:
    """The compiler sees DDP too."""
    net = fresh() if "find_unused_parameters" in how else net_of_ddp()
    run, report = compiled(DistributedDataParallel(net, **how))
    train(run, net, uneven=uneven)
    return net, report


def ddp_around_the_compiled() -> tuple[nn.Module, Any]:
    net = net_of_ddp()
    inner, report = compiled(net)
    train(DistributedDataParallel(inner), net)
    return net, report


def ddp_no_sync() -> tuple[nn.Module, Any]:
    net = net_of_ddp()
    wrapped = DistributedDataParallel(net)
    run, report = compiled(wrapped)
    accumulate(run, range(STEPS), optimizer_of(net), wrapped.no_sync)
    return net, report


def ddp_join() -> tuple[nn.Module, Any]:
    """The last rank has one batch less than the others: DDP's join answers for it."""
    net = net_of_ddp()
    inner, report = compiled(net)
    run = DistributedDataParallel(inner)
    last = dist.get_rank() == dist.get_world_size() - 1
    with run.join():
        train(run, net, range(STEPS - last))
    return net, report


def ddp_saved() -> tuple[nn.Module, Any]:
    """Half of the steps, then state dictionaries through a file into a new model, compiled anew, and the other half; in between
    one rank evaluates and explains alone."""
    net = net_of_ddp()
    run, _ = compiled(DistributedDataParallel(net))
    optimizer = train(run, net, range(STEPS // 2))
    if dist.get_rank() == 0:
        with torch.no_grad():
            torch.compile(net.eval(), backend="deq", options=TIGHT)(batch(0, EACH)[0])
        explain(net.train(), **TIGHT)(batch(0, 2)[0])
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    weights, state = torch.load(io.BytesIO(file.getvalue()))
    again = Model()
    again.spare.requires_grad_(False)
    again.load_state_dict(weights)
    other = optimizer_of(again)
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


def fsdp_trained(uneven: bool = False, **how: Any) -> tuple[nn.Module, Any]:
    net = fsdp(**how)
    run, report = compiled(net)
    train(run, net, uneven=uneven)
    return net, report


def fsdp_saved() -> tuple[nn.Module, Any]:
    """Half of the steps, then sharded state dictionaries into a new model, and the other half in two parts each."""
    net = fsdp()
    run, _ = compiled(net)
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

    @contextlib.contextmanager
    def unreduced() -> Iterator[None]:
        again.set_requires_gradient_sync(False)
        yield
        again.set_requires_gradient_sync(True)

    accumulate(run, range(STEPS // 2, STEPS), other, unreduced)
    return again, report


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


def fsdp_half_eager() -> Model:
    net = fsdp(mp_policy=HALF)
    train(lambda x: net(x).float(), net)
    return cast(Model, net)


def fsdp_half() -> tuple[nn.Module, Any]:
    """bfloat16 in the cell, gradients reduced in float32."""
    net = fsdp(mp_policy=HALF)
    run, report = compiled(net, tol=1e-4, backward_tol=1e-3)
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
        ((run(x) - y) ** 2).sum().div(len(x)).backward()
        optimizer.step()
    return net, report


def replicas() -> Any:
    """Two replicas, each sharded among half of the ranks."""
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ddp": lambda: ddp(uneven=True),
    "ddp around the compiled": ddp_around_the_compiled,
    "ddp static_graph": lambda: ddp(static_graph=True),
    "ddp find_unused": lambda: ddp(find_unused_parameters=True),
    "ddp no_sync": ddp_no_sync,
    "ddp join": ddp_join,
    "ddp saved": ddp_saved,
    "fsdp root": lambda: fsdp_trained(cell=False),
    "fsdp cell": lambda: fsdp_trained(uneven=True),
    "fsdp cell alone": fsdp_cell_alone,
    "fsdp saved": fsdp_saved,
    "fsdp replicated": lambda: fsdp_trained(on=replicas()),
    "fsdp declared": fsdp_declared,
    "fsdp half": fsdp_half,
    "tensor parallel": tensor_parallel,
}
REFERENCES: dict[str, Callable[[], Model]] = {
    "ddp": lambda: alone(uneven=True),
    "fsdp cell": lambda: alone(uneven=True),
    "ddp join": lambda: alone(last=False),
    "fsdp half": fsdp_half_eager,
}
# Collectives of process groups, by their names before and since torch 2.13.
COLLECTIVES = ("_allgather_base", "all_gather_single", "_reduce_scatter_base", "reduce_scatter_single")


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often tensors are gathered and scattered while it is entered."""
    counts = {"gather": 0, "scatter": 0}
    before = {name: vars(dist.ProcessGroup)[name] for name in COLLECTIVES if name in vars(dist.ProcessGroup)}

    def counting(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            counts["gather" if "gather" in name else "scatter"] += 1
            return before[name].__get__(self)(*args, **kwargs)

        return call

    for name in before:
        setattr(dist.ProcessGroup, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in before.items():
            setattr(dist.ProcessGroup, name, original)


def said_of(name: str, common: Model) -> dict[str, Any]:
    said: dict[str, Any] = {"rank": dist.get_rank(), "case": name}
    begun, cpu = time.monotonic(), time.process_time()
    with record_solves() as solves, counted() as collectives:
        net, report = CASES[name]()
    said |= {"seconds": time.monotonic() - begun, "cpu": time.process_time() - cpu, "evaluations": sum(s.evaluations for s in solves)}
    said |= {"collectives": collectives, "distance": distance(net, REFERENCES[name]() if name in REFERENCES else common)}
    if report is not None:
        said["statuses"] = sorted({region.status for region in report.regions})
        said["graphs"] = report.graphs
        said["skipped"] = sorted({skipped.reason.name for skipped in report.skipped})
    return said


def on_this_rank(names: list[str]) -> list[dict[str, Any]]:
    """What this rank says of each case."""
    dist.init_process_group("gloo")
    lines = [{**decisions(), "case": "decisions"}] if "decisions" in names else []
    common = alone()
    lines += [said_of(name, common) for name in names if name in CASES]
    dist.barrier()
    dist.destroy_process_group()
    return lines
