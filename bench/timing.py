"""Timing on one GPU: events, a spin that hides the host, a flushed cache, contestants in turn.

Who has streams of his own is timed by PyTorch's profiler instead.
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16)
import numpy as np

FEW, LONG = 3, 0.1  # samples and their seconds in all that are enough of a slow contestant
DRAWN = 1 << 28  # numbers drawn afresh for one array; a larger one repeats them

# Flushing reads: a memset would leave dirty lines, whose write-back is then timed.
SOURCE = r"""
extern "C" __global__ void spin(long long nanoseconds)
{
    long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}

extern "C" __global__ void read(const uint4* x, long long count, unsigned* sink)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned seen = 0;
#pragma unroll 4
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const uint4 v = x[i];
        seen += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (seen == 0x9e3779b9u) *sink = seen;  // keeps the loads alive
}
"""


@dataclass(frozen=True)
class Contestant:
    """One way to compute the answer."""

    name: str
    call: Callable[[], Any]
    scope: Callable[[], AbstractContextManager] = nullcontext  # entered before the clock starts
    wait: Callable[[Any], object] | None = None  # given if it runs on streams of its own
    view: Callable[[Any], Any] = lambda result: result  # its result in the common layout


class Stopwatch:
    """Samples of one call's device time in seconds, on the null stream of the current device."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        module = cupy.RawModule(code=SOURCE)
        self._spin, self._read = module.get_function("spin"), module.get_function("read")
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self._blocks = 8 * int(properties["multiProcessorCount"])
        self._cache = cupy.zeros(max(1 << 28, 4 * int(properties["l2CacheSize"])), np.uint8)
        self._sink = cupy.zeros(1, np.uint32)
        self._start, self._stop = cupy.cuda.Event(), cupy.cuda.Event()
        self._spin_ns: dict[str, int] = {}
        self._random = cupy.random.default_rng(20260101)  # unlike RandomState, needs no cuRAND

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return fresh standard normal numbers; zeros would run faster than real data."""
        drawn = np.float64 if dtype == "float64" else np.float32
        size = math.prod(shape)
        numbers = self._random.standard_normal(min(size, DRAWN), drawn).astype(dtype, copy=False)
        if size <= DRAWN:
            return numbers.reshape(shape)
        x = self._cupy.empty(size, dtype)
        for start in range(0, size, DRAWN):
            x[start : start + DRAWN] = numbers[: size - start]
        return x.reshape(shape)

    def integers(self, high: int, count: int) -> Any:
        """Return fresh int64 numbers from 0 to high - 1."""
        return self._random.integers(0, high, count, dtype=np.int64, endpoint=False)

    def array(self, numbers: np.ndarray) -> Any:
        """Return a copy on the device."""
        return self._cupy.asarray(numbers)

    def free_memory(self) -> int:
        """Return the bytes of device memory that nobody holds."""
        return int(self._cupy.cuda.Device().mem_info[0])

    def read(self, x: Any) -> None:
        """Read an array once and write nothing."""
        self._read((self._blocks,), (256,), (x, np.int64(x.nbytes // 16), self._sink))

    def wait(self) -> None:
        """Wait for all streams of the device."""
        self._cupy.cuda.runtime.deviceSynchronize()

    def warm(self, contestant: Contestant) -> Any:
        """Run until compiled and allocated, note the host's time, return the last result."""
        with contestant.scope():
            for _ in range(3):
                result = None  # a large one must not be there twice
                begin = perf_counter()
                result = contestant.call()
                host = perf_counter() - begin
                if contestant.wait:
                    contestant.wait(result)
                self.wait()
        # Twice the host's own time, and the event's; the median takes care of rarer hiccups.
        self._spin_ns[contestant.name] = int(1e9 * min(2 * host + 20e-6, 2e-3))
        return result

    def sample(self, contestant: Contestant) -> float:
        """Return the device time of one call."""
        if contestant.wait:
            return self._sample_by_kernels(contestant, contestant.wait)
        with contestant.scope():
            self.read(self._cache)
            self._spin((1,), (1,), (np.int64(self._spin_ns[contestant.name]),))
            self._start.record()
            result = contestant.call()
            self._stop.record()
        self._stop.synchronize()
        del result  # held until here, so that freeing it is not timed
        return self._cupy.cuda.get_elapsed_time(self._start, self._stop) * 1e-3

    def _sample_by_kernels(self, contestant: Contestant, wait: Callable[[Any], object]) -> float:
        """Add up what the driver says of the kernels of one call: no event can be put around it.

        The launch, and what lies between kernels, does not count.
        """
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.read(self._cache)
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            wait(contestant.call())
            self.wait()
        kernels = [e.device_time for e in seen.events() if e.device_type == DeviceType.CUDA]
        if not kernels:
            raise RuntimeError(f"PyTorch's profiler saw no kernel of {contestant.name}")
        return sum(kernels) * 1e-6

    def host_time(self, contestant: Contestant, calls: int = 200, repeats: int = 5) -> float:
        """Return the median host time of an eager call; the queue is drained between repeats."""
        self.warm(contestant)
        samples = []
        with contestant.scope():
            for _ in range(repeats):
                for _ in range(calls):
                    begin = perf_counter()
                    contestant.call()
                    samples.append(perf_counter() - begin)
                self.wait()
        return statistics.median(samples)

    def bandwidths(self) -> dict[str, float]:
        """Measure the ceilings of memory-bound work in bytes per second."""
        cupy, size = self._cupy, 1 << 30
        x = self.normal((size // 4,), "float32")
        y = cupy.empty_like(x)
        contestants = [
            Contestant("read", lambda: self.read(x)),
            Contestant("driver", lambda: y.data.copy_from_device_async(x.data, size)),
            Contestant("kernel", lambda: cupy.negative(x, y)),
        ]
        for contestant in contestants:
            self.warm(contestant)
        taken = compare(contestants, self.sample, seconds=0.2)
        read, *copies = (statistics.median(times) for times in taken.values())
        return {"copy": 2 * size / min(copies), "read": size / read}


def compare(
    contestants: Sequence[Contestant],
    sample: Callable[[Contestant], float],
    *,
    seconds: float,
    least: int = 5,
    most: int = 40,
) -> dict[str, list[float]]:
    """Sample the contestants in turn until the time is up: the clocks drift for all alike.

    A slow contestant, whose samples differ little, sits out once it has a few.
    """
    taken: dict[str, list[float]] = {c.name: [] for c in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    end = perf_counter() + seconds
    for turn in range(most):
        if turn >= least and perf_counter() > end:
            break
        shuffle(order)  # so that nobody always follows the hottest one
        for contestant in order:
            samples = taken[contestant.name]
            if len(samples) < FEW or sum(samples) < LONG:
                samples.append(sample(contestant))
    return taken
