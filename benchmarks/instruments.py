"""What the benchmarks measure with: time on the device, peak memory, the device's own rates, and NVML's clocks, power and memory."""

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pynvml
import torch

# Written before each timed call on a GPU. It empties the L2 cache, and lasts a quarter of a millisecond on a H200: the host gets
# that far ahead, so that the time from event to event is the device's and not that of Python's launches.
FLUSH_BYTES = 1 << 30
# Side of the square product and bytes of the copy that give a device's rates; large enough to be steady, small enough for seconds.
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
RATE_REPEATS = 15


class Timer:
    """Seconds that a call takes: between two events on a GPU, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable[[], Any]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        before.record()
        call()
        after.record()
        torch.cuda.synchronize(self._device)
        return before.elapsed_time(after) / 1e3


class Rates:
    """What the device reaches on random data: matrix products per dtype, and copies. Measured at the first question."""

    def __init__(self, device: torch.device, *, repeats: int = RATE_REPEATS) -> None:
        self._device = device
        self._repeats = repeats
        self._known: dict[str, float] = {}

    def matmul_flop_s(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large square product in this dtype, float32 without TF32."""
        if str(dtype) not in self._known:
            side = MATMUL_SIDE[self._device.type]
            a, b = (torch.randn(side, side, device=self._device).to(dtype) for _ in range(2))
            self._known[str(dtype)] = 2 * side**3 / self._seconds(lambda: a @ b)
        return self._known[str(dtype)]

    def copy_bytes_s(self) -> float:
        """Bytes a second of a large copy, those read and those written."""
        if "copy" not in self._known:
            source = torch.randint(0, 256, (COPY_BYTES[self._device.type],), dtype=torch.uint8, device=self._device)
            target = torch.zeros_like(source)
            self._known["copy"] = 2 * source.numel() / self._seconds(lambda: target.copy_(source))
        return self._known["copy"]

    def floor_s(self, flop: float, num_bytes: float, dtype: torch.dtype) -> float:
        """No implementation runs much faster: the longer of the arithmetic and the traffic at these rates."""
        arithmetic_s = flop / self.matmul_flop_s(dtype) if flop else 0.0
        return max(arithmetic_s, num_bytes / self.copy_bytes_s())

    def _seconds(self, call: Callable[[], Any]) -> float:
        timer = Timer(self._device)
        call()
        call()
        times = [timer(call) for _ in range(self._repeats)]
        return statistics.median(times) if self._device.type == "cuda" else min(times)  # a GPU is ours alone; a CPU may be shared


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that live at a time during the call, beyond those before it; its outputs count, other libraries' do not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Sampler:
    """Clocks, power, temperature and memory of a GPU while a block runs, every 20 ms. On a CPU it reports nothing."""

    INTERVAL_S = 0.02

    def __init__(self, device: torch.device) -> None:
        self._samples: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._about: dict[str, Any] = {}
        if device.type != "cuda":
            return
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._about["driver"] = pynvml.nvmlSystemGetDriverVersion()
        except pynvml.NVMLError as error:  # the figures stand without clocks; the row says that they are missing
            self._about["nvml"] = str(error)
            return
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Sampler":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def report(self) -> dict[str, Any]:
        """Medians of what was sampled; the lowest SM clock and the most memory besides. Why there is nothing, where NVML failed."""
        if not self._samples:
            return self._about
        columns = {name: [sample[name] for sample in self._samples] for name in self._samples[0]}
        found = {name: statistics.median(values) for name, values in columns.items()}
        return self._about | found | {"sm_mhz_min": min(columns["sm_mhz"]), "memory_used_bytes": max(columns["memory_used_bytes"])}

    def _sample(self) -> None:
        while not self._ended.wait(self.INTERVAL_S):
            self._samples.append(
                {
                    "sm_mhz": float(pynvml.nvmlDeviceGetClockInfo(self._gpu, pynvml.NVML_CLOCK_SM)),
                    "memory_mhz": float(pynvml.nvmlDeviceGetClockInfo(self._gpu, pynvml.NVML_CLOCK_MEM)),
                    "power_w": pynvml.nvmlDeviceGetPowerUsage(self._gpu) / 1e3,
                    "temperature_c": float(pynvml.nvmlDeviceGetTemperature(self._gpu, pynvml.NVML_TEMPERATURE_GPU)),
                    "memory_used_bytes": float(pynvml.nvmlDeviceGetMemoryInfo(self._gpu).used),
                }
            )
