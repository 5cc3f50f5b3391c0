"""Run on every rank by `ranks_launch.py`: trains a small model in many ways for STEPS steps, and says how far each training is
from that of one process on all ranks' samples together, what became of the loop, and how long it took.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from deq_compile import explain, record_solves
from tests.helpers import TIGHT
from tests.models.ranks import decisions
from tests.models.ranks_model import (
    EACH,
    STEPS,
    Model,
    accumulate,
    alone,
    batch,
    compiled,
    distance,
    fresh,
    loss_of,
    optimizer_of,
    shares,
    train,
)

STRETCHED = 8  # the call of a comparison

# ---- data parallel


def net_of_ddp() -> Model:
    net = fresh()
    net.spare.requires_grad_(False)  # DDP waits for the gradient of everything that has one
    return net


def ddp(uneven: bool = False, counts: bool = False, **how: Any) -> tuple[nn.Module, Any]:
    """The compiler sees DDP too."""
    net = fresh() if "find_unused_parameters" in how else net_of_ddp()
    run, report = compiled(DistributedDataParallel(net, **how))
    train(run, net, uneven=uneven, counts=counts)
    return net, report


def ddp_stretched() -> tuple[nn.Module, Any]:
    """A verdict that changes: the loop is solved, and in the last two steps has to be kept, at the call that compares next."""
    net = net_of_ddp()
    run, report = compiled(DistributedDataParallel(net))
    train(run, net, stretched=STRETCHED)
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


def fsdp_trained(uneven: bool = False, counts: bool = False, **how: Any) -> tuple[nn.Module, Any]:
    net = fsdp(**how)
    run, report = compiled(net)
    train(run, net, uneven=uneven, counts=counts)
    return net, report


def fsdp_stretched() -> tuple[nn.Module, Any]:
    net = fsdp()
    run, report = compiled(net)
    train(run, net, stretched=STRETCHED)
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
    "ddp stretched": ddp_stretched,
    "ddp counts": lambda: ddp(counts=True),
    "fsdp counts": lambda: fsdp_trained(counts=True),
    "ddp saved": ddp_saved,
    "fsdp root": lambda: fsdp_trained(cell=False),
    "fsdp cell": lambda: fsdp_trained(uneven=True),
    "fsdp cell alone": fsdp_cell_alone,
    "fsdp saved": fsdp_saved,
    "fsdp stretched": fsdp_stretched,
    "fsdp replicated": lambda: fsdp_trained(on=replicas()),
    "fsdp declared": fsdp_declared,
    "fsdp half": fsdp_half,
    "tensor parallel": tensor_parallel,
}
REFERENCES: dict[str, Callable[[], Model]] = {
    "ddp": lambda: alone(uneven=True),
    "fsdp cell": lambda: alone(uneven=True),
    "ddp join": lambda: alone(last=False),
    "ddp stretched": lambda: alone(stretched=STRETCHED),
    "fsdp stretched": lambda: alone(stretched=STRETCHED),
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
    said |= {
        "seconds": time.monotonic() - begun,
        "cpu": time.process_time() - cpu,
        "evaluations": sum(s.evaluations for s in solves),
    }
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
