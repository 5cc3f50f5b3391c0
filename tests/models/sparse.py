"""Graph networks whose adjacency is a sparse matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NODES, WIDTH, CAP, TOL = 24, 8, 120, 1e-6


def adjacency() -> Tensor:
    """Rows that sum to one, [NODES, NODES], dense."""
    generator = torch.Generator().manual_seed(3)
    A = (torch.rand(NODES, NODES, generator=generator) < 0.15).float() + torch.eye(NODES).roll(1, 0)
    return A / A.sum(1, keepdim=True)


class Net(nn.Module):
    """`layout` says how the matrix is kept, as a buffer."""

    layout: Any = torch.sparse_coo
    A: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.W.weight, gain=0.7)
        self.register_buffer("A", adjacency().to_sparse(layout=self.layout))

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.U(x), torch.zeros_like(x)
        for _ in range(CAP):
            z = torch.tanh(self.A @ self.W(z) + u)
        return z


class Rows(Net):
    layout = torch.sparse_csr


class Transposed(Net):
    def forward(self, x: Tensor) -> Tensor:
        u, z = self.U(x), torch.zeros_like(x)
        for _ in range(CAP):
            z = torch.tanh(0.5 * torch.spmm(torch.transpose(self.A, 0, 1), self.W(z)) + u)
        return z


class Uncoalesced(Net):
    """Entries twice, that add up."""

    def __init__(self) -> None:
        super().__init__()
        A = self.A.coalesce()
        twice = torch.cat([A.indices(), A.indices()], 1), torch.cat([0.5 * A.values(), 0.5 * A.values()])
        self.A = torch.sparse_coo_tensor(*twice, (NODES, NODES))


class Personalised(Net):
    """PageRank from a layer's output, with a test, and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.P = 0.6 * adjacency().to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        h = self.U(x)
        z = h
        for _ in range(CAP):
            new = torch.sparse.mm(self.P, z) + 0.4 * h
            done = (new - z).norm() < TOL
            z = new
            if done:
                break
        return z


class OfAVector(Net):
    def forward(self, x: Tensor) -> Tensor:
        b = self.U(x).sum(1)
        z = torch.zeros_like(b)
        for _ in range(CAP):
            z = torch.tanh(0.8 * self.A.mv(z) + b)
        return z


class Squared(Net):
    """A product of two sparse matrices."""

    def forward(self, x: Tensor) -> Tensor:
        A = torch.sparse.mm(self.A, self.A)
        u, z = self.U(x), torch.zeros_like(x)
        for _ in range(CAP):
            z = torch.tanh(A @ self.W(z) + u)
        return z


class Summed(Net):
    """Something else is asked of it, in the loop."""

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.U(x), torch.zeros_like(x)
        for _ in range(CAP):
            z = torch.tanh((self.A * 0.5) @ self.W(z) + u)
        return z


class Returned(Net):
    """It leaves the function as what it is."""

    def forward(self, x: Tensor) -> Any:
        u, z = self.U(x), torch.zeros_like(x)
        for _ in range(CAP):
            z = torch.tanh(self.A @ self.W(z) + u)
        return z, self.A, isinstance(self.A, Tensor), self.A.shape


class Once(Net):
    """No fixed point is near."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.A @ self.W(x)) + self.A.t() @ self.U(x)


SOLVED = (Net, Rows, Transposed, Uncoalesced, Personalised, OfAVector)
LEFT_ALONE = (Squared, Summed, Once)
