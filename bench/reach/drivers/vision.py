"""Vision: inverse problems, optical flow, mean-field segmentation."""

from __future__ import annotations

from ..manifest import Model

MODELS: tuple[Model, ...] = ()
