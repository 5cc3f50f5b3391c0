"""Graphs: implicit graph networks, personalised PageRank, label propagation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..manifest import Case, Model
from ..sources import absent
from . import stand_ins
from .sequence import Called, deq_arguments, softly

NODES = 120


def edges() -> Tensor:
    """An undirected random graph, both directions of every edge, [2, E]."""
    generator = torch.Generator().manual_seed(3)
    upper = torch.triu(torch.rand(NODES, NODES, generator=generator) < 0.05, diagonal=1)
    ring = torch.eye(NODES).roll(1, 0).bool()
    return (upper | upper.T | ring | ring.T).nonzero().T.contiguous()


def adjacency() -> Any:
    """The same as a scipy matrix."""
    import numpy as np
    import scipy.sparse as sp

    row, col = edges().numpy()
    return sp.csr_matrix((np.ones(len(row), dtype=np.float32), (row, col)), shape=(NODES, NODES))


def power_iteration(niter: int) -> Case:
    """gasteigerjo/ppnp: a linear layer and its power iteration."""
    from ppnp.pytorch.propagation import PPRPowerIteration

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.propagation = nn.Linear(32, 7), PPRPowerIteration(adjacency(), alpha=0.1, niter=niter)

        def forward(self, x: Tensor, idx: Tensor) -> Tensor:
            return self.propagation(self.fc(x), idx)

    return Case(Net(), (torch.randn(NODES, 32), torch.arange(NODES)))


def implicit_graph(tight: bool) -> Case:
    """SwiftieH/IGNN: its network for chains; features and adjacency as its loader makes them."""
    absent("torch_sparse")
    from models_chains import IGNN
    from normalization import aug_normalized_adjacency
    from utils import sparse_mx_to_torch_sparse_tensor

    model = IGNN(16, 24, 5, NODES, dropout=0.0, kappa=0.9)
    adj = sparse_mx_to_torch_sparse_tensor(aug_normalized_adjacency(adjacency())).float()
    return Case(model, (torch.randn(16, NODES), adj))


def finite_graph(tight: bool) -> Case:
    """liu-jc/EIGNN: its unrolled comparison, thirty layers of shared weights over a sparse adjacency."""
    absent("torch_sparse", "ipdb")
    from models_chains import IGNN_finite
    from normalization import aug_normalized_adjacency
    from utils import sparse_mx_to_torch_sparse_tensor

    model = IGNN_finite(16, 5, 24, K=30, dropout=0.0)
    softly(model.hid_layer, 0.7)
    adj = sparse_mx_to_torch_sparse_tensor(aug_normalized_adjacency(adjacency())).float()
    return Case(model, (torch.randn(16, NODES), adj))


def zoo_implicit_graph(tight: bool) -> Case:
    """locuslab/torchdeq, deq-zoo/ignn: the same on TorchDEQ."""
    absent("torch_sparse")
    from models_chains import IGNN
    from normalization import aug_normalized_adjacency
    from utils import sparse_mx_to_torch_sparse_tensor

    arguments = deq_arguments(tight, ift=True, norm_type="none", f_solver="fixed_point_iter", b_solver="fixed_point_iter")
    model = IGNN(arguments, 16, 24, 5, NODES, dropout=0.0, kappa=0.9)
    adj = sparse_mx_to_torch_sparse_tensor(aug_normalized_adjacency(adjacency())).float()
    return Case(model, (torch.randn(16, NODES), adj))


def nonlinear_diffusion(tight: bool) -> Case:
    """7qchen/GIND: a fixed count without gradients, then four with."""
    stand_ins.torch_scatter()
    absent("torch_sparse")
    from model.gind import GIND

    model = GIND(16, 24, 5, num_layers=2, alpha=0.5, iter_nums=(32, 4))
    edge_index = edges()
    degree = torch.bincount(edge_index[0], minlength=NODES).float()
    return Case(model, (torch.randn(NODES, 16), edge_index, degree.pow(-0.5)[:, None]))


def pyg_appnp(tight: bool) -> Case:
    """torch_geometric: APPNP behind a linear layer, normalised once."""
    from torch_geometric.nn import APPNP
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    edge_index, weight = gcn_norm(edges(), num_nodes=NODES)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.propagation = nn.Linear(32, 7), APPNP(K=30, alpha=0.1, normalize=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.propagation(self.fc(x), edge_index, weight)

    return Case(Net(), (torch.randn(NODES, 32),))


def pyg_label_propagation(tight: bool) -> Case:
    """torch_geometric: fifty steps of correct and smooth on the scores of a linear layer."""
    from torch_geometric.nn import CorrectAndSmooth
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    edge_index, weight = gcn_norm(edges(), num_nodes=NODES)
    post = CorrectAndSmooth(50, 0.8, 50, 0.8, autoscale=False)
    mask, labels = torch.arange(0, NODES, 3), torch.arange(0, NODES, 3) % 7

    def call(fc: nn.Module, x: Tensor) -> Tensor:
        soft = fc(x).softmax(dim=-1)
        corrected = post.correct(soft, labels, mask, edge_index, weight)
        return post.smooth(corrected, labels, mask, edge_index, weight)

    return Case(Called(nn.Linear(32, 7), call), (torch.randn(NODES, 32),))


PYG = ("pyg-team/pytorch_geometric", "", "MIT")

MODELS = (
    Model(
        "ppnp-power-iteration",
        "gasteigerjo/ppnp",
        "8514e4dc2c5f1e3047ad915f6a5701c24c9d94dd",
        "MIT",
        "30 steps with a sparse matrix",
        lambda tight: power_iteration(30),
    ),
    Model(
        "ignn",
        "SwiftieH/IGNN",
        "b3c1ab31f0167827d44f1875cb8f84b725a06905",
        "MIT",
        "a Function that solves, both ways, sparse",
        implicit_graph,
        path=("nodeclassification",),
    ),
    Model(
        "ignn-finite",
        "liu-jc/EIGNN",
        "6a2c8e73c11bfebc8614d955226dbae600cc8dfc",
        "MIT",
        "30 shared layers, sparse",
        finite_graph,
    ),
    Model(
        "zoo-ignn",
        "locuslab/torchdeq",
        "4f6bd5fa66dd991cad74fcc847c88061764cf8db",
        "MIT",
        "TorchDEQ, implicit, sparse",
        zoo_implicit_graph,
        path=("deq-zoo/ignn/nodeclassification", ""),
    ),
    Model(
        "gind",
        "7qchen/GIND",
        "6271985987615140eff671321d08cb082ec7be18",
        "MIT",
        "28 steps without gradients, 4 with",
        nonlinear_diffusion,
    ),
    Model("pyg-appnp", *PYG, "30 steps of message passing", pyg_appnp, package="torch_geometric"),
    Model("pyg-correct-and-smooth", *PYG, "twice 50 steps of message passing", pyg_label_propagation, package="torch_geometric"),
)
