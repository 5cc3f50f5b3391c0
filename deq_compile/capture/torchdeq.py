"""TorchDEQ (PyPI torchdeq 0.1.0): `get_deq(...)(func, z0)` as one region, the model unmodified.

`DEQSliced.forward` and `DEQIndexing.forward` are traced by what stands here. The function is solved for once, from z0, at
the library's own tolerance, stop mode and cap. What follows is theirs: implicit gradients (ift, hook_ift) become the
region's own, at their backward tolerance; phantom gradients stay their attached steps, traced as they are. The dictionary
of statistics keeps its keys, with this solve's numbers; the traces hold their last entry.

Left alone, with a reason: trajectories (n_states, indexing), which ask for states before the fixed point; the spectral
radius; a writer for the backward's statistics; `return_final`; and `simple_fixed_point_iter`, a plain loop of fixed count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deq_compile import markers
from deq_compile.report import Location, Reason, Skipped

from . import calls, dynamo

# What may be asked of a solver without changing which point it finds.
_HARMLESS = {"f_max_iter", "tau", "m", "lam", "beta", "LBFGS_thres", "ls"}
_IMPLICIT = ("func_ift", "hook_ift_grad")
# Their backward tolerance is 1e-6, absolute, by default; below this a relative one means nothing in fp32.
_LEAST_BACKWARD_TOL = 1e-6


def install() -> Callable[[], None]:
    """Have calls looked at; returns what ends that."""
    calls.add(recognise)
    return lambda: calls.remove(recognise)


def recognise(tx: Any, function: Any, arguments: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    core = sys.modules.get("torchdeq.core")
    if core is None or function not in (core.DEQSliced.forward, core.DEQIndexing.forward):
        return None
    module = getattr(arguments[0], "value", None)
    if not isinstance(module, core.DEQBase):
        return None
    names = ("func", "z", "solver_kwargs", "sradius_mode", "backward_writer")
    given = dict(zip(names, arguments[1:], strict=False)) | dict(kwargs)
    if len(arguments) < 3:  # func or z by keyword, of which the second has another name in each class
        return Skipped(Reason.LIBRARY, Location(), "func and z0 are expected in their places, not by keyword")
    refusal = _refusal(module, given)
    if refusal is not None:
        reason, detail = refusal
        return Skipped(reason, Location(), detail)
    own = [*arguments[:3], given.get("solver_kwargs") or dynamo.build(tx, None), *settings(tx, arguments[0])]
    return _implicit if _is_implicit(module) else _attached, own


def settings(tx: Any, module: Any) -> list[Any]:
    """The numbers of a module, held to what they are: they become constants of the region."""
    names = ("f_tol", "f_max_iter", "eval_f_max_iter", "b_tol", "b_max_iter")
    values = {name: dynamo.constant(tx, dynamo.attribute(tx, module, name)) for name in names}
    values["b_tol"] = max(values["b_tol"], _LEAST_BACKWARD_TOL)
    return [dynamo.build(tx, value) for value in values.values()]


def _is_implicit(module: Any) -> bool:
    return module.produce_grad[-1].__name__ in _IMPLICIT


def _refusal(module: Any, given: Mapping[str, Any]) -> tuple[Reason, str] | None:
    if module.training and len(module.produce_grad) > 1:
        return Reason.TRAJECTORY, f"{len(module.produce_grad)} states of the solver (n_states or indexing)"
    if module.f_solver.__name__ == "simple_fixed_point_iter" and not (module.training and _is_implicit(module)):
        return Reason.LIBRARY, "simple_fixed_point_iter is a loop of fixed count, and found as such"
    if _constant(given.get("sradius_mode")) not in (None, False) and not module.training:
        return Reason.LIBRARY, "sradius_mode=True"
    if _constant(given.get("backward_writer")) is not None:
        return Reason.LIBRARY, "backward_writer"
    asked = given.get("solver_kwargs")
    keys = _keys(asked) if _constant(asked) is not None else set()
    if not keys <= _HARMLESS:
        return Reason.LIBRARY, f"solver_kwargs {sorted(keys - _HARMLESS)}"
    return None


def _constant(variable: Any) -> Any:
    """The Python value of one of Dynamo's variables; the variable itself where it has none."""
    if variable is None:
        return None
    variable = variable.realize() if hasattr(variable, "realize") else variable
    return variable.as_python_constant() if variable.is_python_constant() else variable


