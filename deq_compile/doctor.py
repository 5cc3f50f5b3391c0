"""``python -m deq_compile``: what this machine can run, what it cannot and why, and a small model through eager and deq.

It is asked of the package rather than of a script beside it, so that it is there wherever the package is, and speaks of the very
installation that is imported. A report of a bug begins with what it prints.
"""

from __future__ import annotations

import argparse
import enum
import importlib.util
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, inner, ready, torch_parts
from .kernels import native
from .region.records import record_solves

TOL, BACKWARD_TOL = 1e-5, 1e-4  # what the small model is solved to
MOST_ERROR = 1e-3  # relative, of value and gradients against the loop: two digits above what the tolerances allow a contraction


class Level(enum.Enum):
    """How much a finding matters."""

    OK = "ok"
    LIMITED = "limited"  # something else serves: results are right
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One line: what it is about, what was found, and what to do where something is amiss."""

    about: str
    says: str
    level: Level = Level.OK
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level.value:<8} {self.about:<12} {self.says}"
        return line + (f"\n{'':<21} Fix: {self.fix}" if self.fix else "")


def versions() -> Iterator[Finding]:
    yield Finding("deq_compile", f"{__version__}, {Path(__file__).resolve().parent}")
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    tested = ", ".join(ready.TESTED)
    known = ".".join(map(str, ready.version_of(torch.__version__))) in ready.TESTED
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("torch", f"{torch.__version__}, {built}" + ("" if known else f"; the suite is run on {tested}"))
    if importlib.util.find_spec("triton") is None:
        yield Finding("triton", "not installed; only a GPU needs it")
    else:
        yield Finding("triton", metadata.version("triton"))
    if "deq" not in metadata.entry_points(group="torch_dynamo_backends").names:
        yield Finding(
            "by name", 'torch.compile(backend="deq") works after `import deq_compile` only: the package is not installed',
            Level.LIMITED, "pip install . in the checkout",
        )  # fmt: skip


def compiler() -> Iterator[Finding]:
    """What Inductor compiles the rest of a model with on a CPU."""
    reason = inner.no_cpp_compiler()
    if reason:
        why, _, fix = reason.rpartition("Fix: ")
        says = f"none that Inductor uses, so on a CPU inner='aot_eager' serves in its place. {why}".rstrip()
        yield Finding("C++ compiler", says, Level.LIMITED, fix)
        return
    command = torch_parts.get_cpp_compiler()
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, check=False)
        version = (done.stdout.splitlines() or ["says no version"])[0]
    except (OSError, subprocess.SubprocessError) as error:
        version = f"{type(error).__name__}: {error}"
    yield Finding("C++ compiler", f"{command}: {version}")


def kernels() -> Iterator[Finding]:
    """Ours for a CPU; the first look on a machine compiles them, two to three seconds."""
    reason = native.why_not()
    if not reason:
        yield Finding("C++ kernels", "compiled, and used on the CPU")
        return
    fix = "" if "Fix: " in reason else "see the compiler above" if inner.no_cpp_compiler() else "report it, with this text"
    if "DEQ_COMPILE_NATIVE" in reason:
        fix = "unset DEQ_COMPILE_NATIVE"
    yield Finding("C++ kernels", f"none, ATen serves and takes longer: {reason}", Level.LIMITED, fix)


def gpu() -> Iterator[Finding]:
    """Which devices torch sees, and what the graph engines need of them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
    why = f" ({str(said[0].message).splitlines()[0]})" if said else ""
    if not seen and torch.version.cuda:
        yield Finding(
            "GPU", f"none is seen{why}: everything runs on the CPU. torch's build for CUDA works there, it is only large; "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu gets the small one",
        )  # fmt: skip
        return
    if not seen:
        yield Finding("GPU", "none: this build of torch has no CUDA, so everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding("GPU", f"{facts.name}, capability {facts.major}.{facts.minor}, {facts.total_memory >> 30} GiB")
    if importlib.util.find_spec("triton") is None:
        yield Finding("GPU kernels", "none, ATen serves: triton is not installed", Level.LIMITED, "pip install triton")
    from .region.graphs.conditional import runtime
    from .region.graphs.device import Refused

    try:
        runtime()
    except Refused as reason:
        yield Finding("GPU engine", f"chunks in the place of while: {reason}", Level.LIMITED, "pip install cuda-bindings")


def features() -> Iterator[Finding]:
    """What reaches into private parts of torch, each after its self-test."""
    from . import backend  # noqa: F401, switches capture on
    from .capture import OFF, features

    off = {**torch_parts.lost(), **OFF}
    on = [name for name in features() if name not in off]
    yield Finding("features", f"{len(on)} on: {', '.join(on)}" if on else "none on")
    for name, reason in off.items():
        level = Level.BROKEN if name == torch_parts.REGIONS else Level.LIMITED
        yield Finding("off", f"{name}: {reason}", level, f"torch {' or '.join(ready.TESTED)}, or a newer deq_compile")


class Model(nn.Module):
    """tanh(W z + U x) 40 times from zero; x (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W, self.U = nn.Linear(16, 16), nn.Linear(16, 16)
        nn.init.orthogonal_(self.W.weight, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = torch.tanh(self.W(z) + self.U(x))
        return z


def _step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Value, and gradients of the parameters."""
    model.zero_grad(set_to_none=True)
    y = call(x)
    y.square().sum().backward()
    return [y.detach().double(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])]


