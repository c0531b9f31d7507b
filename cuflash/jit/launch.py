"""Plans, and launching them."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import compile, gpu
from .source import Kernel

if TYPE_CHECKING:
    import cupy
    import numpy as np

_thread = threading.local()  # its recording, if there is one


@dataclass(frozen=True)
class Plan:
    """One launch: which kernel, on what grid, and why.

    Parameters
    ----------
    kernel : Kernel
    grid : tuple of int
        Blocks along x, y and z.
    threads : int
        Threads a block.
    shared_memory : int
        Dynamic shared memory in bytes a block.
    bytes, operations : int
        Device memory that must move, and floating-point operations, by the algorithm's count.
    why : str
        What made the planner choose this, with its measurement where one decided.
    copies : tuple of str
        Arguments that cannot be used in place and are copied once.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int
    bytes: int
    operations: int
    why: str
    copies: tuple[str, ...] = ()

    def __str__(self) -> str:
        grid = " x ".join(map(str, self.grid))
        return f"{self.kernel} grid {grid}, {self.threads} threads, {self.shared_memory} B shared"

    def load(self) -> cupy.RawKernel:
        """The compiled kernel on the current device."""
        return compile.load(self.kernel, gpu.current(), self.shared_memory)


def load(plans: Sequence[Plan]) -> None:
    """Compile those of a call's kernels that are new side by side, if that is more than one."""
    new = [plan for plan in plans if not compile.known(plan.kernel)]
    if len(new) > 1:
        import cupy

        jobs = [functools.partial(_load, plan) for plan in new]
        side_by_side(cupy.cuda.runtime.getDevice(), jobs)


def _load(plan: Plan) -> None:
    compile.load(plan.kernel, gpu.current(), plan.shared_memory)


def side_by_side(
    device: int,
    jobs: Sequence[Callable[[], object]],
    watched: Callable[[list[Future[None]]], Iterable[Future[None]]] = iter,
) -> None:
    """Do jobs in threads of their own with a device as the current one; the first error is raised.

    `watched` goes through what is under way, as it is done.
    """
    import cupy

    def do(job: Callable[[], object]) -> None:
        with cupy.cuda.Device(device):
            job()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in watched([pool.submit(do, job) for job in jobs]):
            done.result()


@dataclass(frozen=True)
class Launch:
    """A launch that was made.

    Parameters
    ----------
    plan : Plan
    params : ndarray
        The argument as it was then.
    workspaces : int
        How many the call had asked for by then.
    """

    plan: Plan
    params: np.ndarray
    workspaces: int


class Recording:
    """What this thread launches in a ``with`` block, and the workspaces that it asks for there."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.workspaces: list[cupy.ndarray] = []  # alive, so that no two are at one address

    def __enter__(self) -> Recording:
        self._before = getattr(_thread, "recording", None)
        _thread.recording = self
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.recording = self._before


def workspace(nbytes: int) -> cupy.ndarray | None:
    """Memory for what one launch of a call leaves for the next, None for 0 bytes.

    It goes back to CuPy's pool with its last reference; the pool hands it on in the order of the
    stream. A captured graph owns its workspace: memory that is asked for in a capture is kept.
    """
    if not nbytes:
        return None
    import cupy

    from ..gpu_arrays import kept

    memory = kept(cupy.ndarray(nbytes, "uint8"))
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.workspaces.append(memory)
    return memory


def launch(plan: Plan, params: np.ndarray) -> None:
    """Launches on CuPy's current device and stream.

    Parameters
    ----------
    plan : Plan
    params : ndarray
        One element of the dtype that mirrors the kernel's ``Params``; the driver copies it.
    """
    from cupy.cuda.function import CPointer

    if 0 in plan.grid:
        return
    arguments = (CPointer(params.ctypes.data),)
    plan.load()(plan.grid, (plan.threads,), arguments, shared_mem=plan.shared_memory)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.launches.append(Launch(plan, params.copy(), len(recording.workspaces)))
