"""The modes (gradient recording, autocast) that hold at a node of a Dynamo graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from deq_compile.region.modes import Ambient
from deq_compile.torch_parts import (
    enter_autocast,
    enter_inference_mode,
    exit_autocast,
    exit_inference_mode,
    set_grad_enabled,
)

GRAD_TARGETS = (set_grad_enabled, torch.set_grad_enabled)
AUTOCAST_TARGETS = (enter_autocast, exit_autocast)


def ambient_at(graph: fx.Graph, place: fx.Node, start: Ambient) -> Ambient:
    """The modes that hold just before `place`, when `start` held at the beginning of the graph."""
    grad, cast = start.grad, {d: (e, t) for d, e, t in start.autocast}
    entered_inference: dict[fx.Node, bool] = {}
    entered: dict[fx.Node, tuple[str, tuple[bool, torch.dtype]]] = {}
    for node in graph.nodes:
        if node is place:
            break
        if node.target in GRAD_TARGETS:
            grad = bool(node.args[0])
        elif node.target is enter_inference_mode:
            entered_inference[node], grad = grad, grad and not node.args[0]
        elif node.target is exit_inference_mode and isinstance(node.args[0], fx.Node):
            grad = entered_inference.pop(node.args[0], grad)
        elif node.target is enter_autocast:
            device, dtype, enabled = _enter_arguments(node)
            if device in cast:
                entered[node] = (device, cast[device])
                cast[device] = (enabled, dtype or torch.get_autocast_dtype(device))
        elif node.target is exit_autocast and isinstance(node.args[0], fx.Node) and node.args[0] in entered:
            device, before = entered.pop(node.args[0])
            cast[device] = before
    return Ambient(grad, tuple((d, e, t) for d, (e, t) in cast.items()))


def _enter_arguments(node: fx.Node) -> tuple[str, Any, bool]:
    values: dict[str, Any] = dict(zip(("device_type", "dtype", "enabled"), node.args, strict=False), **node.kwargs)
    return values["device_type"], values.get("dtype"), bool(values.get("enabled", True))
