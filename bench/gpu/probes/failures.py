"""What a refused or failed capture leaves behind, and settings that a user may choose."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deq_compile.testing import captures, new_state, step

from ..common import Setting
from .registry import Finding, probe


def _failing(setting: Setting) -> str:
    """Let a capture fail in its middle by a question to the device; what it said."""
    device, x = captures.device_class(setting.device), torch.zeros(4, device=setting.device)
    try:
        device.capture(lambda: _discard(x.sum().item()))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    return ""


def _discard(result: object) -> None:
    del result


def _attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    return ""


@probe("failures", "4a a pool after its last graph is gone, and a new one", "the old one fails, a new one serves")
def pool(setting: Setting) -> Finding:
    """Each attempt of the engine takes a new pool: that has to do, whatever becomes of the old one."""
    device, x = captures.device_class(setting.device), torch.zeros(4, device=setting.device)
    device.capture(lambda: _discard(x.add_(1)))  # dropped at once, and its pool with it
    setting.sync()
    old = _attempt(lambda: device.capture(lambda: _discard(x.add_(1))))
    renew = getattr(device, "new_pool", None)
    if renew is None:
        device = captures.device_class(setting.device)
    else:
        renew()
    new = _attempt(lambda: device.capture(lambda: _discard(x.add_(1))))
    return Finding(new == "", {"old_pool": old or "serves", "new_pool": new or "serves"})


@probe(
    "failures",
    "4b random numbers after a failed capture",
    "every random op raises unless the device heals itself",
    needs_device=True,
)
def random_numbers(setting: Setting) -> Finding:
    said = _failing(setting)
    now = _attempt(lambda: torch.randn(4, device=setting.device))
    x = torch.zeros(4, device=setting.device)
    healed = _attempt(lambda: captures.device_class(setting.device).capture(lambda: _discard(x.add_(1))))
    later = _attempt(lambda: torch.randn(4, device=setting.device))
    return Finding(bool(said) and now == "", {"capture": said, "randn": now, "a_good_capture": healed, "randn_after_it": later})


@probe(
    "failures", "4d the engine after a failed capture: the next one down, and then a fresh WHILE", "both serve", needs_device=True
)
def next_one_down(setting: Setting) -> Finding:
    from .engines import solve_twice

    said = _failing(setting)
    chunks, whole = (solve_twice(setting, False, wanted) for wanted in ("chunks", "while"))
    ran = {"chunks": chunks.numbers.get("ran"), "while": whole.numbers.get("ran")}
    reasons = [str(f.numbers.get("reason")) for f in (chunks, whole)]
    return Finding(bool(said) and chunks.ok and whole.ok, {"capture": said, **ran, "reasons": reasons})


@probe("failures", "9 settings() under the present precision API", "raises unless it reads the new names")
def precision(setting: Setting) -> Finding:
    device = captures.device_class
    plain = _settings(device)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        changed = _settings(device)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    told = isinstance(changed, tuple) and isinstance(plain, tuple)
    return Finding(told and (setting.dry or changed != plain), {"default": str(plain)[:200], "tf32": str(changed)[:200]})


def _settings(device: type) -> object:
    try:
        return device.settings()  # type: ignore[attr-defined]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@probe(
    "failures", "10 tensors on a device that is not the current one", "served (with two GPUs; else not asked)", needs_device=True
)
def other_device(setting: Setting) -> Finding:
    if torch.cuda.device_count() < 2:
        return Finding(True, {"skipped": "one GPU only"})
    z = torch.zeros(4, 64, device="cuda:1")
    state = new_state(z, 8, tol=1e-3)
    step(state, z.clone(), z + 1)
    torch.cuda.synchronize("cuda:1")
    return Finding(bool(torch.isfinite(state.z_best).all()))
