"""Sparse matrices that exist before a loop: their indices and values are what the graph gets, products with them are sums.

    for _ in range(100):
        z = torch.relu(torch.sparse.mm(A, z @ W) + x)      # A: a buffer, an attribute, an argument; stock Dynamo ends here

A product gathers rows, scales them and adds them up, with gradients to the values. Everything else that is asked of a sparse
matrix, and a graph in which there is no region after all, is traced again with the matrix left to Dynamo.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deq_compile.report import Reason, Skipped

from . import dynamo, sites

_PRODUCTS = (torch.sparse.mm, torch.mm, torch.matmul, torch.mv, torch.smm, torch.spmm, torch.dsmm)
_TRANSPOSES = (torch.t, torch.transpose)
_METHODS = {
    "mm": "product", "matmul": "product", "mv": "product", "__matmul__": "product", "t": "transpose", "transpose": "transpose",
    "coalesce": "same", "contiguous": "same", "size": "size", "dim": "dim",
}  # fmt: skip
_FIX = "{what} of a sparse tensor: only products with dense ones are followed; deq_compile.fixed_point takes any function"


@functools.cache
def _kind() -> Any:
    """The class of Dynamo's variables for sparse matrices; made when Dynamo is known to have the base class."""

    class SparseVariable(dynamo.VariableTracker):
        """rows, cols, values: variables of 1-d tensors; shape: of two integers; layout: torch's; site: its place."""

        def __init__(self, parts: Sequence[Any], shape: Sequence[Any], layout: Any, site: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.rows, self.cols, self.values = parts
            self.shape, self.layout, self.site = list(shape), layout, site

        def python_type(self) -> type:
            return Tensor

    return SparseVariable


def is_sparse(variable: Any) -> bool:
    return type(variable).__name__ == "SparseVariable"


def install() -> Callable[[], None]:
    """Patch the builder of variables, the calls and two instructions; returns what takes the patches out again."""
    undo = [
        _give_parts(),
        dynamo.patch_builder(_builder),
        dynamo.patch_calls(_calls),
        dynamo.patch_instructions({"BINARY_OP": _operators, "BINARY_MATRIX_MULTIPLY": _operators, "LOAD_ATTR": _attributes}),
    ]

    def remove() -> None:
        for one in reversed(undo):
            one()

    return remove


def _builder(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrap(self: Any, value: Any) -> Any:
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout in (torch.sparse_coo, torch.sparse_csr)
        if plain and value.dim() == 2 and value.dense_dim() == 0 and self.source is not None and sites.ours(self.tx):
            site = sites.site_of(self.tx, "sparse", dynamo.name_of(self.source))
            readable = value.layout == torch.sparse_csr or value.is_coalesced() or not value.requires_grad
            if readable and not sites.blocked(self.tx, site):
                with sites.guarded(self.tx, "taking a sparse matrix for its indices and values"):
                    return _taken(self.tx, value, self.source, site)
        return original(self, value)

    return wrap


def _taken(tx: Any, value: Tensor, source: Any, site: str) -> Any:
    tx.output.__dict__.setdefault("_deq_compile_sparse", []).append(site)
    layout, count, width, *parts = dynamo.items_of(tx, dynamo.build_from(tx, _parts(value), source, PARTS))
    if layout.as_python_constant() == torch.sparse_csr:
        crow, cols, values = parts
        rows = dynamo.UserFunctionVariable(_rows_of).call_function(tx, [crow, cols], {})
    else:
        indices, values = parts
        rows, cols = (dynamo.UserFunctionVariable(f).call_function(tx, [indices], {}) for f in (_first, _second))
    given = [_settled(v) for v in (rows, cols, values)]
    return _kind()(given, (count, width), value.layout, site, source=source)


def _settled(variable: Any) -> Any:
    return variable.realize() if hasattr(variable, "realize") else variable


PARTS = "_deq_compile_parts"  # an attribute of every tensor, by which guards and compiled code find those of a sparse one


@functools.cache
def _alive() -> Any:
    """A guard tells tensors apart by their addresses: of each matrix the last ones that were given out live on."""
    return dynamo.WeakTensorKeyDictionary()


def _parts(matrix: Tensor) -> tuple[Any, ...]:
    """Layout, shape, and the tensors that hold a matrix; () for all other tensors."""
    if matrix.layout not in (torch.sparse_coo, torch.sparse_csr) or matrix.dim() != 2 or matrix.dense_dim():
        return ()
    if matrix.layout == torch.sparse_csr:
        # Dynamo looks at what a view is of: a copy
        tensors: tuple[Tensor, ...] = (matrix.crow_indices(), matrix.col_indices(), matrix.values().clone())
    else:
        tensors = dynamo.entries_of(matrix)
    _alive()[matrix] = tensors
    return (matrix.layout, *matrix.shape, *tensors)


def _give_parts() -> Callable[[], None]:
    setattr(Tensor, PARTS, property(torch.compiler.disable(_parts)))
    return lambda: delattr(Tensor, PARTS)


def _calls(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        found = None
        if sites.ours(self):
            with sites.guarded(self, "following a sparse matrix"):
                found = _called(self, fn, [_real(a) for a in args], kwargs)
        if found is None:
            return original(self, fn, args, kwargs)
        self.push(found)
        return None

    return call_function


def _real(variable: Any) -> Any:
    """A variable that Dynamo has looked at already, as what it is; one that it has not only where that is a sparse tensor."""
    if type(variable) is not dynamo.LazyVariableTracker:
        return variable
    if not variable.is_realized():
        seen = dynamo.unseen(variable)
        if not (isinstance(seen, Tensor) and seen.layout in (torch.sparse_coo, torch.sparse_csr)):
            return variable
    return variable.realize()


def _called(tx: Any, fn: Any, args: list[Any], kwargs: Any) -> Any:
    """The result of a call in which a sparse matrix takes part; None for all others."""
    owner, name = dynamo.method_of(fn)
    if is_sparse(_real(owner)):
        return _method(tx, _real(owner), name, args, kwargs)
    if not any(is_sparse(a) for a in (*args, *map(_real, kwargs.values()))):
        return None
    fn = _settled(fn)
    function = fn.__dict__.get("value", fn.__dict__.get("fn"))
    if function is isinstance and len(args) == 2:
        return dynamo.build(tx, issubclass(Tensor, args[1].as_python_constant()))
    if any(function is f for f in _PRODUCTS) and is_sparse(args[0]) and not kwargs:
        return _method(tx, args[0], "mm", args[1:], kwargs)
    if any(function is f for f in _TRANSPOSES) and is_sparse(args[0]):
        return _method(tx, args[0], "transpose", args[1:], kwargs)
    return None if isinstance(function, types.FunctionType | types.MethodType) or _the_users(fn) else _refuse(tx, args, function)


def _the_users(fn: Any) -> bool:
    """Whether a call is one that Dynamo goes into: a function, a method or a module."""
    name = type(fn).__name__
    python = "Function" in name and not name.startswith("Torch")
    return python or any(word in name for word in ("Method", "Module", "UserDefined"))


def _method(tx: Any, matrix: Any, name: str, args: list[Any], kwargs: Any) -> Any:
    what = _METHODS.get(name)
    if what == "product" and len(args) == 1 and _multiplies(matrix, args[0]):
        given = [matrix.rows, matrix.cols, matrix.values, matrix.shape[0], args[0]]
        return dynamo.UserFunctionVariable(_product).call_function(tx, given, {})
    constants = [a.as_python_constant() if a.is_python_constant() else None for a in args]
    if what == "transpose" and not kwargs and constants in ([], [0, 1], [1, 0], [-1, -2], [-2, -1]):
        return _transposed(matrix)
    if what == "same" and not args and not kwargs:
        return matrix
    if what == "dim" and not args:
        return dynamo.build(tx, 2)
    if what == "size" and constants in ([0], [1], [-1], [-2]) and not kwargs:
        return matrix.shape[constants[0]]
    return _refuse(tx, [matrix], name)


def _transposed(matrix: Any) -> Any:
    source = None if matrix.source is None else dynamo.attribute_source(matrix.source, "T")
    return _kind()((matrix.cols, matrix.rows, matrix.values), matrix.shape[::-1], matrix.layout, matrix.site, source=source)


def _multiplies(matrix: Any, dense: Any) -> bool:
    """Whether a product is one of equal dtypes, of a vector or a matrix; torch raises for most others."""
    dense = _real(dense)
    plain = isinstance(dense, dynamo.TensorVariable) and dense.ndim in (1, 2) and dense.dtype == matrix.values.dtype
    return plain and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")


def _refuse(tx: Any, args: Sequence[Any], what: Any) -> Any:
    """Have the frame traced again without this matrix, and say why."""
    matrix = next(a for a in args if is_sparse(a))
    name = what if isinstance(what, str) else getattr(what, "__name__", str(what))
    sites.tell(tx, Skipped(Reason.NOT_PLAIN, sites.location(tx), _FIX.format(what=name)))
    sites.retrace([matrix.site])


def _operators(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        if sites.ours(self):
            with sites.guarded(self, "following a sparse matrix"):
                pair = [_real(v) for v in self.stack[-2:]]
                if any(is_sparse(v) for v in pair):
                    if not is_sparse(pair[0]) or "@" not in (inst.argrepr or "@"):
                        _refuse(self, pair, f"{inst.argrepr}")
                    self.popn(2)
                    self.push(_method(self, pair[0], "matmul", [pair[1]], {}))
                    return None
        return original(self, inst)

    return handle


def _attributes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        if sites.ours(self):
            with sites.guarded(self, "following a sparse matrix"):
                matrix = _real(self.stack[-1])
                found = _attribute(self, matrix, inst.argval) if is_sparse(matrix) else None
            if found is not None:
                self.pop()
                self.push(found)
                return None
        return original(self, inst)

    return handle


def _attribute(tx: Any, matrix: Any, name: Any) -> Any:
    """None for a method, which Dynamo finds when it is called."""
    if name in ("T", "mT"):
        return _transposed(matrix)
    if name == "shape":
        return dynamo.UserFunctionVariable(_size).call_function(tx, matrix.shape, {})
    plain = {"layout": matrix.layout, "is_sparse": matrix.layout == torch.sparse_coo, "dtype": matrix.values.dtype,
             "is_sparse_csr": matrix.layout == torch.sparse_csr, "device": matrix.values.device, "ndim": 2}  # fmt: skip
    return dynamo.build(tx, plain[name]) if name in plain else None


def unused(regions: int) -> list[str]:
    """The sites of the sparse matrices in the graph at work, where there is no region in it."""
    tx = dynamo.current()
    found: list[str] = [] if tx is None or regions else tx.output.__dict__.get("_deq_compile_sparse", [])
    return list(found)


def taken() -> bool:
    """Whether a sparse matrix is in the graph at work."""
    tx = dynamo.current()
    return tx is not None and bool(tx.output.__dict__.get("_deq_compile_sparse"))


# ---- traced by Dynamo from here on


def _first(indices: Any) -> Any:
    return indices[0]


def _second(indices: Any) -> Any:
    return indices[1]


def _size(rows: Any, cols: Any) -> Any:
    return torch.Size([rows, cols])


def _rows_of(crow: Any, cols: Any) -> Any:
    """The row of each entry, where they are stored by rows."""
    places = torch.arange(cols.shape[0], dtype=crow.dtype, device=crow.device)
    return torch.searchsorted(crow, places, right=True) - 1


def _product(rows: Any, cols: Any, values: Any, count: Any, dense: Any) -> Any:
    matrix = dense.unsqueeze(1) if dense.dim() == 1 else dense
    scaled = values.unsqueeze(1) * matrix.index_select(0, cols)
    summed = matrix.new_zeros((count, matrix.shape[1])).index_add(0, rows, scaled)
    return summed.squeeze(1) if dense.dim() == 1 else summed
