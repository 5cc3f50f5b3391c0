"""Kernels and compiled models on the device, against float64; fifty repeats bitwise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench import models, problems
from deq_compile.kernels.broyden import new_state, step
from deq_compile.kernels.broyden.gpu import TritonState
from deq_compile.kernels.broyden.state import Factors
from deq_compile.kernels.reuse import apply_transpose
from deq_compile.kernels.reuse.reference import apply_transpose_reference
from deq_compile.region.adjoint import solve_adjoint
from deq_compile.region.engine import captures

from .common import Setting, relative_error

TOL = 2.0**-13
DTYPES = {"fp32": (torch.float32, None), "fp64": (torch.float64, None), "bf16 factors": (torch.float32, torch.bfloat16)}
# Either side of the tiles' edges, primes, both forms, many rows.
SHAPES = [(1, 1), (3, 127), (128, 128), (5, 129), (7, 1021), (4, 8192), (3, 8200), (2, 65537), (129, 9000)]
ENGINES = ("loop", "chunks", "while")


def toy(B: int, D: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A body whose rows converge at different times, in float64 on the CPU; it computes in its argument's dtype and device."""
    generator = torch.Generator().manual_seed(B * 1000 + D)
    a = 0.6 * torch.rand(D, generator=generator, dtype=torch.float64)
    b = torch.randn(B, D, generator=generator, dtype=torch.float64) * torch.linspace(0.02, 1.5, B, dtype=torch.float64)[:, None]

    def body(z: Tensor) -> Tensor:
        return torch.tanh(a.to(z) * z + 0.3 * z.roll(1, 1) + b.to(z))

    return body, torch.zeros(B, D, dtype=torch.float64)


def solved(z0: Tensor, body: Callable[[Tensor], Tensor], memory: int, factor: torch.dtype | None, tol: float = TOL) -> Any:
    """The state after a solve, on buffers that start as NaN."""
    state = new_state(z0, memory, factor, eta=0.125, tol=tol)
    state.S.fill_(float("nan"))
    if isinstance(state, TritonState):
        state.C.fill_(float("nan"))
    z = z0.clone()
    while state.running:
        step(state, z, body(z), last=state.evaluations + 1 == 40)
    return state


def kernels(setting: Setting) -> None:
    """Solves on edge shapes: the fixed point, and -H^T x from the very factors in float64."""
    for B, D in [(2, 17)] if setting.dry else SHAPES:
        body, z0 = toy(B, D)
        reference = solved(z0, body, 30, None, 1e-12).z_best
        for name, (compute, factor) in DTYPES.items():
            with setting.guarded("kernels", B=B, D=D, dtype=name):
                start = z0.to(setting.device, compute)
                state = solved(start, body, 30, factor)
                f = body(state.z_best)
                residual = float(((f - state.z_best).norm(dim=1) / f.norm(dim=1)).max())
                x = torch.randn(B, D, generator=torch.Generator().manual_seed(1)).to(setting.device, compute)
                n = int(state.n.max())
                S, C = (t.cpu().double().nan_to_num(0.0) for t in (state.S[:, :n], state.C))
                expected = apply_transpose_reference(S, C, state.n.cpu(), x.cpu())
                transposed = relative_error(apply_transpose(Factors(S=state.S, C=state.C, n=state.n, high=n), x), expected)
                good = residual <= 1.01 * TOL and transposed <= (1e-11 if name == "fp64" else 1e-4)
                setting.row(
                    "kernels", B=B, D=D, dtype=name, ok=good and bool((state.done == 1).all()), residual=residual, n=n,
                    value_error=relative_error(state.z_best, reference), transpose_error=transposed,
                )  # fmt: skip


def restarts_and_failures(setting: Setting) -> None:
    """A full memory, and a sample that turns NaN."""
    body, z0 = toy(3, 200)
    z0 = z0.to(setting.device)
    with setting.guarded("restart"):
        state = solved(z0, body, 3, None, 1e-6)
        setting.row("restart", ok=bool((state.done == 1).all()), n=state.n.tolist())
    with setting.guarded("one sample fails"):
        results = []
        for fails in (False, True):
            state, z = new_state(z0, 12, eta=0.125, tol=TOL), z0.clone()
            while state.running:
                out = body(z)
                if fails and state.evaluations == 2:
                    out[1, 3] = float("nan")
                step(state, z, out, last=state.evaluations + 1 == 40)
            results.append((z, state.done.tolist()))
        (healthy, _), (failing, codes) = results
        same = all(torch.equal(healthy[row], failing[row]) for row in (0, 2))
        setting.row("one sample fails", ok=codes == [1, 4, 1] and same and bool(torch.isfinite(failing).all()), status=codes)


