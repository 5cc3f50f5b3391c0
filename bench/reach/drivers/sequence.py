"""Sequence models: DEQ transformers and looped ones."""

from __future__ import annotations

import torch

from ..manifest import Case, Model
from ..sources import absent


def deq_transformer(tight: bool) -> Case:
    """locuslab/deq, DEQ-Sequence, in training with its hook, without dropout; no loss on the Jacobian."""
    absent("termcolor")
    from lib import solvers
    from models.deq_transformer import DEQTransformerLM

    d = 32
    model = DEQTransformerLM(
        100, 2, 2, 4, d, d // 4, 2 * d, 0.0, 0.0, d_embed=d, tgt_len=24, mem_len=0, local_size=0, f_solver=solvers.broyden
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    tokens = torch.randint(0, 100, (24, 4))
    options = {"f_thres": 200 if tight else 30, "b_thres": 200 if tight else 40, "compute_jac_loss": False}
    if tight:
        model.f_solver = model.b_solver = lambda f, x0, **kw: solvers.broyden(f, x0, **{**kw, "eps": 1e-11})

    return Case(Wrapped(model, options), (tokens,))


class Wrapped(torch.nn.Module):
    """The training script's call of the model, up to its hidden states."""

    def __init__(self, model: torch.nn.Module, options: dict[str, object]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        hidden = self.model(data, data, None, **self.options)
        return hidden[0]


MODELS = (
    Model(
        "deq-transformer",
        "locuslab/deq",
        "1fb7059d6d89bb26d16da80ab9489dcc73fc5472",
        "MIT",
        "Broyden with traces, a hook that solves",
        deq_transformer,
        path=("DEQ-Sequence", ""),
    ),
)
