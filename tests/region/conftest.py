"""Regions are tested on both CPU implementations, as the kernels are."""

from tests.kernels.conftest import implementation

__all__ = ["implementation"]
