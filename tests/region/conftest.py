"""Regions are tested on both CPU implementations, as the kernels are; CUDA engines on a CPU that plays the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tests.kernels.conftest import implementation

if TYPE_CHECKING:
    from bench.gpu.rehearse import RehearsalDevice

__all__ = ["implementation"]


@pytest.fixture
def device() -> Iterator[type[RehearsalDevice]]:
    """The device of engines that are rehearsed in Triton's interpreter; it checks at its end that nothing is left behind."""
    from bench.gpu.rehearse import rehearsed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy on the inf and NaN that are masked away
        warnings.simplefilter("ignore", DeprecationWarning)  # triton 3.6's interpreter turns arrays of one number into numbers
        torch._dynamo.reset()
        with rehearsed() as found:
            yield found
