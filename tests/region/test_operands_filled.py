"""Buffers that a captured solve copies operands to hold a call's numbers from the start: the warm-up runs the body on them."""

from __future__ import annotations

import torch

from deq_compile.region.graphs.operands import Operands, addresses


def test_copied_operands_begin_with_the_numbers_of_a_call() -> None:
    """Uninitialised memory taken for an index is out of bounds: on a GPU that breaks the device's context for good."""
    index = torch.tensor([2, 0, 1])
    wide = torch.randn(1, 3).expand(4, 3)
    own = Operands([index, wide], addresses([index, wide]), frozenset({0, 1}))
    assert own.copied == [0, 1]
    assert torch.equal(own.tensors[0], index)
    assert torch.equal(own.tensors[1], wide)
    assert own.tensors[0].data_ptr() != index.data_ptr()
