"""The device, and the bandwidth of a large copy, which all other figures are held against."""

from __future__ import annotations

import platform
import subprocess
import time
from typing import Any

import torch

from .common import Setting


def describe(dry: bool) -> dict[str, Any]:
    """Device, driver, versions, date."""
    import numpy
    import triton

    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": "rehearsal on the CPU, Triton interpreted" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
    }
    if dry:
        return found | {"rehearsed": True}
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "cuda": torch.version.cuda,
        "convolutions": "TF32" if torch.backends.cudnn.allow_tf32 else "float32",
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "L2_MiB": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
    }
    query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found["nvidia_smi"] = repr(error)[:200]
    return found


def run(setting: Setting) -> None:
    setting.row("device", **describe(setting.dry))
    for gigabytes in (0.001,) if setting.dry else (1, 4):
        with setting.guarded("copy bandwidth"):
            setting.row("copy bandwidth", GiB=gigabytes, GB_per_s=round(copy_rate(setting, int(gigabytes * 2**30)), 1))


def copy_rate(setting: Setting, size: int) -> float:
    """GB/s of a copy of `size` bytes on the device, bytes read and bytes written both counted."""
    a = torch.randn(size // 4, device=setting.device)  # not zeros: those may be faster than data
    b = torch.empty_like(a)
    return 2 * size / setting.device_us(lambda: b.copy_(a), repeats=15) / 1e3