def _run(device: str, how: str) -> Finding:
    about = f"model, {device}"
    model, x = Model().to(device), torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(device)
    wanted = _step(model, model, x)
    torch.compiler.reset()
    options: dict[str, Any] = {"tol": TOL, "backward_tol": BACKWARD_TOL, "inner": how}
    call = torch.compile(model, backend="deq", options=options)
    with record_solves() as solves:
        got = _step(model, call, x)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
    says = f"value and gradient differ from eager's by {errors[0]:.0e} and {errors[1]:.0e} (inner={how!r})"
    if not all(error <= MOST_ERROR for error in errors):
        return Finding(about, says, Level.BROKEN, "report it, with this text")
    if [solve.status for solve in solves] != ["solve"]:
        found = ", ".join(solve.status for solve in solves) or "no region"
        return Finding(about, f"{says}; expected one solve, got {found}", Level.BROKEN, "report it, with this text")
    (solve,) = solves
    return Finding(about, f"{says}; {solve.iterations_max} iterations in place of 40, {solve.vjps} products backward")


def models(how: str) -> Iterator[Finding]:
    """The small model, eager and deq, on every kind of device there is; `how`: the inner backend."""
    usual = how
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        how = "aot_eager" if usual == "inductor" and device == "cpu" and inner.no_cpp_compiler() else usual
        try:
            yield _run(device, how)
        except Exception as error:
            says = f"inner={how!r} raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            fix = "report it, with this text"
            if how != "eager" and _run(device, "eager").level is Level.OK:
                fix = "Inductor cannot compile here, so mend the compiler; options={'inner': 'aot_eager'} does without"
            yield Finding(f"model, {device}", says, Level.BROKEN, fix)


def _looked(look: Callable[[], Iterator[Finding]], name: str) -> Iterator[Finding]:
    """The findings of one look. What it raises is one, too."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(name, f"{type(error).__name__}: {error}", Level.BROKEN, "report it, with this text")


def examine(how: str = "inductor") -> Iterator[Finding]:
    """All findings, as they come; `how`: the inner backend of the small model."""
    for look in (versions, compiler, kernels, gpu, features):
        yield from _looked(look, look.__name__)
    yield from _looked(lambda: models(how), "model")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where something is broken, or with --strict where anything is limited."""
    parser = argparse.ArgumentParser(prog="python -m deq_compile", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave Inductor out, which takes up to half a minute")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where something is limited, too")
    args = parser.parse_args(argv)
    warnings.filterwarnings(
        "ignore", message="Failed to initialize NumPy"
    )  # torch's, where there is no numpy; nothing here needs it
    found: list[Finding] = []
    for finding in examine("eager" if args.quick else "inductor"):
        print(finding, flush=True)
        found.append(finding)
    count = {level: sum(finding.level is level for finding in found) for level in Level}
    if count[Level.BROKEN]:
        print(f"\n{count[Level.BROKEN]} broken, {count[Level.LIMITED]} limited.")
    elif count[Level.LIMITED]:
        print(f"\nNothing is broken; {count[Level.LIMITED]} limited: results are right, something is slower or left alone.")
    else:
        print("\nEverything works.")
    return 1 if count[Level.BROKEN] or (args.strict and count[Level.LIMITED]) else 0


if __name__ == "__main__":
    sys.exit(main())
