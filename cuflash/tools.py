"""Looking at a call without making it: its plan, its compilation, the machine it would run on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import Future, as_completed
from importlib import metadata
from typing import Any

from .jit.launch import Plan, side_by_side

# What a room tells of a call: the GPU it would run on, -1 for NumPy, and its launches.
Planner = Callable[..., tuple[int, list[Plan]]]

_planners: dict[Callable[..., Any], Planner] = {}


def register(function: Callable[..., Any], planner: Planner) -> None:
    """Let `explain` and `warmup` ask `planner` for the plans of a call of `function`."""
    _planners[function] = planner


def explain(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> str:
    """How a call would run: engine, tiles, grid, registers, bytes and why.

    The call is not made; on a GPU its kernels are compiled, to tell their registers.

    Parameters
    ----------
    f : callable
        A function of cuflash, such as ``cuflash.attention``.
    *args, **kwargs
        What it would be called with.

    Returns
    -------
    str
        A few lines for each launch.

    Raises
    ------
    TypeError
        If `f` is not a function of cuflash that runs kernels.
    TypeError, ValueError
        What the call itself would raise for these arguments.

    Examples
    --------
    >>> import cuflash
    >>> import numpy as np
    >>> q = k = v = np.zeros((4, 10, 64), np.float32)
    >>> print(cuflash.explain(cuflash.attention, q, k, v, causal=True))
    attention: NumPy, the same tiles and recurrence as the kernels; no GPU array was passed
    """
    device, plans = _planner(f)(*args, **kwargs)
    if device < 0:
        return (
            f"{f.__qualname__}: NumPy, the same tiles and recurrence as the kernels; "
            "no GPU array was passed"
        )
    with _device(device):
        launches = _launches(f.__qualname__, len(plans))
        return "\n".join([launches, *map(_explained, dict.fromkeys(plans))])


def warmup(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """Compile ahead what a call needs, with a progress bar: the call itself then only launches.

    Needed before a call is captured in a CUDA graph; welcome before a server takes requests.

    Parameters
    ----------
    f : callable
        A function of cuflash, such as ``cuflash.attention``.
    *args, **kwargs
        What it will be called with. Kernels of attention depend on dtypes, head dims, variants
        and whether there is dropout; on Hopper also on whether TMA can read and write the arrays
        where they lie. Those of the softmax family depend on lengths and strides, too.

    Returns
    -------
    int
        The number of kernels that are now loaded; 0 for NumPy arrays, which need none.

    Raises
    ------
    TypeError
        If `f` is not a function of cuflash that runs kernels.
    TypeError, ValueError
        What the call itself would raise for these arguments.
    RuntimeError
        If NVRTC is not there, or the GPU is too old.

    Examples
    --------
    >>> import cuflash
    >>> import numpy as np
    >>> cuflash.warmup(cuflash.softmax, np.zeros((4, 10)))
    0
    """
    device, plans = _planner(f)(*args, **kwargs)
    kernels = list(dict.fromkeys(plans))
    if kernels:
        _load(device, kernels, f.__qualname__)
    return len(kernels)


def show_config() -> None:
    """Print versions, devices, engines and caches: what to send along with a question.

    Examples
    --------
    >>> import cuflash
    >>> cuflash.show_config()  # doctest: +ELLIPSIS
    cuflash ...
    """
    print(f"cuflash {_version('cuflash')}")
    print(f"  Python {platform.python_version()} on {platform.platform()}")
    for name in ("numpy", "cupy-cuda13x", "cupy-cuda12x", "array-api-compat", "ml_dtypes"):
        print(f"  {name} {_version(name)}")
    for line in _gpu_lines():
        print(f"  {line}")
    for name in sorted(name for name in os.environ if name.startswith(("CUFLASH_", "CUPY_"))):
        print(f"  {name}={os.environ[name]}")


def _planner(f: Callable[..., Any]) -> Planner:
    if f not in _planners:
        allowed = ", ".join(f"cuflash.{known.__qualname__}" for known in _planners)
        raise TypeError(f"`f` is {f!r}, which launches nothing of its own; allowed are {allowed}")
    return _planners[f]


def _device(ordinal: int) -> Any:
    import cupy

    return cupy.cuda.Device(ordinal)


def _load(device: int, plans: list[Plan], title: str) -> None:
    """Compile and load the plans' kernels side by side."""
    jobs = [plan.load for plan in plans]
    side_by_side(device, jobs, lambda loading: _with_progress(loading, f"compiling {title}"))


def _with_progress(loading: list[Future[None]], title: str) -> Iterable[Future[None]]:
    """What is done, as it is done; without tqdm, which comes with the extras, there is no bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        return as_completed(loading)
    bar: Iterable[Future[None]] = tqdm(as_completed(loading), title, len(loading), leave=False)
    return bar


def _launches(name: str, count: int) -> str:
    from .jit import gpu

    found = gpu.current()
    forced = ", as CUFLASH_ARCH asks" if found.forced else ""
    launches = "1 launch" if count == 1 else f"{count} launches"
    return f"{name}: {launches} on {found.name}, code for sm_{found.arch}{forced}"


def _explained(plan: Plan) -> str:
    loaded = plan.load()
    constants = ", ".join(f"{name}={value}" for name, value in plan.kernel.constants)
    blocks = " x ".join(str(length) for length in plan.grid)
    lines = {
        "kernel": plan.kernel.file,
        "why": plan.why,
        "constants": constants,
        "grid": f"{blocks} blocks of {plan.threads} threads",
        "shared memory": f"{plan.shared_memory + loaded.shared_size_bytes:,} B a block",
        "registers": f"{loaded.num_regs} a thread, {loaded.local_size_bytes} B spilled",
        "traffic": f"{plan.bytes:,} B",
        "operations": f"{plan.operations:,}",
        "copies": ", ".join(plan.copies) or "none: every argument is used in place",
    }
    return "\n".join(f"  {name:14} {value}" for name, value in lines.items())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu_lines() -> list[str]:
    """What CuPy finds, or why it finds nothing."""
    try:
        import cupy
    except ImportError as error:
        return [f"no CuPy, so NumPy only: {error}"]
    from .jit import gpu

    lines = []
    try:
        lines.append("NVRTC {}.{}".format(*cupy.cuda.nvrtc.getVersion()))
    except (RuntimeError, ImportError, OSError):
        lines.append("no NVRTC: pip install 'cuflash[cuda13]' or 'cuflash[cuda12]'")
    lines.append(f"kernel cache {os.environ.get('CUPY_CACHE_DIR', '~/.cupy/kernel_cache')}")
    if not cupy.cuda.is_available():
        return [*lines, "no GPU: NumPy only"]
    driver = cupy.cuda.runtime.driverGetVersion()
    lines.append(f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}")
    for device in range(cupy.cuda.runtime.getDeviceCount()):
        try:
            with cupy.cuda.Device(device):
                found = gpu.current()
        except (RuntimeError, ValueError) as error:  # too old, or CUFLASH_ARCH makes no sense
            lines.append(f"GPU {device}: {error}")
            continue
        lines.append(
            f"GPU {device}: {found.name}, code for sm_{found.arch}, "
            f"{found.multiprocessors} multiprocessors, portable engine"
        )
    return lines
