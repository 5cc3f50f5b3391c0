"""A low-rank inverse Jacobian that all samples of a batch share, made of secant pairs of earlier batches."""

from .shared import Shared, compress, rank_for
from .sketch import Sketch, sums_for

__all__ = ["Shared", "Sketch", "compress", "rank_for", "sums_for"]