def adjoints(setting: Setting) -> None:
    """The adjoint solve with the forward's factors, against the exact one in float64; and the same in fewer VJPs than without."""
    for B, D in [(2, 17)] if setting.dry else [(1, 1), (3, 127), (32, 1024), (5, 8200)]:
        with setting.guarded("adjoint", B=B, D=D):
            body, z0 = toy(B, D)
            start = z0.to(setting.device, torch.float32)
            state = solved(start, body, 30, None)
            z = state.z_best.detach().requires_grad_()
            f = body(z)
            q = torch.randn(B, D, generator=torch.Generator().manual_seed(2)).to(start)

            def vjp(w: Tensor, f: Tensor = f, z: Tensor = z) -> Tensor:
                return torch.autograd.grad(f, z, w, retain_graph=True)[0]

            def full(w: Tensor, vjp: Callable[[Tensor], Tensor] = vjp) -> tuple[Tensor, None]:
                return vjp(w), None

            factors = Factors(S=state.S, C=state.C, n=state.n, high=state.S.shape[1])
            found = solve_adjoint(vjp, full, q, factors, tol=1e-4, max_iter=40)
            plain = solve_adjoint(vjp, full, q, None, tol=1e-4, max_iter=40)
            r = q.double() + vjp(found.w).double() - found.w.double()
            residual = float(r.norm() / q.double().norm())
            honest = abs(residual - found.residual) <= 1e-3 * residual + 1e-6
            setting.row(
                "adjoint", B=B, D=D, ok=residual <= 1.1e-4 and honest and found.needed <= plain.needed, residual=residual,
                reported=found.residual, vjps=found.needed, vjps_without_factors=plain.needed, status=found.status.name,
            )  # fmt: skip


@contextmanager
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    captures.clear()
    yield


def step_of(call: Any, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The outputs and the parameters' gradients of one training step, each as one vector."""
    model.zero_grad(set_to_none=True)
    out = call(*inputs)
    outputs = [t for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t) and t.is_floating_point()]
    sum(t.float().square().mean() for t in outputs).backward()  # type: ignore[union-attr]
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([t.detach().flatten() for t in outputs]), torch.cat(grads)


def chosen(setting: Setting) -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]:
    def of_problem(name: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
        def make() -> tuple[nn.Module, tuple[Any, ...]]:
            model, x, _ = problems.make(name, 60, "before")
            return model, (x.detach(),)

        return make

    if setting.dry:
        return {"toy loop": _toy_loop}
    real = {name: make for name, make in models.MODELS.items() if name in ("deq_transformer", "flow", "graph")}
    return {name: of_problem(name) for name in ("mlp128", "mlp1024", "conv", "transformer")} | real


def _toy_loop() -> tuple[nn.Module, tuple[Any, ...]]:
    model = problems.MLP(17, 12, "before")
    problems.scale_spectral_norm(model.W.weight, 0.25)
    return model, (torch.randn(2, 17),)


def compiled_models(setting: Setting) -> None:
    """Each engine on whole models: value and gradient against the user's loop in float64, engines bitwise among each other."""
    inner = "aot_eager" if setting.dry else "inductor"
    for name, make in chosen(setting).items():
        model, inputs = make()
        exact = step_of(*_moved(model, inputs, setting.device, torch.float64))
        results: dict[str, tuple[Tensor, Tensor]] = {}
        for engine in ENGINES:
            if setting.left < 10:
                setting.row("stopped: out of time", at=name)
                return
            with setting.guarded("model", model=name, engine=engine), fresh():
                mine, own, given = _moved(model, inputs, setting.device, torch.float32)
                options: dict[str, Any] = {"inner": inner, "engine": engine, "backward_tol": 1e-4}
                options["tol"] = 1e-3 if setting.dry else 1e-4
                call = torch.compile(mine, backend="deq", options=options)
                for _ in range(3):
                    results[engine] = step_of(call, own, given)
                used, reasons = captures.used()
                errors = [relative_error(a, b) for a, b in zip(results[engine], exact, strict=True)]
                plain = results.get("loop", results[engine])
                bitwise = all(torch.equal(a, b) for a, b in zip(results[engine], plain, strict=True))
                ok = errors[0] < 2e-3 and errors[1] < 2e-2 and (engine == "loop" or used == [engine])
                setting.row(
                    "model", model=name, engine=engine, ok=ok, ran=used, reasons=reasons, value_error=errors[0],
                    gradient_error=errors[1], as_the_loop_bitwise=bitwise,
                )  # fmt: skip


def _moved(
    model: nn.Module, inputs: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    own = copy.deepcopy(model).to(device, dtype)
    given = tuple(
        t.to(device, dtype) if torch.is_tensor(t) and t.is_floating_point() else t.to(device) if torch.is_tensor(t) else t
        for t in inputs
    )
    return own, own, given


def repeats(setting: Setting) -> None:
    """Fifty training steps from the same weights, bit for bit."""
    with setting.guarded("repeats"), fresh():
        model, inputs = (_toy_loop if setting.dry else chosen(setting)["mlp1024"])()
        mine, own, given = _moved(model, inputs, setting.device, torch.float32)
        options: dict[str, Any] = {"inner": "aot_eager" if setting.dry else "inductor", "tol": 1e-3 if setting.dry else 1e-4}
        call = torch.compile(mine, backend="deq", options=options)
        for _ in range(3):
            first = step_of(call, own, given)
        times = 2 if setting.dry else 50
        different = 0
        for _ in range(times):
            again = step_of(call, own, given)
            different += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        setting.row("repeats", ok=different == 0, times=times, different=different)


def run(setting: Setting) -> None:
    kernels(setting)
    restarts_and_failures(setting)
    adjoints(setting)
    repeats(setting)
    compiled_models(setting)
