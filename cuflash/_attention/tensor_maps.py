"""What Hopper's copy engine must be told of an array: its address, sizes, strides and tile.

CUDA Driver API, "Tensor Map Object Management": cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence

import numpy as np

BOX = 64  # columns of 16 bits: rows of 128 bytes, which are swizzled
_AXES = 5
_BYTES, _ALIGNMENT = 128, 64
_MOST_STRIDE = 1 << 40
_TYPES = {"float16": 6, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_128, _ZEROS_OUTSIDE = 0, 3, 2, 0
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT

# The address is a word of its own, so that a repeated call can write another one there.
MAP = np.dtype([("address", "u8"), ("rest", f"V{_BYTES - 8}")])


def encode(
    dtype: str, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> np.void:
    """The map of an array whose tiles are boxes of BOX columns.

    Parameters
    ----------
    dtype : str
        "float16" or "bfloat16".
    address : int
        Of the first element, a multiple of 16.
    sizes : sequence of int
        Columns, rows, and three more axes.
    strides : sequence of int
        Of all of them but the columns, in bytes: positive multiples of 16.
    box : sequence of int
        What a tile has of each, but for the columns.
    """
    if not _address_is_first():
        raise RuntimeError("the driver's tensor maps do not begin with the address")
    return _encode(dtype, address, tuple(sizes), tuple(strides), tuple(box))


def fits(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether `encode` takes an array of these sizes, with these strides in bytes."""
    return all(0 < size < 2**32 for size in sizes) and all(
        0 < stride < _MOST_STRIDE and stride % 16 == 0 for stride in strides
    )


@functools.lru_cache(maxsize=1024)
def _encode(
    dtype: str,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> np.void:
    memory = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    begin = -ctypes.addressof(memory) % _ALIGNMENT
    words64, words32 = ctypes.c_uint64 * _AXES, ctypes.c_uint32 * _AXES
    encode = functools.partial(
        _driver().cuTensorMapEncodeTiled,
        ctypes.c_void_p(ctypes.addressof(memory) + begin),
        _TYPES[dtype],
        _AXES,
        ctypes.c_void_p(address),
        words64(*sizes),
        words64(*strides),
        words32(BOX, *box),
        words32(1, 1, 1, 1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE_128,
        _PROMOTE_128,
        _ZEROS_OUTSIDE,
    )
    error = encode()
    if error == _NO_CONTEXT:  # in a new thread, which gets one with its first call of the runtime
        import cupy

        cupy.cuda.Device().use()
        error = encode()
    if error:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled gave error {error} for sizes {sizes} and strides {strides}"
        )
    return np.frombuffer(memory.raw[begin : begin + _BYTES], MAP)[0]


@functools.cache
def _address_is_first() -> bool:
    """Whether maps of different addresses differ in their first word alone: the address."""
    addresses = 1 << 20, (1 << 44) + (1 << 30) + 16
    sizes, strides = (64, 8, 1, 1, 1), (128, 1024, 1024, 1024)
    box = 8, 1, 1, 1
    one, other = (_encode("float16", address, sizes, strides, box) for address in addresses)
    return (int(one["address"]), int(other["address"])) == addresses and (
        one["rest"].tobytes() == other["rest"].tobytes()
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
