"""`torch.export`, AOTInductor and `torch.jit.trace` of compiled and decorated models.

The exported program has the solver as a loop of torch's own, and runs where nobody has this package.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import deq_compile, fixed_point
from tests.fresh import python

BATCH = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
X = torch.linspace(-1, 1, 40).reshape(5, 8)


@pytest.fixture(autouse=True)
def _no_hook_left() -> Iterator[None]:
    """An export that fails leaves a hook on all buffers behind, by torch 2.11."""
    yield
    getattr(nn.modules.module, "_global_buffer_registration_hooks", {}).clear()


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.readout = nn.Linear(8, 8), nn.Linear(8, 3)
        nn.init.orthogonal_(self.inner.weight, gain=0.6)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)

    def forward(self, x: Tensor) -> Any:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = self.f(z, x)
        return self.readout(z)


class UntilClose(Counted):
    def forward(self, x: Tensor) -> Any:
        z, gap, k = torch.zeros_like(x), torch.ones(()), 0
        while gap > 1e-6 and k < 100:
            new = self.f(z, x)
            gap, z, k = (new - z).norm(), new, k + 1
        return self.readout(z)


class Declared(Counted):
    def forward(self, x: Tensor) -> Any:
        return self.readout(fixed_point(lambda z: self.f(z, x), torch.zeros_like(x), tol=1e-6))


class TwoStates(Counted):
    """With what the solve came to; the second state is a quarter as wide."""

    def forward(self, x: Tensor) -> Any:
        def f(states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            z, y = states
            return self.f(z + torch.cat([y, y, y, y], 1), x), 0.3 * torch.tanh(z[:, :2])

        (z, y), info = fixed_point(f, (torch.zeros_like(x), torch.zeros_like(x[:, :2])), return_info=True)
        return self.readout(z), y, info.residual, info.iterations


class Coupled(Counted):
    """All rows are one system."""

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return super().f(z - z.mean(0), x)

    forward = UntilClose.forward


class Turning(nn.Module):
    """A loop that is no search for a fixed point."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(23):
            x = torch.cat([-x[:, 4:], x[:, :4]], 1)
        return x


class Drifting(nn.Module):
    """A test that never holds, and a cap: no fixed point is near."""

    def forward(self, x: Tensor) -> Tensor:
        gap, k = torch.ones(()), 0
        while gap > 1e-6 and k < 17:
            new = x + torch.sin(3 * x) + 1.5
            gap, x, k = (new - x).norm(), new, k + 1
        return x


class UnderAutocast(Counted):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return Counted.forward(self, x).float()


def decorated(model: nn.Module) -> nn.Module:
    return deq_compile(copy.deepcopy(model), inner="eager")


def of_a_class(model: nn.Module) -> nn.Module:
    cls = deq_compile(type(model.__class__.__name__, (type(model),), {}), inner="eager")
    made = cls()
    made.load_state_dict(model.state_dict())
    return made.eval()


def with_backend(model: nn.Module) -> Any:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.compile(copy.deepcopy(model), backend="deq", options={"inner": "eager"})

        def forward(self, x: Tensor) -> Any:
            return self.model(x)

    return Around().eval()


def with_function(model: nn.Module) -> nn.Module:
    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.call = deq_compile(lambda x: model(x), inner="eager")

        def forward(self, x: Tensor) -> Any:
            return self.call(x)

    return Calling().eval()


def loops(program: torch.export.ExportedProgram) -> int:
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [target for target in targets if "deq" in target]
    return targets.count("while_loop")


