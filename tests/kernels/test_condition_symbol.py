"""What sets the condition of a WHILE node, as machine code: ahead of time, with the ptxas that Triton brings."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow
SYMBOL = "cudaGraphSetConditional"


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


def ptx(kernel: Any, signature: dict[str, str], arch: int = 90) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = triton.compile(ASTSource(fn=kernel, signature=signature), target=GPUTarget("cuda", arch, 32))
    return str(compiled.asm["ptx"])


def ptxas(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "kernel.ptx").write_text(source)
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    assert found.exists()
    command = [str(found), "--gpu-name=sm_90a", "-o", str(folder / "kernel.cubin"), str(folder / "kernel.ptx")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_assembler_knows_the_condition(tmp_path: Path) -> None:
    """It accepts the names that the driver resolves, and refuses others."""
    from deq_compile.kernels.triton_shared import set_from

    source = ptx(set_from, {"handle_ptr": "*i64", "flag_ptr": "*i32"})
    assert SYMBOL in source
    known = ptxas(source, tmp_path)
    assert known.returncode == 0, known.stderr
    assert SYMBOL.encode() in (tmp_path / "kernel.cubin").read_bytes()
    unknown = ptxas(source.replace(SYMBOL, f"{SYMBOL}ly"), tmp_path)
    assert unknown.returncode != 0
    assert "Unresolved extern" in unknown.stdout + unknown.stderr


def test_a_flag_needs_no_condition() -> None:
    """The kernels of an iteration tell the two structures apart by the type of what they are given to write."""
    from deq_compile.kernels.triton_shared import set_from

    assert SYMBOL not in ptx(set_from, {"handle_ptr": "*i32", "flag_ptr": "*i32"})
