"""``python -m bench kernels``: compile every Triton kernel for sm_80, sm_89 and sm_90 (or `--arch`); its registers and loads.

A row a kernel, architecture and configuration: registers a thread, spills (bytes of local memory and stack), shared memory, the
widest global load, asynchronous copies. Rows above the budget of their architecture are named, and make the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

ARCHITECTURES = (80, 89, 90)
# Registers a thread and bytes of spills that a kernel may use. Triton 3.8 compiles for Blackwell with a few bytes of stack.
BUDGETS = {80: (168, 0), 89: (168, 0), 90: (168, 0), 100: (176, 16), 120: (176, 16)}
# `weights` is bound by latency, one program a multiprocessor: it may have all registers, and spill none.
ALONE = {"weights": 255}
# Steps that fit: a small memory, a usual solve, the default memory of 40, the largest of 64.
STEPS = (8, 16, 41, 65)
DTYPES = ("fp32", "bf16")
BASIS = 40  # pairs of the adjoint iteration

_INTS = {"n_ptr", "own_n_ptr", "stall_ptr", "count_ptr", "done_ptr", "ints_ptr", "steps_ptr"}
_LONGS = {"table_ptr", "handle_ptr", "ticket_ptr"}
_DOUBLES = {"work_ptr"}
_ALIGNED = {"D", "ROW", "S_ROW", "SLAB"}
_FLOATS = {"tol", "floor", "eta", "tiny"}


@dataclass(frozen=True)
class Row:
    kernel: str
    arch: str
    form: str
    dtype: str
    steps: int
    registers: int
    spills: int
    shared_bytes: int
    load_width: int
    async_copies: int
    sets_condition: bool


def kernels() -> dict[str, Any]:
    from deq_compile.testing import broyden_triton as broyden
    from deq_compile.testing import gcr_triton as gcr
    from deq_compile.testing import recycle_triton as recycle
    from deq_compile.testing import reuse_triton as reuse

    names = {
        broyden: ("start", "summarise", "finish", "step_fused", "dots", "combine"),
        reuse: ("transpose_fused", "transpose_dots", "transpose_combine", "gram", "weights", "addresses"),
        gcr: ("begin", "project", "extend", "advance"),
        recycle: ("thin_weights", "thin_apply"),
    }
    found = {name: getattr(module, name) for module, some in names.items() for name in some}
    # The same kernels as the type-II operator M.
    return found | {name.replace("transpose", "multisecant"): kernel for name, kernel in found.items() if "transpose" in name}


def constants(name: str, steps: int, graph: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel, as the launchers choose them for a long row; `graph`: in a WHILE node."""
    import triton.language as tl

    from deq_compile.testing import EXTEND_COLUMNS, EXTEND_WARPS, by_shape, extend_columns, power_of_two, project_columns

    fused = name.endswith("fused")
    cut = by_shape(32, 4096 if fused else 65536, steps)
    basis = by_shape(32, 65536, BASIS)
    wide = name.endswith("combine") or name == "advance"
    values = {
        "M": steps - 1, "BM": cut.BM, "BD": cut.BD2 if wide else cut.BD, "BD2": cut.BD2, "BP": power_of_two(cut.slabs),
        "STAGES": cut.stages, "RELATIVE": True, "GIVEN": False, "OBSERVE": True, "INDIRECT": graph, "TABLE": graph, "COND": graph,
        "BB": 256, "ACC": tl.float32, "SHIFT": 0 if name.startswith("multisecant") else 1, "SLOTS": steps, "BK": basis.BM,
        "FIRST": False,
    }  # fmt: skip
    if name in ("project", "extend", "advance"):
        values["M"] = BASIS
    if name == "project":
        values["BD"] = project_columns(basis)
    if name == "extend":
        return {**values, "BD": extend_columns(cut), "BD2": EXTEND_COLUMNS, "warps": EXTEND_WARPS, "stages": cut.stages}
    if name == "weights":
        from deq_compile.testing import weight_rows, weight_warps

        LD = min(weight_rows(steps), 64)
        return {**values, "LD": LD, "warps": weight_warps(LD), "stages": cut.stages}
    if name == "gram":
        from deq_compile.testing import GRAM_COLUMNS, gram_warps

        BM = min(max(cut.BM, 16), 64)  # more steps are left to ATen
        return {**values, "BM": BM, "BD": GRAM_COLUMNS, "warps": gram_warps(BM), "stages": cut.stages}
    if name in ("start", "summarise", "finish"):
        return {**values, "BD": 1024, "warps": 4, "stages": cut.stages}
    if name == "addresses":
        return {**values, "warps": 1, "stages": 1}
    if name.startswith("thin"):
        return {**values, **thin_constants(name, steps)}
    return {**values, "warps": cut.warps, "stages": cut.stages}