def distance(found: Any, wanted: Any) -> float:
    return float((found - wanted).norm() / wanted.norm())


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], type[nn.Module]]] = {
    "module, counted": (decorated, Counted),
    "class, test": (of_a_class, UntilClose),
    "torch.compile, counted": (with_backend, Counted),
    "function, test": (with_function, UntilClose),
    "fixed_point alone": (lambda model: model, Declared),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_exported_region_is_a_loop_of_torchs(way: str) -> None:
    """For batches of other sizes too, under the model's own names of parameters, and the value within the tolerance."""
    make, kind = WAYS[way]
    torch.manual_seed(0)
    model = kind().eval()
    program = torch.export.export(make(model), (X,), dynamic_shapes=BATCH)
    assert loops(program) >= 1
    assert any(name.endswith("inner.weight") for name in program.state_dict)
    other = torch.cat([X.flip(0), 0.3 * X, X])
    with torch.no_grad():
        assert distance(program.module()(other), model(other)) < 1e-4


class Open(Counted):
    """The count is an input, and goes into the body and behind the loop as well."""

    def forward(self, x: Tensor, n: int) -> Any:  # type: ignore[override]
        z = before = torch.zeros_like(x)
        for _ in range(n):
            before, z = z, torch.tanh(self.inner(z) * n / (n + 1) + x)
        return self.readout(2 * z - before) / n


def test_an_exported_count_is_an_input() -> None:
    torch.manual_seed(0)
    model = Open().eval()
    sizes = {"x": BATCH["x"], "n": torch.export.Dim.DYNAMIC}
    program = torch.export.export(decorated(model), (X, 12), dynamic_shapes=sizes)
    assert loops(program) == 1
    with torch.no_grad():
        for n in (5, 12, 33, 200):
            assert distance(program.module()(X.flip(0), n), model(X.flip(0), n)) < 1e-4


@pytest.mark.parametrize("kind", [TwoStates, Coupled, UnderAutocast])
def test_states_of_every_kind(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    program = torch.export.export(decorated(model), (X,))
    assert loops(program) >= 1
    with torch.no_grad():
        found, wanted = program.module()(X), model(X)
    for k, (one, other) in enumerate(zip(*(t if isinstance(t, tuple) else (t,) for t in (found, wanted)), strict=True)):
        assert (one.stride(), one.dtype) == (other.stride(), other.dtype)
        assert distance(one, other) < (1e-4 if k < 2 else 1e-2)  # a residual at the tolerance has few digits


@pytest.mark.parametrize("kind", [Turning, Drifting])
def test_what_has_no_fixed_point_keeps_its_value(kind: type[nn.Module]) -> None:
    """A count that means what it says, and a solve that misses: the user's own iterations, to the last bit."""
    model = kind().eval()
    program = torch.export.export(decorated(model), (X,))
    assert loops(program) >= 1
    with torch.no_grad():
        assert torch.equal(program.module()(X), model(X))


ELSEWHERE = """
import torch
import json, sys, warnings
warnings.simplefilter("ignore")
class Nobody:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "deq_compile":
            raise ImportError(name)
sys.meta_path.insert(0, Nobody())
folder, found = FOLDER, {}
x = torch.load(folder + "/x.pt")
with torch.no_grad():
    for name in ("UntilClose", "Declared", "Counted"):
        program = torch.export.load(f"{folder}/{name}.pt2")
        found[name] = program.module()(x).tolist()
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    packed = torch._inductor.aoti_compile_and_package(program, package_path=folder + "/packed.pt2", inductor_configs=quick)
    found["AOTInductor"] = torch._inductor.aoti_load_package(packed)(x).tolist()
assert "deq_compile" not in sys.modules
print(json.dumps(found))
"""


def test_exported_programs_run_without_this_package(tmp_path: Path) -> None:
    """Saved here, loaded in a process that cannot import it, and compiled by AOTInductor there: the one use of Inductor, since
    C++ is what is promised."""
    torch.manual_seed(0)
    x, wanted = torch.cat([X, 0.3 * X]), {}
    torch.save(x, tmp_path / "x.pt")
    for kind in (Counted, UntilClose, Declared):
        model = kind().eval()
        torch.export.save(torch.export.export(decorated(model), (X,), dynamic_shapes=BATCH), tmp_path / f"{kind.__name__}.pt2")
        with torch.no_grad():
            wanted[kind.__name__] = model(x)
    wanted["AOTInductor"] = wanted["Counted"]
    run = python(ELSEWHERE.replace("FOLDER", repr(str(tmp_path))), "dynamo")
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert distance(torch.tensor(found[name]), value) < 1e-4, name


def test_a_model_in_training_mode_is_refused() -> None:
    model = decorated(UntilClose())
    with pytest.raises(RuntimeError, match=r"test_exports.py:\d+.* training mode. Fix: model.eval\(\)"):
        torch.export.export(model, (X,))
    with torch.no_grad():
        assert loops(torch.export.export(model, (X,))) == 2


def test_an_exported_region_gives_no_gradient_in_silence() -> None:
    """Whatever the mode of the export: the gradient of the solver's own steps would be a wrong one."""
    model = decorated(Declared().eval())
    with torch.no_grad():
        program = torch.export.export(model, (X,))
    with pytest.raises(NotImplementedError, match="derivative"):
        program.module()(X).sum().backward()


def test_strict_mode_gets_one_sentence() -> None:
    with pytest.raises(Exception, match=r"fixed_point: only backend='deq' .* Fix for torch.export: strict=False"):
        torch.export.export(Declared().eval(), (X,), strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [decorated, with_backend])
def test_a_trace_holds_a_fixed_number_of_iterations_or_is_refused(make: Callable[[nn.Module], nn.Module]) -> None:
    model = Counted().eval()
    other = torch.cat([X, 0.3 * X])
    with torch.no_grad():
        trace = torch.jit.trace(make(model), (X,), check_trace=False)
        torch.testing.assert_close(trace(other), model(other))
        with pytest.raises(RuntimeError, match=r"a branch on data at .*test_exports.py:\d+.*Fix: torch.export.export"):
            torch.jit.trace(make(UntilClose().eval()), (X,), check_trace=False)


def test_a_compiled_model_runs_as_before_beside_its_export() -> None:
    """What Dynamo has made of it stays, and the export adds nothing to it."""
    model = Counted().eval()
    made = decorated(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = made(X)
        for _ in range(2):
            torch.export.export(made, (X,))
        from torch._dynamo.utils import counters

        frames = counters["frames"]["total"]
        assert torch.equal(made(X), before)
        assert counters["frames"]["total"] == frames
