"""A low-rank inverse Jacobian that all samples of a batch share, made of secant pairs of earlier batches."""

from .dispatch import products
from .gpu import Products, serves
from .shared import Shared, compress, rank_for
from .sketch import Sketch, sums_for

__all__ = ["Products", "Shared", "Sketch", "compress", "products", "rank_for", "serves", "sums_for"]
