# %% [markdown]
# # An implicit graph network on the karate club
#
# Zachary's karate club has 34 members and 78 friendships. It split into two factions, and two members are known: the instructor
# and the officer. An implicit graph network passes messages until they no longer change: its state is the fixed point of one
# layer, so each member hears from all others, however far away. The network is written as a loop of 60 rounds.

# %%
from typing import Any

import matplotlib.pyplot as plt
import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_compile import explain, record_solves


class ImplicitGraphNet(nn.Module):
    """Z <- tanh(A Z W + X U), 60 rounds. A [N, N] is the normalised adjacency, X [N, N] one-hot features; -> logits [N, 2]."""

    adjacency: Tensor

    def __init__(self, adjacency: Tensor, width: int = 32, rounds: int = 60) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.rounds = rounds
        self.inject = nn.Linear(len(adjacency), width)
        self.mix = nn.Parameter(torch.empty(width, width))
        self.head = nn.Linear(width, 2)
        nn.init.orthogonal_(self.mix)

    def forward(self, features: Tensor) -> Tensor:
        injected = self.inject(features)
        mix = 0.9 * self.mix / torch.linalg.matrix_norm(self.mix, 2)  # the norm of A is 1, so each round contracts
        state = torch.zeros_like(injected)
        for _ in range(self.rounds):
            state = torch.tanh(self.adjacency @ state @ mix + injected)
        logits: Tensor = self.head(state)
        return logits


# %%
def karate_club() -> tuple[Tensor, Tensor, Tensor, Any]:
    """Adjacency D^-1/2 (A + 1) D^-1/2 [34, 34], the factions [34] as 0 and 1, the two members who are known, the graph."""
    graph = nx.karate_club_graph()
    adjacency = torch.tensor(nx.to_numpy_array(graph, weight=None), dtype=torch.float32) + torch.eye(len(graph))
    scale = adjacency.sum(1).rsqrt()
    factions = torch.tensor([graph.nodes[member]["club"] == "Officer" for member in graph]).long()
    return scale[:, None] * adjacency * scale, factions, torch.tensor([0, 33]), graph


def train(model: nn.Module, step_model: Any, factions: Tensor, known: Tensor, steps: int) -> tuple[float, Tensor]:
    """Cross-entropy on the known members; the share of all others that is put into the right faction."""
    features = torch.eye(len(factions))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(step_model(features)[known], factions[known]).backward()
        optimizer.step()
    with torch.no_grad():
        guess = step_model(features).argmax(1)
    others = torch.ones(len(factions), dtype=torch.bool)
    others[known] = False
    return (guess == factions)[others].float().mean().item(), guess


# %% [markdown]
# The same model is trained twice: as it is, and through `torch.compile(backend="deq")`.


# %%
def main(steps: int = 60, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train both ways; accuracies, evaluations of a round, and the report of what was found."""
    adjacency, factions, known, graph = karate_club()
    found: dict[str, Any] = {}
    for name in ("eager", "deq"):
        torch.manual_seed(0)
        model = ImplicitGraphNet(adjacency)
        step_model = model if name == "eager" else torch.compile(model, backend="deq", options=options)
        with record_solves() as solves:
            found[name], guess = train(model, step_model, factions, known, steps)
    found["evaluations"] = sum(solve.iterations for solve in solves) / len(solves)
    found["rounds"] = model.rounds
    found["report"] = explain(model, **{**(options or {}), "inner": "eager"})(torch.eye(len(factions)))
    found["graph"], found["guess"], found["factions"] = graph, guess, factions
    return found


# %%
found = main() if __name__ == "__main__" else None
if found:
    print(found["report"])
    print(f"right about the other 32 members: eager {found['eager']:.1%}, deq {found['deq']:.1%}")
    print(f"evaluations of a round: {found['evaluations']:.1f} in place of {found['rounds']}")


# %%
def draw(found: dict[str, Any]) -> None:
    """The club: colours are the network's guess, squares the two who were known, red rims the mistakes."""
    guess, factions, graph = found["guess"], found["factions"], found["graph"]
    place = nx.spring_layout(graph, seed=4)
    rims = ["red" if a != b else "black" for a, b in zip(guess, factions, strict=True)]
    colours = [f"C{faction}" for faction in guess.tolist()]
    nx.draw_networkx(graph, place, node_color=colours, edgecolors=rims, node_size=250, font_size=8, edge_color="lightgrey")
    nx.draw_networkx_nodes(graph, place, nodelist=[0, 33], node_shape="s", node_color=[colours[0], colours[33]], node_size=300)
    plt.axis("off")


if found:
    draw(found)
    plt.show()