def thin_constants(name: str, rank: int) -> dict[str, Any]:
    """Of the products with a shared inverse: of few samples, and from a rank above the largest on of many."""
    from deq_compile.testing import power_of_two, recycle_gpu

    cut = recycle_gpu.Cut.of(32 if rank <= recycle_gpu.MOST_RANK else 4096, 65536, min(rank, recycle_gpu.MOST_RANK), 4)
    return {
        "BB": cut.samples, "BR": cut.rows, "BD": cut.columns[name == "thin_apply"], "BP": power_of_two(cut.slabs),
        "SQUARES": True, "RESIDUAL": True, "warps": recycle_gpu.WARPS, "stages": recycle_gpu.STAGES,
        "STAGES": recycle_gpu.STAGES,
    }  # fmt: skip


def compiled(name: str, kernel: Any, arch: int, dtype: str, steps: int, graph: bool) -> Any:
    """A kernel, compiled by Triton; its forms are in `asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = constants(name, steps, graph)
    given = {a: values[a] for a in kernel.arg_names if a in values}
    signature, attributes = {}, {}
    for i, a in enumerate(kernel.arg_names):
        if a in given:
            signature[a] = "constexpr"
        elif a.endswith("_ptr"):
            special = {**dict.fromkeys(_INTS, "*i32"), **dict.fromkeys(_LONGS, "*i64"), **dict.fromkeys(_DOUBLES, "*fp64")}
            narrow = a == "S_ptr" or (a == "f_ptr" and name.startswith("thin"))  # what may be in a lower precision
            signature[a] = f"*{dtype}" if narrow else special.get(a, "*fp32")
        elif a.endswith("_address"):
            signature[a] = "i64"
        else:
            signature[a] = "fp32" if a in _FLOATS else "i32"
        if a.endswith("_ptr") or a in _ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=given, attrs=attributes)
    options = {"num_warps": values["warps"], "num_stages": values["stages"]}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_one(name: str, kernel: Any, arch: int, dtype: str, steps: int, graph: bool) -> Row:
    found = compiled(name, kernel, arch, dtype, steps, graph)
    registers, local = resources(found.asm["cubin"])
    ptx = found.asm["ptx"]
    widths = [int(v or 1) * int(b) for v, b in re.findall(r"ld\.global[^\s]*?(?:\.v(\d))?\.[bf](\d+)", ptx)]
    copies = re.findall(r"cp\.async\.c[ga]\.shared\.global[^;,]*,[^;,]*, (0x[0-9a-f]+|\d+)", ptx)
    widths += [int(size, 0) * 8 for size in copies]
    return Row(
        name, f"sm_{arch}", "graph" if graph else "plain", dtype, steps, registers, local, int(found.metadata.shared),
        max(widths, default=0) // 8, len(re.findall(r"cp\.async\.c[ga]", ptx)),
        b"cudaGraphSetConditional" in found.asm["cubin"],
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory, from the compiled code itself."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"expected a line with REG, STACK and LOCAL from cuobjdump, got: {text[-400:]}")
    return int(found[1]), int(found[2]) + int(found[3])


def rows(
    architectures: tuple[int, ...] = ARCHITECTURES, steps: tuple[int, ...] = STEPS, dtypes: tuple[str, ...] = DTYPES
) -> Iterator[Row]:
    """Every kernel on every architecture; bf16 factors and the forms for captured graphs on the newest, where they matter."""
    for arch in architectures:
        for name, kernel in kernels().items():
            in_graphs = (False, True) if arch >= 90 and any(a in _LONGS for a in kernel.arg_names) else (False,)
            for count in steps:
                for dtype in dtypes if arch >= 90 else dtypes[:1]:
                    for graph in in_graphs:
                        yield compile_one(name, kernel, arch, dtype, count, graph)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--aot", action="store_true", required=True, help="compile ahead of time; no GPU is needed")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(BUDGETS), default=ARCHITECTURES, help="compute capabilities, such as 90 100"
    )
    parser.add_argument("--json", type=Path, help="write the rows as one JSON list (overwrites)")


def main(args: argparse.Namespace) -> int:
    found: list[Row] = []
    for row in rows(tuple(args.arch)):
        found.append(row)
        print(f"\r{len(found)} compiled: {row.kernel} {row.arch} {row.dtype} {row.steps}" + " " * 20, end="", flush=True)
        if args.json:  # what is there survives an interruption
            args.json.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")
    print()
    print(tabulate([asdict(r) for r in found], headers="keys"))
    over = [row for row in found if not within_budget(row)]
    for row in over:
        registers, spills = budget(row)
        print(f"over the budget of {registers} registers and {spills} bytes of spills: {row}")
    return 1 if over else 0


def budget(row: Row) -> tuple[int, int]:
    """Registers a thread, and bytes of spills, that a row may have."""
    registers, spills = BUDGETS[int(row.arch[3:])]
    return ALONE.get(row.kernel, registers), spills


def within_budget(row: Row) -> bool:
    registers, spills = budget(row)
    return row.registers <= registers and row.spills <= spills
