"""An equilibrium character language model, trained on sonnets of Shakespeare (in the public domain).

One causal block is applied until its state no longer changes; a gate mixes the state with the injected characters, which makes
the block a contraction. The model is written as a loop of 30 passes, and compiled with one line.

    python examples/language_model.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_compile import explain, record_solves

TEXT = Path(__file__).parent / "data" / "sonnets.txt"


class EquilibriumLM(nn.Module):
    """characters [B, T] -> logits [B, T, vocabulary]"""

    def __init__(self, vocabulary: int, length: int = 48, width: int = 48, heads: int = 4, passes: int = 30) -> None:
        super().__init__()
        self.heads, self.passes = heads, passes
        self.character = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.norm = nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate = nn.Parameter(torch.full((width,), -1.0))
        self.head = nn.Linear(width, vocabulary)

    def block(self, z: Tensor, x: Tensor) -> Tensor:
        B, T, D = z.shape
        q, k, v = self.qkv(z + x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        h = z + self.mix(seen) + self.down(F.gelu(self.up(z + x)))
        gate = torch.sigmoid(self.gate)
        new: Tensor = gate * self.norm(h) + (1 - gate) * x
        return new

    def forward(self, characters: Tensor) -> Tensor:
        x = self.character(characters) + self.place[: characters.shape[1]]
        z = torch.zeros_like(x)
        for _ in range(self.passes):
            z = self.block(z, x)
        logits: Tensor = self.head(z)
        return logits


class Characters:
    """A text as numbers, and random windows of it."""

    def __init__(self, text: str, length: int) -> None:
        self.alphabet = sorted(set(text))
        self.data = torch.tensor([self.alphabet.index(c) for c in text])
        self.length = length

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.data) - self.length - 1, (count, 1))
        windows = self.data[starts + torch.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:]

    def unigram(self) -> float:
        """Nats a character of whoever knows how often each occurs, and nothing else."""
        share = torch.bincount(self.data).float() / len(self.data)
        return -(share * share.log()).sum().item()


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    characters, following = batch
    return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())


@torch.no_grad()
def write(model: nn.Module, characters: Characters, start: str, count: int) -> str:
    """`count` more characters, drawn at a temperature of 0.7."""
    text = [characters.alphabet.index(c) for c in start]
    for _ in range(count):
        window = torch.tensor([text[-characters.length :]])
        text.append(int(torch.multinomial((model(window)[0, -1] / 0.7).softmax(0), 1)))
    return "".join(characters.alphabet[index] for index in text)


def main(steps: int = 150, batch: int = 16, sample: int = 120, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train; losses in nats a character, what the solves needed, and a sample."""
    torch.manual_seed(0)
    characters = Characters(TEXT.read_text(), length=48)
    model = EquilibriumLM(len(characters.alphabet))
    fast = torch.compile(model, backend="deq", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses: list[float] = []
    with record_solves() as solves:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(fast, characters.batch(batch))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    some = characters.batch(batch)
    with torch.no_grad():
        loop, solved = loss_of(model, some).item(), loss_of(fast, some).item()
    return {
        "losses": losses,
        "unigram": characters.unigram(),
        "loss by the loop": loop,
        "loss by deq": solved,
        "evaluations": sum(solve.iterations for solve in solves) / len(solves),
        "solved": sum(solve.status == "solve" for solve in solves) / len(solves),
        "report": explain(model, **{**(options or {}), "inner": "eager"})(some[0]),
        "sample": write(model, characters, "Shall I ", sample),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    found = main(parser.parse_args().steps)
    print(found["report"])
    first, *_, last = found["losses"]
    print(f"nats a character: {first:.2f} at first, {last:.2f} now, {found['unigram']:.2f} by frequency alone")
    print(f"the trained model by its own loop {found['loss by the loop']:.4f}, by the solve {found['loss by deq']:.4f}")
    print(f"evaluations a training step: {found['evaluations']:.1f} in place of 30; solved in {found['solved']:.0%} of the steps")
    print(found["sample"])