def _keys(variable: Any) -> set[str]:
    value = _constant(variable)
    if isinstance(value, dict):
        return set(value)
    return {str(key.vt.as_python_constant()) for key in value.items}


# ---- traced by Dynamo from here on: a global number would become an input of the graph under dynamic=True


def _implicit(site: Any, self: Any, func: Any, z: Any, asked: Any, *settings: Any) -> Any:
    f_tol, f_cap, eval_cap, b_tol, b_cap = settings
    if self.training:
        note = "implicit gradient, solved with the forward's factors in place of " + self.b_solver.__name__
        backward: Any = (("backward_tol", b_tol), ("backward_max_iter", b_cap), ("attached", True))
        states, about = _solve(site, self, func, z, asked, (f_tol, f_cap), backward, note)
    else:  # the library solves without gradients then
        with torch.no_grad():
            states, about = _solve(site, self, func, z, asked, (f_tol, eval_cap), (), "")
            states = tuple(state.detach() for state in states)
    return [_as_given(states, z)], _statistics(self, states, about)


def _attached(site: Any, self: Any, func: Any, z: Any, asked: Any, *settings: Any) -> Any:
    f_tol, f_cap, eval_cap, _, _ = settings
    with torch.no_grad():
        note = "solved from z0; the phantom gradient stays: its attached steps follow, as they are" if self.training else ""
        states, about = _solve(site, self, func, z, asked, (f_tol, f_cap if self.training else eval_cap), (), note)
    found = _as_given(tuple(state.detach() for state in states), z)
    if not self.training:
        return [found], _statistics(self, states, about)
    from torchdeq.core import deq_decorator

    wrapped, found = deq_decorator(func, found, no_stat=True)
    return self.produce_grad[-1](self, wrapped, found), _statistics(self, states, about)


def _solve(site: Any, self: Any, func: Any, z: Any, asked: Any, limits: Any, hints: Any, note: Any) -> Any:
    asked = {} if asked is None else asked
    tol, cap = limits
    cap, memory = int(asked.get("f_max_iter", cap)), asked.get("LBFGS_thres", None)
    says = (("tol", tol), ("stop_mode", self.f_stop_mode), ("max_iter", cap), ("memory", memory), *hints)
    form = "TorchDEQ " + self.f_solver.__name__
    if isinstance(z, Tensor):
        states, about = markers.region(lambda s: (func(s[0]),), (z,), site, form, says, (), note)
    else:
        states, about = markers.region(lambda s: tuple(func(*s)), tuple(z), site, form, says, (), note)
    return states, about.detach()


def _as_given(states: Any, z: Any) -> Any:
    return states[0] if isinstance(z, Tensor) else list(states)


def _statistics(self: Any, states: Any, about: Any) -> Any:
    from torchdeq.solver.stat import SolverStat

    flat = [s.detach().flatten(1) if s.dim() > 1 else s.detach().reshape(-1, 1) for s in states]
    size = torch.cat(flat, 1).norm(dim=1) + 1e-9  # |f(z)|, but for a residual
    stopped = about[:, 0]
    if self.f_stop_mode == "rel":
        absolute, relative = stopped * size, stopped
    else:
        absolute, relative = stopped, stopped / size
    info = SolverStat(
        abs_lowest=absolute, rel_lowest=relative, abs_trace=absolute[:, None], rel_trace=relative[:, None], nstep=about[:, 1]
    )
    if not self.training:
        info["sradius"] = torch.zeros(1, device=stopped.device)
    return info
