"""What the models share."""

from __future__ import annotations

import torch
from torch import nn


def scale_weights(module: nn.Module, norm: float) -> None:
    """Give every weight matrix (a convolution's taken as one of outputs by the rest) a spectral norm of `norm`."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(norm / torch.linalg.matrix_norm(parameter.flatten(1), 2))
