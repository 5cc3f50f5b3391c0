"""Graphs: implicit graph networks, personalised PageRank, label propagation."""

from __future__ import annotations

from ..manifest import Model

MODELS: tuple[Model, ...] = ()
