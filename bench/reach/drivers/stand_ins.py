"""Packages that a repository imports and that are not to be had for every torch."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor


def torch_scatter() -> None:
    """It has to be compiled against each torch: the functions that are used here, from torch_geometric."""
    from torch_geometric.utils import scatter

    def scatter_add(src: Tensor, index: Tensor, dim: int = 0, dim_size: int | None = None) -> Tensor:
        return scatter(src, index, dim=dim, dim_size=dim_size, reduce="sum")

    module: Any = types.ModuleType("torch_scatter")
    module.scatter, module.scatter_add = scatter, scatter_add
    sys.modules.setdefault("torch_scatter", module)


def flash_attn() -> None:
    """It needs a GPU: its one function, [batch, length, heads, width], by PyTorch's own attention."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    for name in ("flash_attn_interface", "flash_attn"):
        module: Any = types.ModuleType(name)
        module.flash_attn_func = flash_attn_func
        sys.modules.setdefault(name, module)


def torchvision() -> None:
    """A torchvision without its compiled operators still imports, once those that it registers shapes for have a schema."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    kept.append(library)


kept: list[Any] = []  # a library is gone with its last reference
