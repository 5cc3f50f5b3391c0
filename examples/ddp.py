"""Data-parallel training of an equilibrium model, on one machine or on many.

Each rank takes its share of every batch; DistributedDataParallel averages the gradients. gloo serves on CPUs, nccl on GPUs.
`--check` trains on the whole batches in rank 0 as well, and prints how far the weights of the two trainings are apart.

    torchrun --nproc-per-node 2 examples/ddp.py --check
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/ddp.py
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
from torch.nn.parallel import DistributedDataParallel

from deq_compile import record_solves


class Equilibrium(nn.Module):
    """z <- tanh(W z + U pixels), 40 times from zero, then a linear head. pixels [B, 64] -> logits [B, 10]"""

    def __init__(self, width=64, rounds=40):
        super().__init__()
        self.rounds = rounds
        self.inject, self.cell, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        nn.init.orthogonal_(self.cell.weight, gain=0.6)

    def forward(self, pixels):
        injected = self.inject(pixels)
        z = torch.zeros_like(injected)
        for _ in range(self.rounds):
            z = torch.tanh(self.cell(z) + injected)
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
        loss = F.cross_entropy(step_net(pixels[rank::world]), labels[rank::world])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def distance(a, b):
    """The largest difference of two models' parameters, each relative to its norm."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).norm() / q.norm()) for p, q in pairs)


def main(steps=100, batch=64, check=False, options=None):
    """Train on all ranks; what this rank saw, with the distance to the training of one process where rank 0 checks it."""
    if "RANK" not in os.environ:
        raise SystemExit("ddp.py: expected ranks, got a plain process. Fix: torchrun --nproc-per-node 2 examples/ddp.py")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    net = Equilibrium().to(device)
    step_net = torch.compile(DistributedDataParallel(net), backend="deq", options=options)
    with record_solves() as solves:
        losses = train(net, step_net, batches(steps, batch, device), rank, world)
    found = {"rank": rank, "world": world, "losses": losses, "statuses": sorted({solve.status for solve in solves})}
    found["weights"] = sum(p.double().sum().item() for p in net.parameters())  # equal on all ranks
    if check and rank == 0:
        torch.manual_seed(0)
        alone = Equilibrium().to(device)
        train(alone, torch.compile(alone, backend="deq", options=options), batches(steps, batch, device))
        found["distance"] = distance(net, alone)
    dist.barrier()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples a step, of all ranks together (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with one process on the same batches")
    parser.add_argument("--options", type=json.loads, help="options of the backend, as JSON")
    line = json.dumps(main(**vars(parser.parse_args()))) + "\n"
    sys.stdout.write(line)  # at once: of a print, another rank's line may come before the line's end
