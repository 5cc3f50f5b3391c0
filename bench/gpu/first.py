"""First of all: one compiled model through all engines, forward and adjoint, against the user's loop in float64."""

from __future__ import annotations

import torch

from .common import Setting, relative_error
from .models import check, first_model, moved, step_of


def run(setting: Setting) -> None:
    model, inputs = first_model(setting.dry)
    with setting.guarded("eager"):
        results = [
            step_of(own, own, given)
            for own, given in (moved(model, inputs, setting.device, dtype) for dtype in (torch.float64, torch.float32))
        ]
        errors = [relative_error(a, b) for a, b in zip(results[1], results[0], strict=True)]
        setting.row("eager", ok=max(errors) < 1e-2, value_error=errors[0], gradient_error=errors[1])
    check(setting, "mlp256", (model, inputs), what="one compiled model")
