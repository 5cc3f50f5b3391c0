"""What a function reads beside its arguments, found by watching one call, and calls of it with other tensors in those places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from deq_compile.torch_parts import pytree

from .surroundings import NotHere, inside_transform, transformed

Function = Callable[[list[Tensor]], Sequence[Tensor]]


class _Watch(TorchFunctionMode):
    """Sees the arguments of every torch function. A tensor is the function's own, one that was given, or one that it reads."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.own = {id(t): t for t in given}  # held, or an address could be another tensor's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self.read, (args, kwargs or {}))
        found = func(*args, **kwargs)
        pytree.tree_map_only(Tensor, self.note, found)
        return found

    def note(self, tensor: Tensor) -> Tensor:
        self.own[id(tensor)] = tensor
        return tensor

    def read(self, tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in self.own else self.other(tensor)

    def other(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError


class _Discover(_Watch):
    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__(given)
        self.found: dict[int, Tensor] = {}

    def other(self, tensor: Tensor) -> Tensor:
        return self.found.setdefault(id(tensor), tensor)


class _Replace(_Watch):
    def __init__(self, given: Sequence[Tensor], places: dict[int, Tensor], where: str) -> None:
        super().__init__([*given, *places.values()])
        self.places, self.where = places, where

    def other(self, tensor: Tensor) -> Tensor:
        found = self.places.get(id(tensor))
        if found is None:
            raise NotHere(_unseen(self.where, tensor))
        return found


def _unseen(where: str, tensor: Tensor) -> str:
    return (
        f"fixed_point {where}: f reads a tensor that it did not read when it was called first, or one that it makes outside of "
        "torch's functions (by an autograd.Function, a transform or a compiled function of its own), of shape "
        f"{tuple(tensor.shape)}. Fix: f of plain torch operations that reads the same tensors in every call"
    )


class Pure:
    """A function of states as a function of states and of the tensors that it reads, which are `operands`.

    Args:
        f, states: the function, and what it is called with to see what it reads.
        where: what the function is watched for, in words.

    Raises:
        NotHere: where the function reads a tensor that a transform of its own has made; by a call, where it reads one that is no
            operand.
    """

    def __init__(self, f: Function, states: Sequence[Tensor], where: str = "inside of a torch.func transform") -> None:
        self.f, self.where = f, where
        given = [s.view_as(s) for s in states]  # f may read the very tensor that it starts from
        with (watch := _Discover(given)):
            self.images = [watch.read(t) for t in f(given)]
        self.operands = list(watch.found.values())
        made = None if inside_transform() else next((t for t in self.operands if transformed(t)), None)
        if made is not None:
            raise NotHere(_unseen(where, made))

    def __call__(self, states: Sequence[Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        given = [s.view_as(s) for s in states]
        places = {id(own): t for own, t in zip(self.operands, operands, strict=True)}
        with (watch := _Replace(given, places, self.where)):
            return [watch.read(t) for t in self.f(given)]
