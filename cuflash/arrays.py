"""Whatever arrays come in, arrays of one library go on; the answer goes back as the kind that came.

Below this module there are only `numpy.ndarray` (the NumPy twin runs) and `cupy.ndarray` (the CUDA
kernels run). Imports copy nothing and keep the strides::

    caller, native = arrays.take({"q": q, "k": k, "v": v, "out": out})
    with caller:  # makes current the device and the stream that the work belongs on
        result = caller.empty(shape, native["q"].dtype)
        ...
    return caller.give(result)

One class stands for each kind of array and place: `HostTorch` here, `GpuTorch` in gpu_arrays.py
and so on. Recognising an array imports nothing, for its library is there already; only CuPy is
imported, with the first array on a GPU.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array, is_jax_array, is_torch_array

NativeArray = Any  # numpy.ndarray, or cupy.ndarray where CuPy is installed

# The dtypes that pass, with their names; ml_dtypes.bfloat16 joins when its first array comes in.
_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_NAMES: dict[Any, str] = {
    np.dtype(name): name for name in ["bool", *_INTEGERS, "float16", "float32", "float64"]
}


def take(
    arguments: Mapping[str, object],
    *,
    outputs: Collection[str] = ("out",),
    sequences: bool = False,
) -> tuple[Caller, dict[str, NativeArray]]:
    """Turn the arrays of one call into native ones.

    Parameters
    ----------
    arguments
        Argument name -> what was passed; None stays None.
    outputs
        The names among them that will be written to.
    sequences
        Whether lists, tuples and numbers are taken too; they become NumPy arrays.

    Returns
    -------
    caller : Caller
        Gives answers back as the kind that came in.
    native : dict
        Argument name -> `numpy.ndarray` or `cupy.ndarray` over the same memory.

    Raises
    ------
    TypeError
        Something is no array, cannot be used as it is, or is of another kind or on another device
        than the rest.
    ValueError
        An output is read-only, or several of its elements are one place in memory.
    """
    caller: Caller | None = None
    native: dict[str, NativeArray] = dict.fromkeys(arguments)
    for name, value in arguments.items():
        if value is None:
            continue
        kind = _EXACT.get(type(value)) or _kind_of(name, value, sequences)
        native[name] = array = kind.load(name, value, name in outputs)
        if array.dtype not in _NAMES:
            check_dtype(name, array.dtype)
        device = kind.device_of(array)
        if caller is None:
            caller, first = kind(device, value), name
        elif type(caller) is not kind or caller.device != device:
            raise TypeError(
                f"`{name}` is {kind.describe(device)}, but `{first}` is "
                f"{caller.describe(caller.device)}; all arrays of a call must be of one kind and "
                "on one device: convert one of them"
            )
        if name in outputs:
            _check_output(name, array, kind)
            caller._originals[id(array)] = array, value
    if caller is None:
        raise TypeError(f"no array was passed: {', '.join(f'`{name}`' for name in arguments)}")
    caller._taken = tuple(native.values())
    return caller, native


def dtype_name(dtype: Any) -> str:
    """Name a dtype: "float16", "bfloat16", "float32" and so on."""
    return _NAMES.get(dtype) or np.dtype(dtype).name


def may_share_memory(a: NativeArray, b: NativeArray) -> bool:
    """Tell whether the byte ranges that two native arrays span overlap.

    Exact for the ranges; arrays that interleave without sharing an element count as overlapping.
    """
    if not a.size or not b.size or isinstance(a, np.ndarray) != isinstance(b, np.ndarray):
        return False
    (a_first, a_end), (b_first, b_end) = _byte_range(a), _byte_range(b)
    return a_first < b_end and b_first < a_end


def _byte_range(a: NativeArray) -> tuple[int, int]:
    first = a.__array_interface__["data"][0] if isinstance(a, np.ndarray) else a.data.ptr
    end = first + a.itemsize
    for length, stride in zip(a.shape, a.strides):
        first += min(0, stride * (length - 1))
        end += max(0, stride * (length - 1))
    return first, end


def checks_on_gpu() -> bool:
    """Whether ``CUFLASH_CHECK=1`` asks for values in GPU arrays to be checked, which waits.

    Without it they are never trusted, but not looked at either. NumPy arrays are always checked.
    """
    return os.environ.get("CUFLASH_CHECK") == "1"


class Caller:
    """The kind of array that came in, and the way back to it.

    As a context it makes current the device and the stream that the work belongs on.

    Attributes
    ----------
    kind : str
        "numpy", "cupy", "torch", "jax", "numba" or "dlpack".
    on_gpu : bool
        Whether the native arrays are CuPy's.
    device : int
        The GPU's ordinal; -1 on the host.
    """

    kind: str
    on_gpu = False

    def __init__(self, device: int, first: Any) -> None:
        self.device = device
        self._first = first
        self._taken: tuple[NativeArray, ...] = ()
        # id of a native array -> the array, so that the id stays its own, and the caller's object.
        self._originals: dict[int, tuple[NativeArray, Any]] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NativeArray:
        """Allocate a native array, uninitialised; on a GPU, inside the `with` block."""
        return np.empty(shape, dtype)

    def keep(self, native: NativeArray) -> NativeArray:
        """Return an intermediate array; on a GPU it outlives the call if a graph is captured."""
        return native

    def converted(self, native: NativeArray, dtype: str) -> NativeArray:
        """The array in the dtype of this name: itself, or an intermediate array."""
        if dtype_name(native.dtype) == dtype:
            return native
        return self.keep(native.astype(np.dtype(dtype)))

    def give(self, native: NativeArray) -> Any:
        """Hand a native array back as the caller's kind, without a copy.

        An output that the caller passed comes back as the very object that was passed.
        """
        original = self._originals.get(id(native))
        return original[1] if original else self._wrap(native)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        """Turn argument `name` into a native array, or say in a TypeError what to do."""
        raise NotImplementedError

    @staticmethod
    def device_of(native: NativeArray) -> int:
        return -1

    @classmethod
    def describe(cls, device: int) -> str:
        return f"a {cls.kind} array on {f'GPU {device}' if cls.on_gpu else 'the host'}"

    def _wrap(self, native: NativeArray) -> Any:
        return native


class HostNumPy(Caller):
    """NumPy arrays and subclasses; lists, tuples and numbers where they are welcome."""

    kind = "numpy"

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        if type(value) is not np.ndarray:
            if isinstance(value, np.ma.MaskedArray):
                raise TypeError(f"`{name}` is a masked array; pass `{name}.filled(...)`")
            if isinstance(value, np.matrix):
                raise TypeError(f"`{name}` is a numpy.matrix; pass `numpy.asarray({name})`")
            if output and not isinstance(value, np.ndarray):
                raise TypeError(f"`{name}` is a {type(value).__name__}; an output must be an array")
            value = np.asarray(value)
        if not value.dtype.isnative and (dtype := value.dtype.newbyteorder()) in _NAMES:
            if output:
                raise TypeError(f"`{name}` has dtype {value.dtype.str}; an output must be {dtype}")
            return value.astype(dtype)
        return value


class HostTorch(Caller):
    """PyTorch tensors on the CPU."""

    kind = "torch"

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        dtype = check_torch(name, value)
        if dtype_name(dtype) == "bfloat16":  # which torch.Tensor.numpy() does not know
            return value.detach().view(sys.modules["torch"].int16).numpy().view(dtype)
        return value.detach().numpy()

    def _wrap(self, native: NativeArray) -> Any:
        torch = sys.modules["torch"]
        if dtype_name(native.dtype) == "bfloat16":
            return torch.from_numpy(native.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(native)


class HostJax(Caller):
    """JAX arrays on the CPU. 64-bit answers become 32-bit unless `jax_enable_x64` is on."""

    kind = "jax"

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        return np.asarray(value)

    def _wrap(self, native: NativeArray) -> Any:
        return sys.modules["jax"].device_put(native, self._first.device)


class HostDLPack(Caller):
    """Other host arrays that speak DLPack; answers are NumPy arrays."""

    kind = "dlpack"

    @staticmethod
    def load(name: str, value: Any, output: bool) -> NativeArray:
        return from_dlpack(name, value, np)


# Exact types known at one look; cupy.ndarray joins with the first array on a GPU.
_EXACT: dict[type, type[Caller]] = {np.ndarray: HostNumPy}


def _kind_of(name: str, value: Any, sequences: bool) -> type[Caller]:
    if isinstance(value, np.ndarray):
        return HostNumPy
    if is_torch_array(value):
        return _gpu().GpuTorch if value.is_cuda else HostTorch
    if is_cupy_array(value):
        return _gpu().GpuCuPy
    if is_jax_array(value):
        if isinstance(value, sys.modules["jax"].core.Tracer):
            raise TypeError(f"`{name}` is a JAX tracer; call outside jax.jit, jax.grad, jax.vmap")
        check_dtype(name, value.dtype)  # random keys and the like are no arrays to anyone else
        return _gpu().GpuJax if _dlpack_on_gpu(name, value) else HostJax
    if getattr(value, "__cuda_ndarray__", False):
        return _gpu().GpuNumba
    if sequences and isinstance(value, list | tuple | int | float | complex | np.generic):
        return HostNumPy
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _gpu().GpuDLPack if _dlpack_on_gpu(name, value) else HostDLPack
    if hasattr(value, "__cuda_array_interface__"):
        return _gpu().GpuDLPack
    raise TypeError(
        f"`{name}` is a {type(value).__name__}, not an array; pass a NumPy, CuPy, PyTorch, JAX or "
        "Numba array, or any object with DLPack or the CUDA array interface"
    )


@functools.cache
def _gpu() -> Any:
    """Import what GPU arrays need, CuPy above all."""
    try:
        from . import gpu_arrays
    except ImportError as error:
        raise ImportError(
            "arrays on a GPU need CuPy: pip install 'cuflash[cuda13]' (or 'cuflash[cuda12]')"
        ) from error
    _EXACT[gpu_arrays.cp.ndarray] = gpu_arrays.GpuCuPy
    return gpu_arrays


# Checks


def check_dtype(name: str, dtype: Any) -> None:
    if str(dtype) == "bfloat16":
        _NAMES[dtype] = "bfloat16"
    elif dtype not in _NAMES:
        raise _unsupported(name, dtype)


def _unsupported(name: str, dtype: Any) -> TypeError:
    return TypeError(
        f"`{name}` has dtype {dtype}; allowed are bool, integers of 8 to 64 bits, float16, "
        "bfloat16, float32 and float64: convert it first"
    )


def _check_output(name: str, array: NativeArray, kind: type[Caller]) -> None:
    if kind.kind == "jax":
        raise TypeError(f"`{name}` is a JAX array, which is immutable; leave `{name}` out")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"`{name}` is read-only; an output must be writable")
    if _overlaps_itself(array):
        raise ValueError(
            f"`{name}` must have memory of its own for every element, but its shape is "
            f"{array.shape} and its strides are {array.strides}"
        )


def _overlaps_itself(array: NativeArray) -> bool:
    """Whether some axis steps by less than what the axes inside it cover."""
    covered = array.itemsize
    walked = [(abs(s), n) for s, n in zip(array.strides, array.shape) if n > 1]
    for stride, length in sorted(walked) if array.size else ():
        if stride < covered:
            return True
        covered += stride * (length - 1)
    return False


def check_torch(name: str, tensor: Any) -> np.dtype:
    """Check that the tensor is plain memory, and find its dtype."""
    torch = sys.modules["torch"]
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"`{name}` requires grad, which cuflash does not record; pass `{name}.detach()`, or "
            "call under torch.no_grad()"
        )
    if not tensor.is_cuda and tensor.device.type != "cpu":
        raise TypeError(f"`{name}` is on {tensor.device}; allowed are the CPU and CUDA devices")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_neg():
        raise TypeError(
            f"`{name}` is sparse, nested or a lazy negative; pass an ordinary tensor, made by "
            "to_dense(), to_padded_tensor() or resolve_neg()"
        )
    try:
        has_memory = tensor.data_ptr() or not tensor.numel()
    except RuntimeError:
        has_memory = False
    if not has_memory:
        raise TypeError(
            f"`{name}` has no memory of its own (a wrapper, or inside a torch.func transform or "
            "torch.compile); pass an ordinary tensor"
        )
    if dtype := _dtype_of_torch(tensor.dtype):
        return dtype
    raise _unsupported(name, tensor.dtype)


@functools.cache
def _dtype_of_torch(dtype: Any) -> np.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError("bfloat16 needs ml_dtypes: pip install ml_dtypes") from error
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name) if name in _NAMES.values() else None


# Imports


def _dlpack_on_gpu(name: str, value: Any) -> bool:
    try:
        place = int(value.__dlpack_device__()[0])
    except BufferError as error:  # JAX: spread over several devices, or on a TPU
        raise TypeError(f"`{name}` cannot be used in place: {error}") from error
    if place in (1, 3):  # kDLCPU, kDLCUDAHost
        return False
    if place in (2, 13):  # kDLCUDA, kDLCUDAManaged
        return True
    raise TypeError(f"`{name}` is on DLPack device {place}; allowed are CPU and CUDA (1, 2, 3, 13)")


def from_dlpack(name: str, value: Any, library: Any) -> NativeArray:
    try:
        return library.from_dlpack(value)
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"`{name}` cannot be imported through DLPack: {error}") from error
