"""Forget what this process has learnt."""

from __future__ import annotations

import torch

from .capture import sites
from .families import functions, hooks, solvers
from .kernels import workspace
from .region import agree, eager, graphs, layout, shapes, site


def reset() -> None:
    """Forget all that was compiled and learnt in this process, and give its memory back.

    Gone are compiled bodies, captured CUDA graphs, spare memory, what was refused while tracing, and what was learnt about
    solvers (not the names given by `register_solver`). Models that are compiled stay so and go on working: their regions begin
    as at a first call, compare with the user's loop again and decide again. A forward whose backward is still to come keeps
    what it needs, but where hooks on saved tensors copied all that it saved. Files on disk stay.

    `torch._dynamo.reset()`, which drops the compiled models themselves, calls this too where a model was compiled with this
    backend. Not to be called while another thread runs a compiled model.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # captured solves may be at work
    graphs.clear()
    shapes.clear()
    site.clear()
    eager.clear()
    agree.clear()
    workspace.clear()
    sites.clear()
    solvers.clear()
    layout.layout_of.cache_clear()
    hooks.read_hook.cache_clear()
    functions.differentiates_inside.cache_clear()
