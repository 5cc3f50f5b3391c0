"""Is dimension 0 of the state a batch of independent samples, or is the state one coupled system?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .domain import or_nan


def rows_are_independent(body: Callable[[Tensor], Tensor], z: Tensor, eps: float) -> bool | None:
    """Whether no row of body(z) depends on another row of z, (B, D) with B >= 2. None where values that are not finite hide it.

    For every bit of the row number, the rows with that bit set are disturbed, then those without: every ordered pair of
    rows is tried at least once, in 2 ceil(log2 B) + 1 evaluations. Batched matrix products may round a row differently
    when others change, hence a threshold of a thousand units of the body's round-off `eps`. A coupling weaker than that
    is not seen. Where the noise leaves the body's domain (a logarithm's, say; it may raise there), z is disturbed by a part of
    itself.
    """
    if not z.numel():
        return True
    batch = z.shape[0]
    generator = torch.Generator(device="cpu").manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.device, z.dtype)

    base, size = z + noise(), torch.ones_like(z)
    elsewhere = or_nan(body)
    before = elsewhere(base).clone()
    if not bool(torch.isfinite(before).all()):
        base, size = z, 0.1 * z
        before = body(base).clone()
        if not bool(torch.isfinite(before).all()):
            return None
    scale = before.abs().amax().clamp_min(torch.finfo(z.dtype).tiny)
    number = torch.arange(batch, device=z.device)
    for bit in range((batch - 1).bit_length()):
        for side in (0, 1):
            disturbed = ((number >> bit) & 1) == side
            if bool(disturbed.all()) or not bool(disturbed.any()):
                continue
            moved = torch.where(disturbed[:, None], base + size * noise(), base)
            change = (elsewhere(moved) - before)[~disturbed].abs()
            if not bool(torch.isfinite(change).all()) or bool(change.amax() > 1e3 * eps * scale):
                return False
    return True
