"""Source + constants + architecture -> a kernel that can be launched."""

from __future__ import annotations

import functools
import re
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import source
from .gpu import Gpu
from .source import Kernel

if TYPE_CHECKING:
    import cupy

# CuPy appends the same two to every compilation of its own.
_OPTIONS = ("--std=c++17", "-ftz=true")
_FIRST_EXACT = 12, 9  # NVRTC
_STATIC_LIMIT = 48 * 1024  # bytes of shared memory a kernel gets without asking

_kernels: dict[tuple[Kernel, Gpu, int, int], cupy.RawKernel] = {}
_compiled: set[Kernel] = set()
_lock = threading.Lock()
_nvrtc_is_open = False
_in_progress: dict[tuple[Kernel, Gpu, int, int], threading.Lock] = {}


def load(kernel: Kernel, gpu: Gpu, shared_memory: int) -> cupy.RawKernel:
    """The kernel, compiled for `gpu` and loaded on CuPy's current device.

    Kept in memory for the process, and by CuPy on disk. Threads that ask for the same kernel wait
    for one compilation; different kernels compile side by side.
    """
    import cupy

    key = (kernel, gpu, cupy.cuda.runtime.getDevice(), shared_memory)
    loaded = _kernels.get(key)
    if loaded is not None:
        return loaded
    with _lock:
        turn = _in_progress.setdefault(key, threading.Lock())
    with turn:
        if key not in _kernels:
            _kernels[key] = _load(kernel, gpu, shared_memory)
            _compiled.add(kernel)
    return _kernels[key]


def known(kernel: Kernel) -> bool:
    """Whether some device has the kernel in this process."""
    return kernel in _compiled


def _load(kernel: Kernel, gpu: Gpu, shared_memory: int) -> cupy.RawKernel:
    import cupy

    _open_nvrtc()
    if gpu.forced:
        module = _load_as_older(kernel, gpu.arch)
    else:
        # CuPy appends an -arch without the letter; NVRTC 12.9 and later heed the letter.
        options = (f"-arch={_target(kernel, gpu.arch)}",) if kernel.exact else ()
        module = cupy.RawModule(code=source.text(kernel), options=options)
    loaded = module.get_function(kernel.entry)
    if shared_memory > _STATIC_LIMIT:
        loaded.max_dynamic_shared_size_bytes = shared_memory
    return loaded


def _load_as_older(kernel: Kernel, arch: int) -> cupy.RawModule:
    """The PTX of an older architecture, which the driver turns into code for this GPU.

    CuPy's own compilation cannot do this: it appends its `-arch`, and the last one wins.
    """
    import cupy

    ptx, _ = _nvrtc(kernel, f"-arch=compute_{arch}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_bytes(ptx)
        module = cupy.RawModule(path=str(path))
        module.get_function(kernel.entry)  # loads the file while it is there
    return module


def _target(kernel: Kernel, arch: int) -> str:
    return f"sm_{arch}a" if kernel.exact else f"sm_{arch}"


@functools.cache
def takes_exact() -> bool:
    """Whether the installed NVRTC compiles kernels for one architecture exactly, by CuPy's way."""
    from cupy.cuda import nvrtc

    _open_nvrtc()
    return bool(nvrtc.getVersion() >= _FIRST_EXACT)


@dataclass(frozen=True)
class Cubin:
    """What the assembler of one architecture reported."""

    log: str
    registers: int
    spills: int  # bytes a thread, stores and loads
    static_shared_memory: int  # bytes a block


def cubin(kernel: Kernel, arch: int, also: str = "") -> Cubin:
    """Compiles for an architecture without loading: needs NVRTC, but no GPU and no driver.

    `also` is put behind the source: a test's static_assert, for one.
    """
    # NVRTC keeps a cache of its own, and a hit reports nothing.
    _, log = _nvrtc(
        kernel, f"-arch={_target(kernel, arch)}", "--ptxas-options=-v", "--no-cache", also=also
    )
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(f"NVRTC reported no register count for {kernel}:\n{log}")
    spills = re.findall(r"(\d+) bytes spill", log)
    static = re.search(r"(\d+) bytes smem", log)
    return Cubin(
        log=log,
        registers=int(registers[1]),
        spills=sum(map(int, spills)),
        static_shared_memory=int(static[1]) if static else 0,
    )


def _nvrtc(kernel: Kernel, arch: str, *options: str, also: str = "") -> tuple[bytes, str]:
    """PTX for `-arch=compute_XX`, a cubin for `-arch=sm_XX`, and the log."""
    from cupy.cuda import nvrtc

    _open_nvrtc()
    program = nvrtc.createProgram(source.text(kernel) + also, kernel.file, (), ())
    try:
        nvrtc.compileProgram(program, (arch, *_OPTIONS, *options))
        code = nvrtc.getPTX(program) if "compute" in arch else nvrtc.getCUBIN(program)
        return code, nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{kernel} does not compile with {arch}:\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _open_nvrtc() -> None:
    """Make sure that NVRTC is there and ready for several threads at a time.

    Its first compilation opens a second library, and two that do so at once can fail: one of them
    goes ahead alone, on an empty source.
    """
    global _nvrtc_is_open
    from cupy.cuda import nvrtc

    with _lock:
        if _nvrtc_is_open:
            return
        try:
            nvrtc.getVersion()
        except (RuntimeError, ImportError, OSError) as error:
            raise RuntimeError(
                "cuflash compiles its kernels with NVRTC, which was not found; "
                "install it with: pip install 'cuflash[cuda13]', or cuflash[cuda12] for CUDA 12"
            ) from error
        program = nvrtc.createProgram("", "empty.cu", (), ())
        nvrtc.compileProgram(program, ())
        nvrtc.destroyProgram(program)
        _nvrtc_is_open = True
