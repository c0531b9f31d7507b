"""The kinds of arrays on a GPU; imported with the first of them, because it imports CuPy."""

from __future__ import annotations

import functools
import math
import sys
from collections import deque
from typing import Any

import cupy as cp
import numpy as np

from .arrays import Caller, NativeArray, check_dtype, check_torch, dtype_name, from_dlpack


class GpuCuPy(Caller):
    """CuPy arrays: the work runs on their device, on CuPy's current stream there."""

    kind = "cupy"
    on_gpu = True

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NativeArray:
        return cp.ndarray(shape, dtype)

    def keep(self, native: NativeArray) -> NativeArray:
        return kept(native)

    def __enter__(self) -> Caller:
        self._device_before = cp.cuda.runtime.getDevice()
        if self._device_before != self.device:
            cp.cuda.runtime.setDevice(self.device)
        try:
            self._enter_stream()
        except BaseException:
            cp.cuda.runtime.setDevice(self._device_before)
            raise
        if _in_use:
            _release_finished()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._leave_stream()
        finally:
            if self._device_before != self.device:
                cp.cuda.runtime.setDevice(self._device_before)

    def _enter_stream(self) -> None:
        pass

    def _leave_stream(self) -> None:
        pass

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        return value if type(value) is cp.ndarray else value.view(type=cp.ndarray)

    @staticmethod
    def device_of(native: NativeArray) -> int:
        return native.data.device_id


class GpuTorch(GpuCuPy):
    """PyTorch tensors on a GPU: PyTorch's current stream, outputs from PyTorch's allocator.

    So memory lives and is reused as with any of PyTorch's own operators.
    """

    kind = "torch"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NativeArray:
        torch = sys.modules["torch"]
        device = torch.device("cuda", self.device)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype_name(dtype)), device=device)
        native = _view(tensor, np.dtype(dtype))
        self._originals[id(native)] = native, tensor
        return native

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        return _view(value, check_torch(name, value))

    def _wrap(self, native: NativeArray) -> Any:
        for kept, tensor in self._originals.values():
            if kept.data.mem is native.data.mem:  # so is PyTorch's, and must stay known as such
                size = native.itemsize
                strides = [stride // size for stride in native.strides]
                offset = (native.data.ptr - kept.data.ptr) // size
                return tensor.as_strided(native.shape, strides, tensor.storage_offset() + offset)
        return sys.modules["torch"].from_dlpack(native)

    def _enter_stream(self) -> None:
        stream = sys.modules["torch"].cuda.current_stream(self.device)
        self._stream = _borrowed_stream(stream.cuda_stream)
        self._stream.__enter__()

    def _leave_stream(self) -> None:
        self._stream.__exit__(None, None, None)


class GpuDLPack(GpuCuPy):
    """Other GPU arrays with DLPack or the CUDA array interface; answers are CuPy arrays.

    Their libraries know nothing of CuPy's streams and may reuse memory once it is let go. So what
    came in stays referenced until the work launched on it is done.
    """

    kind = "dlpack"

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        if hasattr(value, "__dlpack__"):
            return from_dlpack(name, value, cp)
        return _from_interface(name, value, output)

    def _leave_stream(self) -> None:
        if not capturing():  # a captured graph outlives the call: its owner keeps the arrays
            event = cp.cuda.Event(disable_timing=True)
            event.record()
            _in_use.append((event, self._taken))


class GpuJax(GpuDLPack):
    """JAX arrays on a GPU. 64-bit answers become 32-bit unless `jax_enable_x64` is on."""

    kind = "jax"

    def _wrap(self, native: NativeArray) -> Any:
        with cp.cuda.Device(self.device):  # JAX waits for CuPy's current stream there
            return sys.modules["jax"].numpy.from_dlpack(native)


class GpuNumba(GpuDLPack):
    """Numba device arrays; an answer is bound to the stream that it was computed on."""

    kind = "numba"

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        return _from_interface(name, value, output)

    def _wrap(self, native: NativeArray) -> Any:
        with cp.cuda.Device(self.device):
            return sys.modules["numba.cuda"].as_cuda_array(native, sync=False)


def _from_interface(name: str, value: Any, output: bool) -> NativeArray:
    """Import through the CUDA array interface; CuPy's own import would wait for the producer."""
    interface = value.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError(f"`{name}` has a mask; pass an array without one")
    pointer, read_only = interface["data"]
    if output and read_only:
        raise ValueError(f"`{name}` is read-only; an output must be writable")
    dtype = np.dtype(interface["typestr"])
    check_dtype(name, dtype)
    device = -1 if pointer else cp.cuda.runtime.getDevice()  # -1: CuPy asks the driver whose it is
    array = _borrow(value, pointer, device, interface["shape"], dtype, interface.get("strides"))
    with cp.cuda.Device(array.data.device_id):
        # Without a stream it is the legacy default one, where Numba works unless told otherwise.
        _wait_for(interface.get("stream") or cp.cuda.runtime.streamLegacy)
    return array


def _view(tensor: Any, dtype: np.dtype) -> NativeArray:
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    return _borrow(
        tensor, tensor.data_ptr(), tensor.device.index, tuple(tensor.shape), dtype, strides
    )


def _borrow(
    owner: object,
    pointer: int,
    device: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    strides: tuple[int, ...] | None,
) -> NativeArray:
    """Make a CuPy array of memory that `owner` holds."""
    memory = cp.cuda.UnownedMemory(pointer, math.prod(shape) * dtype.itemsize, owner, device)
    return cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(memory, 0), strides)


# Streams


class _Stream:
    """A stream known by its pointer alone, in the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.lru_cache
def _borrowed_stream(pointer: int) -> Any:
    # PyTorch's 0 is the legacy default stream; CuPy's may be the per-thread one.
    return cp.cuda.Stream.from_external(_Stream(pointer or cp.cuda.runtime.streamLegacy))


def capturing() -> bool:
    """Tell whether a graph is being captured here, where no event may be asked or waited for."""
    stream = cp.cuda.get_current_stream()
    return stream.ptr not in (0, cp.cuda.runtime.streamLegacy) and stream.is_capturing()


_captured: list[Any] = []


def kept(intermediate: Any) -> Any:
    """Return memory that only cuflash knows, after noting it for good if a graph is captured.

    The graph may be launched at any time, and its memory must not be another's by then.
    """
    if isinstance(intermediate, (cp.ndarray, cp.cuda.MemoryPointer)) and capturing():
        _captured.append(intermediate)
    return intermediate


def _wait_for(producer: int) -> None:
    """Let CuPy's current stream wait for another one; the host does not wait."""
    current = cp.cuda.get_current_stream()
    if producer != (current.ptr or cp.cuda.runtime.streamLegacy) and not capturing():
        event = cp.cuda.Event(disable_timing=True)
        cp.cuda.runtime.eventRecord(event.ptr, producer)
        current.wait_event(event)


# What kernels may still be reading: an event recorded after the launch, and the arrays.
_in_use: deque[tuple[Any, tuple[NativeArray, ...]]] = deque()


def _release_finished() -> None:
    """Let go of arrays whose kernels are done: the oldest few, so that a call stays cheap.

    Each entry is popped before it is looked at, so threads need no lock; and a destructor that it
    sets off may call cuflash again.
    """
    if capturing():
        return
    for _ in range(min(len(_in_use), 8)):
        try:
            event, arrays = _in_use.popleft()
        except IndexError:  # another thread was faster
            return
        if not event.done:
            _in_use.append((event, arrays))
