"""What the machine can do, on one thread: bandwidth by the size of the set, and multiply-adds.

Several streams at a time, as the kernels have them: out of a cache eight carry 1.6 times what one does.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deq_compile.testing import native

from .counts import Count, Stream

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEMORY, UNKNOWN = "memory", "unknown"
SMALLEST, LARGEST = 1 << 14, 1 << 28  # bytes; sets of other sizes are taken for these
# Bytes that a timed call moves at least. A single pass over 1 MiB after another one was too early: 26 GB/s, then 64.
_ENOUGH = 1 << 23

# The loads and stores of the kernels and nothing else, over streams of `len` numbers that lie one after the other. Eight
# accumulators hide the latency of an addition; each pass is as if memory had changed, so that none is left out.
_SOURCE = """
#define AGAIN asm volatile("" ::: "memory")
constexpr int N = Vec<float>::N;
extern "C" {
float read_set(const float* a, int64_t len, int64_t passes) {  // eight streams
  typename Vec<float>::type A[8] = {};
  for (int64_t pass = 0; pass < passes; pass++) {
    AGAIN;
    for (int64_t d = 0; d < len; d += N)
#pragma GCC unroll 8
      for (int u = 0; u < 8; u++) A[u] += load(a + u * len + d);
  }
  for (int u = 1; u < 8; u++) A[0] += A[u];
  return sum<float>(A[0]);
}
void copy_set(float* a, int64_t len, int64_t passes) {  // four streams into four others
  for (int64_t pass = 0; pass < passes; pass++) {
    AGAIN;
    for (int64_t d = 0; d < len; d += N)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) store(a + (u + 4) * len + d, -load(a + u * len + d));
  }
}
void update_set(float* a, int64_t len, int64_t passes) {  // eight streams, each where it is
  for (int64_t pass = 0; pass < passes; pass++) {
    AGAIN;
    for (int64_t d = 0; d < len; d += N)
#pragma GCC unroll 8
      for (int u = 0; u < 8; u++) store(a + u * len + d, -load(a + u * len + d));
  }
}
float multiply_add(int64_t count) {  // 2 * 10 * N flops each
  typename Vec<float>::type A[10], c = broadcast(0.5f), d = broadcast(1.0f);
  for (int u = 0; u < 10; u++) A[u] = broadcast(u + 0.5f);  // 2 would stay 2, and be left out
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 10
    for (int u = 0; u < 10; u++) A[u] = A[u] * c + d;
    asm volatile("" : "+r"(i));
  }
  for (int u = 1; u < 10; u++) A[0] += A[u];
  return sum<float>(A[0]);
}
int64_t lanes() { return Vec<float>::N; }
}
"""


@dataclass(frozen=True)
class Speeds:
    """GB/s of reading, of copying, and of updating in place; all bytes that are loaded or stored count."""

    read: float
    copy: float
    update: float


KINDS = ("read", "copy", "update")


def median(speeds: Sequence[Speeds]) -> Speeds:
    return Speeds(*(statistics.median(getattr(s, kind) for s in speeds) for kind in KINDS))


@dataclass(frozen=True)
class Loops:
    """The compiled loops, the buffer that they run over, and what reading the clock costs."""

    library: ctypes.CDLL
    buffer: torch.Tensor
    clock_ns: float

    @staticmethod
    def load(largest: int = LARGEST) -> Loops:
        """Raises SystemExit without a compiler: there are no C++ kernels then either."""
        if native.functions(torch.empty(0)) is None:
            raise SystemExit("expected a C++ compiler, got none; fix: install g++ or clang, unset DEQ_COMPILE_NATIVE")
        from torch._inductor.codecache import CppCodeCache

        vectors = Path(native.__file__).with_name("vector.h").read_text()
        loaded = CppCodeCache.load(vectors + _SOURCE, device_type="cpu", extra_flags=("-ffp-contract=fast",))
        library = getattr(loaded, "lib", loaded)
        P, I = ctypes.c_void_p, ctypes.c_int64
        for name, arguments, result in (
            ("read_set", [P, I, I], ctypes.c_float), ("copy_set", [P, I, I], None), ("update_set", [P, I, I], None),
            ("multiply_add", [I], ctypes.c_float), ("lanes", [], I),
        ):  # fmt: skip
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        clock = statistics.median(taken_ns(lambda: None) for _ in range(501))
        return Loops(library, torch.ones(largest // 4), clock)

    def gbs(self, kind: str, set_bytes: float) -> float:
        """GB/s of one of `KINDS` over a set that was touched before; a copy's set is what it reads and what it writes."""
        length = self.stream(set_bytes)
        size = 32 * length
        passes = max(1, _ENOUGH // size)
        function, at = getattr(self.library, f"{kind}_set"), self.buffer.data_ptr()
        function(at, length, min(passes, 2))
        moved = size * passes * (2 if kind == "update" else 1)
        return moved / (taken_ns(lambda: function(at, length, passes)) - self.clock_ns)

    def speeds(self, set_bytes: float) -> Speeds:
        return Speeds(*(self.gbs(kind, set_bytes) for kind in KINDS))

    def stream(self, set_bytes: float) -> int:
        """Numbers in each of the eight streams that make a set, within the buffer: an odd multiple of 80, so that all vectors
        divide it and the streams do not meet in the same lines of a cache."""
        numbers = min(max(set_bytes, SMALLEST) / 32, self.buffer.numel() // 8 - 80)
        return int(numbers) // 160 * 160 + 80

    def gflops(self) -> float:
        count = 30_000
        return 20 * self.library.lanes() * count / (taken_ns(lambda: self.library.multiply_add(count)) - self.clock_ns)


def taken_ns(call: Callable[[], object]) -> int:
    """Process CPU time, in nanoseconds; the clock's own included."""
    begun = time.process_time_ns()
    call()
    return time.process_time_ns() - begun


def cache_sizes(root: Path = CACHES) -> dict[str, int]:
    """Bytes of the data caches of a core by name, "L1" first; empty where the system does not say."""
    found = {}
    for index in root.glob("index*"):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return dict(sorted(found.items()))


def level_of(set_bytes: float, caches: dict[str, int]) -> str:
    """The smallest cache that holds a set."""
    return next((name for name, size in caches.items() if set_bytes <= size), MEMORY if caches else UNKNOWN)


def curve(loops: Loops, repeats: int) -> list[dict[str, float]]:
    """Bandwidth in GB/s over sets from 16 KiB on, doubled each time; medians of timings in turns."""
    rows, size = [], SMALLEST
    while size <= 4 * loops.buffer.numel():
        rows.append({"bytes": size, **asdict(median([loops.speeds(size) for _ in range(repeats)]))})
        size *= 2
    return rows


@dataclass(frozen=True)
class Rates:
    """Bandwidth where a stream's first uses come from and where it is used again; Gflop/s."""

    first: Speeds
    again: Speeds
    gflops: float


def seconds(stream: Stream, speeds: Speeds) -> float:
    """What is made goes at the speed of copying, along with as many bytes that are read; the rest at its own."""
    copied = 2 * min(stream.read, stream.new) + max(0.0, stream.new - stream.read)
    read = max(0.0, stream.read - stream.new)
    return 1e-9 * (read / speeds.read + copied / speeds.copy + stream.updated / speeds.update)


def floor(count: Count, rates: Rates) -> float:
    """The least seconds a call can take: its transfers or its arithmetic, whichever is more; one hides behind the other."""
    transfers = seconds(count.first, rates.first) + seconds(count.again, rates.again)
    return max(transfers, 1e-9 * count.flops / rates.gflops)
