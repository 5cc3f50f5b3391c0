"""Training an equilibrium model whose parameters are sharded by FSDP2, on one machine or on many.

The block that the loop calls is sharded by itself, and the rest with the model: `fully_shard(net.cell)`, then
`fully_shard(net)`. FSDP2 alone gathers the block's parameters for each of its calls, 40 times forward and 40 times backward.
Compiled for the backend "deq" they are gathered once for the whole solve, and their gradients are reduced and scattered once.
gloo serves on CPUs, nccl on GPUs. `--check` trains on the whole batches in one process as well, and prints how far the weights
of the two trainings are apart; `--eager` leaves the compiler out.

    torchrun --nproc-per-node 2 examples/fsdp2.py --check
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/fsdp2.py
"""

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from deq_compile import record_solves


class Block(nn.Module):
    """tanh(W z + injected). z, injected [B, width] -> [B, width]"""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        nn.init.orthogonal_(self.inner.weight, gain=0.6)

    def forward(self, z, injected):
        return torch.tanh(self.inner(z) + injected)


class Equilibrium(nn.Module):
    """z <- block(z, U pixels), 40 times from zero, then a linear head. pixels [B, 64] -> logits [B, 10]"""

    def __init__(self, width=64, rounds=40):
        super().__init__()
        self.rounds = rounds
        self.inject, self.cell, self.head = nn.Linear(64, width), Block(width), nn.Linear(width, 10)

    def forward(self, pixels):
        injected = self.inject(pixels)
        z = torch.zeros_like(injected)
        for _ in range(self.rounds):
            z = self.cell(z, injected)
        return self.head(z)


def batches(steps, size, device):
    """The same batches in every process: pixels [size, 64] in 0 to 1, labels [size]."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (size,), generator=generator)
        yield pixels[chosen].to(device), labels[chosen].to(device)


def train(net, step_net, data, rank=0, world=1):
    """Gradient descent on this rank's share of each batch; the losses."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for pixels, labels in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(step_net(pixels[rank::world]).float(), labels[rank::world])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def whole(net):
    """The parameters of a model, gathered from all ranks: each of them has to ask."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]


def main(steps=100, batch=64, half=False, check=False, eager=False, options=None):
    """Train on all ranks; what this rank saw, with the distance to the training of one process where that is checked."""
    if "RANK" not in os.environ:
        raise SystemExit("fsdp2.py: expected ranks, got a plain process. Fix: torchrun --nproc-per-node 2 examples/fsdp2.py")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = Equilibrium().to(device)
    how = {"mesh": init_device_mesh(device.type, (world,))}
    if half:  # products in bfloat16, gradients summed up in float32
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(net.cell, **how)  # first what is within
    fully_shard(net, **how)
    step_net = net if eager else torch.compile(net, backend="deq", options=options)
    with record_solves() as solves:
        losses = train(net, step_net, batches(steps, batch, device), rank, world)
    found = {"rank": rank, "world": world, "losses": losses, "statuses": sorted({solve.status for solve in solves})}
    parameters = whole(net)
    found["weights"] = sum(p.double().sum().item() for p in parameters)  # equal on all ranks
    found["held"] = sum(p.to_local().numel() for p in net.parameters())  # by this rank, between steps
    if check and rank == 0:
        torch.manual_seed(0)
        alone = Equilibrium().to(device)
        train(alone, torch.compile(alone, backend="deq", options=options), batches(steps, batch, device))
        pairs = zip(parameters, alone.parameters(), strict=True)
        found["distance"] = max(float((p - q).norm() / q.norm()) for p, q in ((p, q.detach()) for p, q in pairs))
    dist.barrier()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples a step, of all ranks together (default %(default)s)")
    parser.add_argument("--half", action="store_true", help="mixed precision: products in bfloat16")
    parser.add_argument("--check", action="store_true", help="compare with one process on the same batches")
    parser.add_argument("--eager", action="store_true", help="without the compiler: FSDP2 alone")
    parser.add_argument("--options", type=json.loads, help="options of the backend, as JSON")
    line = json.dumps(main(**vars(parser.parse_args()))) + "\n"
    sys.stdout.write(line)  # at once: of a print, another rank's line may come before the line's end
