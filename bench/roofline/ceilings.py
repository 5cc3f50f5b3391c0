"""What the machine can do, on one thread: bandwidth of reading and copying by the size of the set, and multiply-adds."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deq_compile.kernels import native

from .counts import Count, Stream

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEMORY, UNKNOWN = "memory", "unknown"
SMALLEST, LARGEST = 1 << 14, 1 << 28  # bytes; sets of other sizes are taken for these
# Bytes that a timed call moves at least. With one pass over 1 MiB after another its set was not yet where it stays (26 GB/s, then 64).
_ENOUGH = 1 << 23

# The loads of the kernels and nothing else: eight accumulators hide the latency of an addition. Each pass is as if memory had
# changed, so that none is left out.
_SOURCE = """
#define AGAIN asm volatile("" ::: "memory")
extern "C" {
float read_set(const float* a, int64_t len, int64_t passes) {
  constexpr int N = Vec<float>::N;
  typename Vec<float>::type A[8] = {};
  for (int64_t pass = 0; pass < passes; pass++) {
    AGAIN;
    for (int64_t d = 0; d + 8 * N <= len; d += 8 * N)
#pragma GCC unroll 8
      for (int u = 0; u < 8; u++) A[u] += load(a + d + u * N);
  }
  for (int u = 1; u < 8; u++) A[0] += A[u];
  return sum<float>(A[0]);
}
void copy_set(float* a, int64_t len, int64_t passes) {  // the second half becomes twice the first
  constexpr int N = Vec<float>::N;
  float* to = a + len / 2;
  for (int64_t pass = 0; pass < passes; pass++) {
    AGAIN;
    for (int64_t d = 0; d + 4 * N <= len / 2; d += 4 * N)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        auto x = load(a + d + u * N);
        store(to + d + u * N, x + x);
      }
  }
}
float multiply_add(int64_t count) {  // 2 * 10 * N flops each
  constexpr int N = Vec<float>::N;
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
            ("read_set", [P, I, I], ctypes.c_float), ("copy_set", [P, I, I], None),
            ("multiply_add", [I], ctypes.c_float), ("lanes", [], I),
        ):  # fmt: skip
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        clock = statistics.median(taken_ns(lambda: None) for _ in range(501))
        return Loops(library, torch.ones(largest // 4), clock)

    def gbs(self, kind: str, set_bytes: float) -> float:
        """GB/s of "read" or "copy" over a set that was touched before; a copy's set is both of its halves."""
        size = self.rounded(set_bytes)
        passes = max(1, _ENOUGH // size)
        function, at = getattr(self.library, f"{kind}_set"), self.buffer.data_ptr()
        function(at, size // 4, min(passes, 2))
        return size * passes / (taken_ns(lambda: function(at, size // 4, passes)) - self.clock_ns)

    def rounded(self, set_bytes: float) -> int:
        """A size that the loops divide evenly, within the buffer."""
        return int(min(max(set_bytes, SMALLEST), 4 * self.buffer.numel())) // 1024 * 1024

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
        pairs = [(loops.gbs("read", size), loops.gbs("copy", size)) for _ in range(repeats)]
        read, copy = (statistics.median(values) for values in zip(*pairs, strict=True))
        rows.append({"bytes": size, "read": read, "copy": copy})
        size *= 2
    return rows


@dataclass(frozen=True)
class Rates:
    """GB/s of reading and copying from where a stream's first uses lie and from where it is used again; Gflop/s."""

    first: tuple[float, float]
    again: tuple[float, float]
    gflops: float


def seconds(stream: Stream, read: float, copy: float) -> float:
    """At the bandwidth of copying for each byte written and as many read, of reading for the rest."""
    copied = min(stream.moved, 2 * stream.written)
    return 1e-9 * ((stream.moved - copied) / read + copied / copy)


def floor(count: Count, rates: Rates) -> float:
    """The least seconds a call can take: its transfers or its arithmetic, whichever is more; one hides behind the other."""
    transfers = seconds(count.first, *rates.first) + seconds(count.again, *rates.again)
    return max(transfers, 1e-9 * count.flops / rates.gflops)
