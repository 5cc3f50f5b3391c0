"""Private parts of FSDP2 (`torch.distributed.fsdp.fully_shard`, torch 2.11 to 2.14): what it knows of a module that it shards.

Everything is looked up when somebody has sharded a module; where a part is missing, the module is left as it is, and why is said.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_STATE = "torch.distributed.fsdp._fully_shard._fsdp_state"
Path = tuple[str, ...]
Places = tuple[tuple[Path, str], ...]


class NotGathered(RuntimeError):
    """The parameters of a module cannot be gathered once for many calls of it; the text says why."""


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A parameter that FSDP2 shards: the DTensor itself, where in the module it hangs (tied ones in several places), and the
    process groups of its shards and (or None) of their replicas. A mesh that is asked for those may name ones of an earlier
    process group (torch 2.14)."""

    parameter: Any
    places: Places
    shards: Any
    replicas: Any


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a module's parameters, inputs and outputs are cast to (None: left as they are), and by what the sum of all ranks'
    gradients is divided (None: by their number)."""

    whole: torch.dtype | None
    reduce: torch.dtype | None
    inputs: torch.dtype | None
    outputs: torch.dtype | None
    divisor: float | None


def in_use() -> bool:
    """Whether somebody in this process may have sharded a module."""
    return _STATE in sys.modules


def hook_name(function: Any) -> str:
    """Which of FSDP2's hooks a function is: "before" a module's call, "after" it, or "" for any other function."""
    state = getattr(sys.modules.get(_STATE), "FSDPState", None)
    if state is None:
        return ""
    known = {"before": getattr(state, "_pre_forward", None), "after": getattr(state, "_post_forward", None)}
    return next((name for name, hook in known.items() if hook is not None and hook is function), "")


def state_of(module: nn.Module) -> Any:
    """FSDP2's state of a module that it shards; None of any other."""
    if not any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        return None
    getter = getattr(module, "_get_fsdp_state", None)
    return None if getter is None else getter()


def plan_of(state: Any) -> tuple[nn.Module, list[Sharded], Policy]:
    """The module of a state, its sharded parameters, and its policy.

    Raises:
        NotGathered: something about it that only FSDP2's own calls can do, or that this torch names otherwise.
    """
    try:
        return _plan_of(state)
    except (AttributeError, TypeError, ValueError) as error:
        raise NotGathered(f"FSDP2 of torch {torch.__version__} is not what it was: {error}") from error


def _plan_of(state: Any) -> tuple[nn.Module, list[Sharded], Policy]:
    if len(state._modules) != 1:
        raise NotGathered("it is sharded together with other modules")
    (module,) = state._modules
    if state._is_root is None:
        state._lazy_init()  # as its first call would
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    groups = [group for group in groups if group is not None]
    mixed = state._mp_policy
    factors = {group.gradient_divide_factor for group in groups}
    if len(factors) > 1:
        raise NotGathered("its groups of parameters have gradient divide factors of their own")
    policy = Policy(
        whole=mixed.param_dtype,
        reduce=mixed.reduce_dtype,
        inputs=mixed.param_dtype if mixed.cast_forward_inputs else None,
        outputs=mixed.output_dtype,
        divisor=next(iter(factors), None),
    )
    where = _places(module)
    found = []
    for group in groups:
        _check(group)
        for known in group.fsdp_params:
            if known.is_dtensor:
                raise NotGathered("its parameters are split by tensor parallelism as well")
            if hasattr(known._sharded_local_tensor, "fsdp_pre_all_gather"):
                raise NotGathered("its parameters say themselves how they are gathered (fsdp_pre_all_gather)")
            mesh = group.mesh_info
            replicas = getattr(mesh, "replicate_process_group", None)
            found.append(Sharded(known.sharded_param, where[id(known.sharded_param)], mesh.shard_process_group, replicas))
    return module, found, policy


def _check(group: Any) -> None:
    if not group.is_sharded:
        raise NotGathered("its parameters are gathered already, by reshard_after_forward=False or unshard()")
    if type(group.offload_policy).__name__ != "OffloadPolicy":
        raise NotGathered("its parameters are kept in the memory of the CPU (CPUOffloadPolicy)")
    if group._all_reduce_hook is not None:
        raise NotGathered("it has an all-reduce hook")
    comms = type(group._all_gather_comm).__name__, type(group._reduce_scatter_comm).__name__
    if comms != ("DefaultAllGather", "DefaultReduceScatter"):
        raise NotGathered("it has collectives of its own")


def parameters(module: nn.Module) -> Iterator[tuple[tuple[Path, str], Tensor]]:
    """What hangs below a module in its parameters' places, with the places; tied ones several times."""
    for name, part in module.named_modules(remove_duplicate=False):
        for own, parameter in part._parameters.items():
            if parameter is not None:
                yield (tuple(name.split(".")) if name else (), own), parameter


def _places(module: nn.Module) -> dict[int, Places]:
    """Where each parameter below a module hangs, by its id."""
    found: dict[int, Places] = {}
    for place, parameter in parameters(module):
        found[id(parameter)] = (*found.get(id(parameter), ()), place)
    return found


def reshard(state: Any) -> None:
    """Free what FSDP2 has gathered of a state's modules, if it still stands."""
    for module in state._modules:
        module.reshard()


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """The floating-point tensors in a structure in another dtype; None: as they are. For code that Dynamo traces, too."""
    if dtype is None:
        return tree
    return pytree.tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def put(module: nn.Module, places: tuple[Places, ...], *tensors: Tensor) -> None:
    """Hang tensors where parameters hang. For code that Dynamo traces, too."""
    for those, tensor in zip(places, tensors, strict=True):
        for path, name in those:
            part = module
            for step in path:
                part = getattr(part, step)
            part._parameters[name] = tensor  # type: ignore[assignment]  # a tensor that was made, in a parameter's place


def without_hooks(module: nn.Module, state: Any) -> Iterator[None]:
    """The module's calls without FSDP2's hooks, for as long as the generator stands; for `contextlib.contextmanager`."""
    handles = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    tables = [(table, {h.id: table.pop(h.id) for h in handles if h.id in table}) for table in (
        module._forward_pre_hooks, module._forward_hooks,
    )]  # fmt: skip
    try:
        yield
    finally:
        for table, taken in tables:
            rest = dict(table)
            table.clear()
            table.update({**taken, **rest} if table is module._forward_pre_hooks else {**rest, **taken})
