"""The public models, family by family. A driver makes one at a small size; it never changes what was published."""

from __future__ import annotations

from ..manifest import Model
from . import attention, graphs, implicit, sequence, vision

MODELS: tuple[Model, ...] = (*sequence.MODELS, *vision.MODELS, *implicit.MODELS, *graphs.MODELS, *attention.MODELS)
