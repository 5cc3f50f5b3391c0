"""Attention that iterates: Hopfield recall, Sinkhorn, slots."""

from __future__ import annotations

from ..manifest import Model

MODELS: tuple[Model, ...] = ()
