"""The short way of a call that was made before: a look-up, the outputs, one launch.

Checks and planning depend on shapes, strides, dtypes, alignment, options and the device, and on
nothing else. All of these are the key; under it stands a launch that lacks only its pointers.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from ctypes import addressof, create_string_buffer
from typing import TYPE_CHECKING, Any

from .problem import Operands, Problem

if TYPE_CHECKING:
    import cupy as cp

_MOST = 4096  # calls remembered before all are forgotten: lengths that never recur must not pile up

Key = tuple[Any, ...]

_bound: dict[Key, Bound] = {}
_thread = threading.local()


def key(q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> Key | None:
    """All that decides about a call but its pointers; None for what must go the long way."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not type(q) is type(k) is type(v) is cupy.ndarray:
        return None
    found = (*map(_array, (q, k, v)), options, *map(type, options))
    key = (cupy.cuda.runtime.getDevice(), os.environ.get("CUFLASH_ARCH"), *found)
    try:
        hash(key)
    except TypeError:  # an array among the options
        return None
    return key


def _array(array: cp.ndarray) -> Key:
    memory = array.data
    return array.shape, array.strides, array.dtype, memory.ptr % 16, memory.device_id


def repeat(key: Key, q: cp.ndarray, k: cp.ndarray, v: cp.ndarray) -> tuple[Any, Any] | None:
    """(out, lse or None) of a call remembered under this key, or None if there is none."""
    bound = _bound.get(key)
    return None if bound is None else bound(q, k, v)


def remember(key: Key, problem: Problem, operands: Operands) -> None:
    """Keep a call that has just been made, if pointers are all that another one changes."""
    from . import gpu

    if operands.q.device.id != key[0]:
        return
    found = gpu.bound(problem, operands)
    if found is None:
        return
    if len(_bound) >= _MOST:
        _bound.clear()
    _bound[key] = Bound(problem, operands, *found)


class Bound:
    """A launch that lacks only its pointers."""

    def __init__(self, problem: Problem, operands: Operands, plan: Any, params: Any) -> None:
        import cupy
        from cupy.cuda.function import CPointer

        first = 1 if operands.one_head else 0
        self.empty, self.pointer = cupy.empty, CPointer
        self.out = problem.out_shape[first:], operands.out.dtype
        self.lse = (problem.lse_shape[first:], operands.lse.dtype) if problem.return_lse else None
        self.kernel, self.params = plan.load(), params.tobytes()
        self.shape = plan.grid, (plan.threads,)
        self.shared_memory = plan.shared_memory
        offsets = {name: params.dtype.fields[name][1] for name in ("q", "k", "v", "out", "lse")}
        self.q_at, self.k_at, self.v_at, self.out_at, self.lse_at = offsets.values()

    def __call__(self, q: cp.ndarray, k: cp.ndarray, v: cp.ndarray) -> tuple[Any, Any]:
        out = self.empty(*self.out)
        lse = self.empty(*self.lse) if self.lse else None
        buffer = _buffer(len(self.params))
        buffer[: len(self.params)] = self.params
        pack = struct.pack_into
        pack("Q", buffer, self.q_at, q.data.ptr)
        pack("Q", buffer, self.k_at, k.data.ptr)
        pack("Q", buffer, self.v_at, v.data.ptr)
        pack("Q", buffer, self.out_at, out.data.ptr)
        if lse is not None:
            pack("Q", buffer, self.lse_at, lse.data.ptr)
        arguments = (self.pointer(addressof(buffer)),)
        self.kernel(*self.shape, arguments, shared_mem=self.shared_memory)
        return out, lse


def _buffer(size: int) -> Any:
    """This thread's own memory for a kernel's argument, which the driver copies at the launch."""
    buffer = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _thread.buffer = create_string_buffer(max(size, 1024))
    return buffer
