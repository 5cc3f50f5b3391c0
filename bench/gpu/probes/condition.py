"""Does the driver resolve the device function of CUDA graphs in a Triton cubin, and where may a WHILE node's condition be set?"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deq_compile.testing import captures, set_conditional

from ..common import Setting
from .registry import Finding, probe

TRIPS = 10
Launch = Callable[[int], object]  # enqueue on the stream with this raw handle


@triton.jit
def count_up(count_ptr: Any, flag_ptr: Any, limit_ptr: Any) -> None:
    count = tl.load(count_ptr) + 1
    tl.store(count_ptr, count)
    tl.store(flag_ptr, tl.where(count < tl.load(limit_ptr), 1, 0))


@triton.jit
def set_from(handle_ptr: Any, flag_ptr: Any) -> None:
    set_conditional(handle_ptr, tl.load(flag_ptr))


class Loop:
    """The numbers of a loop that counts to a limit: count, flag, limit, (1,) int32 each."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.count, self.flag, self.limit = (torch.zeros(1, dtype=torch.int32, device=setting.device) for _ in range(3))
        self.count_up()  # compiled and loaded before anything is captured

    def count_up(self) -> None:
        count_up[(1,)](self.count, self.flag, self.limit, num_warps=1)

    def lower(self) -> None:
        self.flag.zero_()

    def load(self, handle: Tensor) -> None:
        """Compile and load the setter; its condition exists in its own graph only, so that it may not run."""
        if not self.setting.dry:
            set_from.warmup(handle, self.flag, grid=(1,), num_warps=1)._init_handles()

    def begin(self, trips: int) -> Callable[[], None]:
        def reset() -> None:
            self.count.zero_()
            self.limit.fill_(trips)

        return reset

    def finding(self, replay: Callable[[], object]) -> Finding:
        """Whether the graph goes round as often as it should, and what a trip costs."""
        self.begin(TRIPS)()
        replay()
        self.setting.sync()
        trips = int(self.count)
        few, many = (2, 6) if self.setting.dry else (10, 1010)
        times = [self.setting.device_us(replay, self.begin(n), repeats=5) for n in (few, many)]
        per_trip = (times[1] - times[0]) / (many - few)
        return Finding(trips == TRIPS, {"trips": trips, "of": TRIPS, "us_per_trip": round(per_trip, 2), "kernels": 2})


@probe("condition", "versions", "torch 2.11, triton 3.6, cuda-bindings 13", needs_device=True)
def versions(setting: Setting) -> Finding:
    import cuda.bindings
    from cuda.bindings import driver

    return Finding(True, {"bindings": cuda.bindings.__version__, "driver": int(driver.cuDriverGetVersion()[1])})


@probe("condition", "1a the driver resolves cudaGraphSetConditional in a Triton cubin", "it does", needs_device=True)
def symbol(setting: Setting) -> Finding:
    Loop(setting).load(torch.zeros(1, dtype=torch.int64, device=setting.device))
    return Finding(True)


@probe("condition", "1b WHILE, its condition set in a child graph of its body, as the engine does", "works; 2 to 5 µs a trip")
def child(setting: Setting) -> Finding:
    loop, device = Loop(setting), captures.device_class(setting.device)
    condition = device.new_condition()
    loop.load(condition.handle)

    def trip() -> None:
        loop.count_up()
        set_from[(1,)](condition.handle, loop.flag, num_warps=1)

    parts = {
        "condition": condition, "before": None, "trip": device.capture(trip, keep=True),
        "after": device.capture(loop.lower, keep=True),
    }  # fmt: skip
    graph = device.while_graph(parts)
    return loop.finding(graph.replay)


@probe("condition", "1c WHILE, its body captured directly, Triton's setter", "works: the fallback if 1b fails", needs_device=True)
def directly(setting: Setting) -> Finding:
    def setter(loop: Loop, handle: Tensor) -> Launch:
        loop.load(handle)
        return lambda stream: set_from[(1,)](handle, loop.flag, num_warps=1)

    return direct(setting, setter)


@probe("condition", "1d the same with a setter made by NVRTC", "works: the fallback if 1a fails", needs_device=True)
def by_nvrtc(setting: Setting) -> Finding:
    return direct(setting, nvrtc_setter)


def direct(setting: Setting, setter: Callable[[Loop, Tensor], Launch]) -> Finding:
    """A WHILE graph whose body is captured straight into the conditional node's own graph."""
    from deq_compile.testing import Condition, checked, runtime

    rt, device, loop = runtime(), captures.device_class(setting.device), Loop(setting)
    condition = Condition(device.device)
    launch = setter(loop, condition.handle)
    params = rt.cudaGraphNodeParams()
    params.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
    params.conditional.handle, params.conditional.size = condition.raw, 1
    params.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
    checked(rt.cudaGraphAddNode(condition.graph, None, None, 0, params))
    body = rt.cudaGraph_t(int(params.conditional.phGraph_out[0]))
    mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    with device.aside():
        stream = torch.cuda.current_stream().cuda_stream
        checked(rt.cudaStreamBeginCaptureToGraph(rt.cudaStream_t(stream), body, None, None, 0, mode))
        loop.count_up()
        launch(stream)
        checked(rt.cudaStreamEndCapture(rt.cudaStream_t(stream)))
    executable = checked(rt.cudaGraphInstantiate(condition.graph, 0))

    def replay() -> None:
        checked(rt.cudaGraphLaunch(executable, rt.cudaStream_t(torch.cuda.current_stream().cuda_stream)))

    return loop.finding(replay)


SETTER = b"""
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long, unsigned int);
extern "C" __global__ void set(const unsigned long long* handle, const int* flag) {
    cudaGraphSetConditional(*handle, (unsigned)*flag);
}
"""


def nvrtc_setter(loop: Loop, handle: Tensor) -> Launch:
    """A kernel that sets the condition, compiled by NVRTC and loaded by the driver: no Triton in it."""
    from cuda.bindings import driver, nvrtc

    def good(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise RuntimeError(f"expected success, got {result[0]}")
        return result[1] if len(result) > 1 else None

    program = good(nvrtc.nvrtcCreateProgram(SETTER, b"set.cu", 0, [], []))
    architecture = b"--gpu-architecture=sm_%d%d" % torch.cuda.get_device_capability()
    good(nvrtc.nvrtcCompileProgram(program, 1, [architecture]))
    cubin = b" " * good(nvrtc.nvrtcGetCUBINSize(program))
    good(nvrtc.nvrtcGetCUBIN(program, cubin))
    function = good(driver.cuModuleGetFunction(good(driver.cuModuleLoadData(cubin)), b"set"))
    arguments = ((handle.data_ptr(), loop.flag.data_ptr()), (ctypes.c_void_p, ctypes.c_void_p))
    return lambda stream: good(driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, driver.CUstream(stream), arguments, 0))
