"""Sequence models: DEQ transformers, looped ones, reasoners, and an implicit neural representation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..manifest import Case, Model
from ..sources import absent, cuda_named
from . import stand_ins


def first(output: Any) -> Tensor:
    return output[0]


class Called(nn.Module):
    """A model with the keywords that its training script passes."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Any) -> Any:
        return self.call(self.model, *args)


def softly(model: nn.Module, factor: float) -> None:
    """Smaller weights: a trained DEQ converges, one as initialised may not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def deq_transformer(tight: bool) -> Case:
    """locuslab/deq, DEQ-Sequence, in training with its hook, without dropout and without the loss on the Jacobian."""
    absent("termcolor")
    with cuda_named():
        from lib import solvers
        from models.deq_transformer import DEQTransformerLM

    torch.manual_seed(0)
    d = 32
    model = DEQTransformerLM(
        100, 2, 2, 4, d, d // 4, 2 * d, 0.0, 0.0, d_embed=d, tgt_len=24, mem_len=24, local_size=0, f_solver=solvers.broyden
    )
    softly(model.func, 0.5)
    steps = 200 if tight else 30
    if tight:
        model.f_solver = model.b_solver = lambda f, x0, **keywords: solvers.broyden(f, x0, **{**keywords, "eps": 1e-11})
    tokens = torch.randint(0, 100, (24, 4))

    def call(model: nn.Module, data: Tensor) -> Any:
        return model(data, data, None, f_thres=steps, b_thres=steps, compute_jac_loss=False)

    return Case(Called(model, call), (tokens,), first)


def deq_arguments(tight: bool, **changed: Any) -> argparse.Namespace:
    """The options of a DEQ zoo model at TorchDEQ's defaults."""
    from torchdeq.utils import add_deq_args

    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    arguments = parser.parse_args([])
    for name, value in changed.items():
        setattr(arguments, name, value)
    if tight:
        arguments.f_tol = arguments.b_tol = 1e-11
        arguments.f_max_iter = arguments.b_max_iter = 300
    return arguments


def zoo_sequence(tight: bool) -> Case:
    """locuslab/torchdeq, deq-zoo/deq-seq: the DEQ transformer on TorchDEQ, implicit differentiation."""
    with cuda_named():
        from models.deq_transformer import DEQTransformerLM

    d = 32
    arguments = deq_arguments(tight, ift=True, norm_type="none")
    model = DEQTransformerLM(arguments, 100, 2, 2, 4, d, d // 4, 2 * d, 0.0, 0.0, d_embed=d, tgt_len=24, mem_len=24, local_size=0)
    softly(model.func, 0.5)
    tokens = torch.randint(0, 100, (4, 24))
    return Case(Called(model, lambda model, data: model(data, data, None, compute_jac_loss=False)), (tokens,), first)


def zoo_representation(tight: bool) -> Case:
    """locuslab/torchdeq, deq-zoo/deq-inr: an implicit neural representation with sine injections."""
    absent("plyfile", "skimage", "skimage.measure", "cv2", "trimesh", "imageio", "configargparse")
    from modules.models import DEQINR

    arguments = deq_arguments(tight, ift=True, norm_type="weight_norm")
    model = DEQINR(arguments, 2, 64, 3, input_scale=16.0, filter_type="siren_like", n_layers=1)
    softly(model.f, 0.7)
    return Case(model, (torch.rand(256, 2) * 2 - 1,), lambda output: output["output"])


def looped_transformer(tight: bool) -> Case:
    """Leiay/looped_transformer: twenty loops, of which the last five are trained."""
    from models import TransformerModelLooped

    model = TransformerModelLooped(8, 16, n_embd=32, n_layer=1, n_head=4)
    model.print_flag = True
    call = Called(model, lambda model, xs, ys: model(xs, ys, 15, 20))
    return Case(call, (torch.randn(8, 12, 8), torch.randn(8, 12)), lambda output: torch.stack(output))


def tiny_recursive_model(tight: bool) -> Case:
    """SamsungSAILMontreal/TinyRecursiveModels: three cycles of six, the last with gradients."""
    absent("coolname", "wandb")
    from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1 as Reasoner

    settings: dict[str, Any] = {
        "batch_size": 4,
        "seq_len": 16,
        "num_puzzle_identifiers": 1,
        "vocab_size": 12,
        "H_cycles": 3,
        "L_cycles": 6,
    }
    settings |= {"H_layers": 0, "L_layers": 2, "hidden_size": 64, "expansion": 2.0, "num_heads": 4, "pos_encodings": "rope"}
    settings |= {
        "halt_max_steps": 4,
        "halt_exploration_prob": 0.0,
        "forward_dtype": "float32",
        "no_ACT_continue": True,
        "puzzle_emb_len": 0,
    }
    model = Reasoner(settings)
    batch = {"inputs": torch.randint(0, 12, (4, 16)), "puzzle_identifiers": torch.zeros(4, dtype=torch.int32)}
    carry = model.initial_carry(batch)
    call = Called(model.inner, lambda inner, batch: inner(inner.reset_carry(carry.halted, carry.inner_carry), batch)[1])
    return Case(call, (batch,))


def hierarchical_reasoning(tight: bool) -> Case:
    """sapientinc/HRM: two cycles of two, one step of them with gradients."""
    stand_ins.flash_attn()
    from models.hrm.hrm_act_v1 import HierarchicalReasoningModel_ACTV1 as Reasoner

    settings: dict[str, Any] = {"batch_size": 4, "seq_len": 16, "num_puzzle_identifiers": 1, "vocab_size": 12, "H_cycles": 2}
    settings |= {"L_cycles": 2, "H_layers": 2, "L_layers": 2, "hidden_size": 64, "expansion": 2.0, "num_heads": 4}
    settings |= {"pos_encodings": "rope", "halt_max_steps": 4, "halt_exploration_prob": 0.0, "forward_dtype": "float32"}
    model = Reasoner(settings)
    batch = {"inputs": torch.randint(0, 12, (4, 16)), "puzzle_identifiers": torch.zeros(4, dtype=torch.int32)}
    carry = model.initial_carry(batch)
    call = Called(model.inner, lambda inner, batch: inner(inner.reset_carry(carry.halted, carry.inner_carry), batch)[1])
    return Case(call, (batch,))


TORCHDEQ = ("locuslab/torchdeq", "4f6bd5fa66dd991cad74fcc847c88061764cf8db", "MIT")

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
    Model("zoo-deq-seq", *TORCHDEQ, "TorchDEQ, implicit", zoo_sequence, path=("deq-zoo/deq-seq", "")),
    Model("zoo-deq-inr", *TORCHDEQ, "TorchDEQ, implicit", zoo_representation, path=("deq-zoo/deq-inr", "")),
    Model(
        "looped-transformer",
        "Leiay/looped_transformer",
        "6b3bdb2295625092cbe7f868ca1742ab28d4cd5b",
        "MIT",
        "20 loops, the last 5 predict",
        looped_transformer,
        path=("scripts",),
    ),
    Model(
        "tiny-recursive-model",
        "SamsungSAILMontreal/TinyRecursiveModels",
        "e7b68717f0a6c4cbb4ce6fbef787b14f42083bd9",
        "MIT",
        "nested short cycles, the last attached",
        tiny_recursive_model,
        double=False,
    ),
    Model(
        "hierarchical-reasoning-model",
        "sapientinc/HRM",
        "42410daaaf6ac8b266536d105a6e2362ffe40929",
        "Apache-2.0",
        "nested short cycles, the last attached",
        hierarchical_reasoning,
        double=False,
    ),
)
