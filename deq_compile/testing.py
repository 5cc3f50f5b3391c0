"""For tests and benchmarks of others: the solvers, adjoints, kernels and graphs below the public names, through one door.

What is reached through here may change with any version, but not in silence: `bench` uses nothing else, and a test holds that.
A name is imported when it is first asked for; those of Triton's kernels need Triton. It is looked up each time: what a
test replaces in a module is replaced here, and is not when the test is over.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deq_compile import rewrite as rewrite
    from deq_compile.backend import Backend as Backend
    from deq_compile.backend import deq as deq
    from deq_compile.config import BACKWARD_TOL_DEFAULT as BACKWARD_TOL_DEFAULT
    from deq_compile.config import BACKWARD_TOL_EXACT as BACKWARD_TOL_EXACT
    from deq_compile.kernels import broyden as broyden
    from deq_compile.kernels import gcr as gcr
    from deq_compile.kernels import iteration as iteration
    from deq_compile.kernels import native as native
    from deq_compile.kernels import recycle as recycle
    from deq_compile.kernels import reuse as reuse
    from deq_compile.kernels import tuned as tuned
    from deq_compile.kernels import workspace as workspace
    from deq_compile.kernels.broyden import coefficient_width as coefficient_width
    from deq_compile.kernels.broyden import factors_of as factors_of
    from deq_compile.kernels.broyden import new_state as new_state
    from deq_compile.kernels.broyden import step as step
    from deq_compile.kernels.broyden import triton_kernels as broyden_triton
    from deq_compile.kernels.broyden.gpu import TritonState as TritonState
    from deq_compile.kernels.broyden.state import Factors as Factors
    from deq_compile.kernels.device import rehearsal as rehearsal
    from deq_compile.kernels.gcr import move as move
    from deq_compile.kernels.gcr import new_state as new_adjoint
    from deq_compile.kernels.gcr import triton_kernels as gcr_triton
    from deq_compile.kernels.gcr.gpu import EXTEND_COLUMNS as EXTEND_COLUMNS
    from deq_compile.kernels.gcr.gpu import EXTEND_WARPS as EXTEND_WARPS
    from deq_compile.kernels.gcr.gpu import TritonGcr as TritonGcr
    from deq_compile.kernels.gcr.gpu import extend_columns as extend_columns
    from deq_compile.kernels.gcr.gpu import project_columns as project_columns
    from deq_compile.kernels.recycle import gpu as recycle_gpu
    from deq_compile.kernels.recycle import shared as recycle_shared
    from deq_compile.kernels.recycle import sketch as recycle_sketch
    from deq_compile.kernels.recycle import triton_kernels as recycle_triton
    from deq_compile.kernels.reuse import apply_multisecant as apply_multisecant
    from deq_compile.kernels.reuse import apply_transpose as apply_transpose
    from deq_compile.kernels.reuse import multisecant as multisecant
    from deq_compile.kernels.reuse import triton_kernels as reuse_triton
    from deq_compile.kernels.reuse.gpu import GRAM_COLUMNS as GRAM_COLUMNS
    from deq_compile.kernels.reuse.gpu import gram_warps as gram_warps
    from deq_compile.kernels.reuse.gpu import weight_rows as weight_rows
    from deq_compile.kernels.reuse.gpu import weight_warps as weight_warps
    from deq_compile.kernels.reuse.reference import apply_transpose_reference as apply_transpose_reference
    from deq_compile.kernels.tiles import Tiles as Tiles
    from deq_compile.kernels.tiles import by_shape as by_shape
    from deq_compile.kernels.tiles import power_of_two as power_of_two
    from deq_compile.kernels.tiles import tiles as tiles
    from deq_compile.kernels.triton_shared import set_conditional as set_conditional
    from deq_compile.region import op as op
    from deq_compile.region import pool as recycle_pool
    from deq_compile.region.adjoint import VJP as VJP
    from deq_compile.region.adjoint import AdjointSolution as AdjointSolution
    from deq_compile.region.adjoint import VJPFull as VJPFull
    from deq_compile.region.adjoint import jacobian_free as jacobian_free
    from deq_compile.region.adjoint import phantom as phantom
    from deq_compile.region.adjoint import solve_adjoint as solve_adjoint
    from deq_compile.region.body import BodySpec as BodySpec
    from deq_compile.region.compiled import CompiledRunner as CompiledRunner
    from deq_compile.region.forward import solve as solve
    from deq_compile.region.graphs import CapturedAdjoint as CapturedAdjoint
    from deq_compile.region.graphs import CapturedForward as CapturedForward
    from deq_compile.region.graphs import captures as captures
    from deq_compile.region.graphs import engines as engines
    from deq_compile.region.graphs.conditional import Condition as Condition
    from deq_compile.region.graphs.conditional import checked as checked
    from deq_compile.region.graphs.conditional import node_types as node_types
    from deq_compile.region.graphs.conditional import runtime as runtime
    from deq_compile.region.graphs.conditional import set_from_flag as set_from_flag
    from deq_compile.region.graphs.device import Device as Device
    from deq_compile.region.graphs.device import Graph as Graph
    from deq_compile.region.graphs.device import Work as Work
    from deq_compile.region.graphs.forward import ForwardSettings as ForwardSettings
    from deq_compile.region.graphs.operands import Operands as Operands
    from deq_compile.region.graphs.operands import addresses as addresses
    from deq_compile.region.layout import Layout as Layout
    from deq_compile.region.layout import channels_last as channels_last
    from deq_compile.region.modes import Ambient as Ambient
    from deq_compile.region.program import Program as Program
    from deq_compile.region.runners import runner_for as runner_for
    from deq_compile.regularise import jac_reg as jac_reg
    from deq_compile.regularise import spectral_radius as spectral_radius

# name -> the module that has it, and its name there; None: the module itself
_WHERE: dict[str, tuple[str, str | None]] = {
    "AdjointSolution": ("deq_compile.region.adjoint", "AdjointSolution"),
    "Ambient": ("deq_compile.region.modes", "Ambient"),
    "BACKWARD_TOL_DEFAULT": ("deq_compile.config", "BACKWARD_TOL_DEFAULT"),
    "BACKWARD_TOL_EXACT": ("deq_compile.config", "BACKWARD_TOL_EXACT"),
    "Backend": ("deq_compile.backend", "Backend"),
    "BodySpec": ("deq_compile.region.body", "BodySpec"),
    "CapturedAdjoint": ("deq_compile.region.graphs", "CapturedAdjoint"),
    "CapturedForward": ("deq_compile.region.graphs", "CapturedForward"),
    "CompiledRunner": ("deq_compile.region.compiled", "CompiledRunner"),
    "Condition": ("deq_compile.region.graphs.conditional", "Condition"),
    "Device": ("deq_compile.region.graphs.device", "Device"),
    "EXTEND_COLUMNS": ("deq_compile.kernels.gcr.gpu", "EXTEND_COLUMNS"),
    "EXTEND_WARPS": ("deq_compile.kernels.gcr.gpu", "EXTEND_WARPS"),
    "Factors": ("deq_compile.kernels.broyden.state", "Factors"),
    "ForwardSettings": ("deq_compile.region.graphs.forward", "ForwardSettings"),
    "Graph": ("deq_compile.region.graphs.device", "Graph"),
    "Layout": ("deq_compile.region.layout", "Layout"),
    "Operands": ("deq_compile.region.graphs.operands", "Operands"),
    "Program": ("deq_compile.region.program", "Program"),
    "Tiles": ("deq_compile.kernels.tiles", "Tiles"),
    "TritonGcr": ("deq_compile.kernels.gcr.gpu", "TritonGcr"),
    "TritonState": ("deq_compile.kernels.broyden.gpu", "TritonState"),
    "VJP": ("deq_compile.region.adjoint", "VJP"),
    "VJPFull": ("deq_compile.region.adjoint", "VJPFull"),
    "Work": ("deq_compile.region.graphs.device", "Work"),
    "rewrite": ("deq_compile.rewrite", None),
    "addresses": ("deq_compile.region.graphs.operands", "addresses"),
    "apply_multisecant": ("deq_compile.kernels.reuse", "apply_multisecant"),
    "apply_transpose": ("deq_compile.kernels.reuse", "apply_transpose"),
    "apply_transpose_reference": ("deq_compile.kernels.reuse.reference", "apply_transpose_reference"),
    "broyden": ("deq_compile.kernels.broyden", None),
    "broyden_triton": ("deq_compile.kernels.broyden.triton_kernels", None),
    "by_shape": ("deq_compile.kernels.tiles", "by_shape"),
    "captures": ("deq_compile.region.graphs.captures", None),
    "channels_last": ("deq_compile.region.layout", "channels_last"),
    "checked": ("deq_compile.region.graphs.conditional", "checked"),
    "coefficient_width": ("deq_compile.kernels.broyden", "coefficient_width"),
    "deq": ("deq_compile.backend", "deq"),
    "engines": ("deq_compile.region.graphs.engines", None),
    "extend_columns": ("deq_compile.kernels.gcr.gpu", "extend_columns"),
    "factors_of": ("deq_compile.kernels.broyden", "factors_of"),
    "gcr": ("deq_compile.kernels.gcr", None),
    "gcr_triton": ("deq_compile.kernels.gcr.triton_kernels", None),
    "GRAM_COLUMNS": ("deq_compile.kernels.reuse.gpu", "GRAM_COLUMNS"),
    "gram_warps": ("deq_compile.kernels.reuse.gpu", "gram_warps"),
    "iteration": ("deq_compile.kernels.iteration", None),
    "jac_reg": ("deq_compile.regularise", "jac_reg"),
    "jacobian_free": ("deq_compile.region.adjoint", "jacobian_free"),
    "move": ("deq_compile.kernels.gcr", "move"),
    "multisecant": ("deq_compile.kernels.reuse", "multisecant"),
    "native": ("deq_compile.kernels.native", None),
    "new_adjoint": ("deq_compile.kernels.gcr", "new_state"),
    "new_state": ("deq_compile.kernels.broyden", "new_state"),
    "node_types": ("deq_compile.region.graphs.conditional", "node_types"),
    "op": ("deq_compile.region.op", None),
    "phantom": ("deq_compile.region.adjoint", "phantom"),
    "power_of_two": ("deq_compile.kernels.tiles", "power_of_two"),
    "project_columns": ("deq_compile.kernels.gcr.gpu", "project_columns"),
    "rehearsal": ("deq_compile.kernels.device", "rehearsal"),
    "recycle": ("deq_compile.kernels.recycle", None),
    "recycle_gpu": ("deq_compile.kernels.recycle.gpu", None),
    "recycle_pool": ("deq_compile.region.pool", None),
    "recycle_shared": ("deq_compile.kernels.recycle.shared", None),
    "recycle_sketch": ("deq_compile.kernels.recycle.sketch", None),
    "recycle_triton": ("deq_compile.kernels.recycle.triton_kernels", None),
    "reuse": ("deq_compile.kernels.reuse", None),
    "reuse_triton": ("deq_compile.kernels.reuse.triton_kernels", None),
    "runner_for": ("deq_compile.region.runners", "runner_for"),
    "runtime": ("deq_compile.region.graphs.conditional", "runtime"),
    "set_conditional": ("deq_compile.kernels.triton_shared", "set_conditional"),
    "set_from_flag": ("deq_compile.region.graphs.conditional", "set_from_flag"),
    "solve": ("deq_compile.region.forward", "solve"),
    "solve_adjoint": ("deq_compile.region.adjoint", "solve_adjoint"),
    "spectral_radius": ("deq_compile.regularise", "spectral_radius"),
    "step": ("deq_compile.kernels.broyden", "step"),
    "tiles": ("deq_compile.kernels.tiles", "tiles"),
    "tuned": ("deq_compile.kernels.tuned", None),
    "weight_rows": ("deq_compile.kernels.reuse.gpu", "weight_rows"),
    "weight_warps": ("deq_compile.kernels.reuse.gpu", "weight_warps"),
    "workspace": ("deq_compile.kernels.workspace", None),
}

__all__ = [
    "BACKWARD_TOL_DEFAULT",
    "BACKWARD_TOL_EXACT",
    "EXTEND_COLUMNS",
    "EXTEND_WARPS",
    "GRAM_COLUMNS",
    "VJP",
    "AdjointSolution",
    "Ambient",
    "Backend",
    "BodySpec",
    "CapturedAdjoint",
    "CapturedForward",
    "CompiledRunner",
    "Condition",
    "Device",
    "Factors",
    "ForwardSettings",
    "Graph",
    "Layout",
    "Operands",
    "Program",
    "Tiles",
    "TritonGcr",
    "TritonState",
    "VJPFull",
    "Work",
    "addresses",
    "apply_multisecant",
    "apply_transpose",
    "apply_transpose_reference",
    "broyden",
    "broyden_triton",
    "by_shape",
    "captures",
    "channels_last",
    "checked",
    "coefficient_width",
    "deq",
    "engines",
    "extend_columns",
    "factors_of",
    "gcr",
    "gcr_triton",
    "gram_warps",
    "iteration",
    "jac_reg",
    "jacobian_free",
    "move",
    "multisecant",
    "native",
    "new_adjoint",
    "new_state",
    "node_types",
    "op",
    "phantom",
    "power_of_two",
    "project_columns",
    "recycle",
    "recycle_gpu",
    "recycle_pool",
    "recycle_shared",
    "recycle_sketch",
    "recycle_triton",
    "rehearsal",
    "reuse",
    "reuse_triton",
    "rewrite",
    "runner_for",
    "runtime",
    "set_conditional",
    "set_from_flag",
    "solve",
    "solve_adjoint",
    "spectral_radius",
    "step",
    "tiles",
    "tuned",
    "weight_rows",
    "weight_warps",
    "workspace",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
