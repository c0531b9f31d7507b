"""What a plan needs to know of a GPU."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

KB = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU as the planner sees it.

    Parameters
    ----------
    name : str
    arch : int
        Compute capability times ten: the architecture that kernels are planned and compiled for.
    multiprocessors : int
    shared_memory_per_block, shared_memory_per_multiprocessor : int
        In bytes.
    l2_bytes : int
    forced : bool
        True when ``CUFLASH_ARCH`` asks for an older architecture than the GPU's own.
    """

    name: str
    arch: int
    multiprocessors: int
    shared_memory_per_block: int
    shared_memory_per_multiprocessor: int
    l2_bytes: int
    forced: bool = False


# name, multiprocessors, shared memory in KB (a block, a multiprocessor), L2 in MB
_KNOWN = {
    75: ("Turing (T4)", 40, 64, 64, 4),
    80: ("Ampere (A100)", 108, 163, 164, 40),
    86: ("Ampere (A10)", 72, 99, 100, 6),
    87: ("Ampere (Orin)", 16, 163, 164, 4),
    89: ("Ada (L40S)", 142, 99, 100, 96),
    90: ("Hopper (H100)", 132, 227, 228, 50),
    100: ("Blackwell (B200)", 148, 227, 228, 126),
    103: ("Blackwell (B300)", 148, 227, 228, 126),
    110: ("Blackwell (Thor)", 20, 227, 228, 32),
    120: ("Blackwell (RTX 5090)", 170, 99, 100, 96),
    121: ("Blackwell (GB10)", 48, 99, 100, 24),
}


def of_arch(arch: int) -> Gpu:
    """A typical GPU of an architecture, for planning and compiling on a machine without one."""
    if arch not in _KNOWN:
        raise ValueError(f"arch is {arch}; known architectures are {', '.join(map(str, _KNOWN))}")
    name, multiprocessors, block_kb, multiprocessor_kb, l2_mb = _KNOWN[arch]
    return Gpu(name, arch, multiprocessors, block_kb * KB, multiprocessor_kb * KB, l2_mb * KB * KB)


def current() -> Gpu:
    """CuPy's current GPU, seen as the architecture that ``CUFLASH_ARCH`` names, if set."""
    import cupy

    return _of_device(cupy.cuda.runtime.getDevice(), os.environ.get("CUFLASH_ARCH") or None)


@functools.cache
def _of_device(device: int, forced: str | None) -> Gpu:
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(device)
    gpu = Gpu(
        name=found["name"].decode(),
        arch=10 * found["major"] + found["minor"],
        multiprocessors=found["multiProcessorCount"],
        shared_memory_per_block=found["sharedMemPerBlockOptin"],
        shared_memory_per_multiprocessor=found["sharedMemPerMultiprocessor"],
        l2_bytes=found["l2CacheSize"],
    )
    if gpu.arch < 75:
        raise RuntimeError(f"{gpu.name} has compute capability {gpu.arch / 10}; cuflash needs 7.5")
    return gpu if forced is None else _as_older(gpu, forced)


def _as_older(gpu: Gpu, forced: str) -> Gpu:
    if not forced.isdecimal() or int(forced) not in _KNOWN or int(forced) > gpu.arch:
        allowed = ", ".join(str(arch) for arch in _KNOWN if arch <= gpu.arch)
        raise ValueError(f"CUFLASH_ARCH is {forced!r}; this {gpu.name} runs {allowed}")
    model = of_arch(int(forced))
    return replace(
        gpu,
        arch=model.arch,
        shared_memory_per_block=model.shared_memory_per_block,
        shared_memory_per_multiprocessor=model.shared_memory_per_multiprocessor,
        forced=model.arch != gpu.arch,
    )
