"""Which kernels draw the tokens of a call."""

from __future__ import annotations

import functools

from ...jit.gpu import Gpu
from ...jit.launch import Plan
from ...jit.source import Kernel
from ..plan import ITEMSIZE, power_of_two

WARP = 32
LOAD = 16  # bytes
REGISTERS = 32  # of a thread, 32 bits each, that hold its part of a slice
THREADS = 128  # a block of short rows
SUMS_THREADS = 256
# Warps that hold a row at most. All of them work out the token; without filters two launches, and a
# second read of one slice, cost less than that from 4,096 columns on.
HELD_WARPS, HELD_WARPS_FILTERED = 4, 8
JUDGING_WARPS = 16  # of a longer row, with filters


@functools.lru_cache(maxsize=4096)
def choose(
    dtype: str,
    rows: int,
    columns: int,
    aligned: bool,
    filtered: bool,
    gpu: Gpu,
    copies: tuple[str, ...] = (),
) -> tuple[Plan, ...]:
    """Plan the launches that draw `rows` tokens: one, or two for long rows.

    Parameters
    ----------
    dtype : str
    rows, columns : int
    aligned : bool
        Whether all rows begin at multiples of 16 bytes.
    filtered : bool
        Whether there is a top_p or a min_p.
    gpu : Gpu
    copies : tuple of str
        The arguments that had to be copied.
    """
    vector, most = _vector(dtype), _vectors(dtype)
    loads = -(-(columns + (0 if aligned else vector - 1)) // vector)
    lanes = min(WARP, power_of_two(-(-loads // most)))
    warps = power_of_two(-(-loads // (lanes * most)))
    if warps > (HELD_WARPS_FILTERED if filtered else HELD_WARPS):
        return _long(dtype, rows, columns, loads, filtered, gpu, copies)
    threads = WARP * warps if warps > 1 else THREADS
    group = lanes * warps
    constants = {"kWarps": warps, "kThreads": threads}
    vectors = most if warps > 1 else power_of_two(-(-loads // lanes))
    sharing = f"{group} thread{'s' if group > 1 else ''} a row"
    return (
        _plan(
            _kernel("rows", dtype, lanes, vectors, filtered, constants),
            blocks=-(-rows // (threads // group)),
            threads=threads,
            nbytes=rows * (columns * ITEMSIZE[dtype] + 8),
            operations=5 * rows * columns,
            why=f"{sharing}, held in registers: one read",
            copies=copies,
        ),
    )


def slices_of(dtype: str, columns: int, aligned: bool) -> int:
    """The slices into which a long row is cut."""
    vector = _vector(dtype)
    loads = -(-(columns + (0 if aligned else vector - 1)) // vector)
    return -(-loads // (WARP * _vectors(dtype)))


def _long(
    dtype: str,
    rows: int,
    columns: int,
    loads: int,
    filtered: bool,
    gpu: Gpu,
    copies: tuple[str, ...],
) -> tuple[Plan, ...]:
    vectors = _vectors(dtype)
    slices = -(-loads // (WARP * vectors))
    itemsize = ITEMSIZE[dtype]
    tasks = rows * slices
    index = "uint32" if tasks < 2**31 else "int64"
    constants: dict[str, int | str] = {"kThreads": SUMS_THREADS, "Index": index}
    sums = _plan(
        _kernel("sums", dtype, WARP, vectors, False, constants),
        blocks=-(-tasks // (SUMS_THREADS // WARP)),
        threads=SUMS_THREADS,
        nbytes=rows * columns * itemsize,
        operations=5 * rows * columns,
        why=f"a warp for each of {slices} slices a row: one read",
        copies=copies,
    )
    warps = JUDGING_WARPS if filtered else 1
    threads = WARP * warps if filtered else THREADS
    constants = {"kWarps": warps, "kThreads": threads}
    again = columns if filtered else vectors * WARP * _vector(dtype)
    how = "a block for each row: a read for each token drawn" if filtered else "a warp a row"
    draw = _plan(
        _kernel("draw", dtype, WARP, vectors, filtered, constants),
        blocks=-(-rows // (threads // (WARP * warps))),
        threads=threads,
        nbytes=rows * (again * itemsize + slices * 2 * _accumulator(dtype) + 8),
        operations=5 * rows * again,
        why=how,
        copies=copies,
    )
    return sums, draw


def _kernel(
    name: str,
    dtype: str,
    lanes: int,
    vectors: int,
    filtered: bool,
    constants: dict[str, int] | dict[str, int | str],
) -> Kernel:
    return Kernel(
        file=f"_softmax/selection/sample_{name}.cu",
        entry=f"sample_{name}",
        constants=(
            ("Element", dtype),
            ("kLanes", lanes),
            ("kVectors", vectors),
            ("kFiltered", filtered),
            *constants.items(),
        ),
    )


def _plan(
    kernel: Kernel,
    *,
    blocks: int,
    threads: int,
    nbytes: int,
    operations: int,
    why: str,
    copies: tuple[str, ...],
) -> Plan:
    return Plan(
        kernel=kernel,
        grid=(blocks, 1, 1),
        threads=threads,
        shared_memory=0,
        bytes=nbytes,
        operations=operations,
        why=why,
        copies=copies,
    )


def _vector(dtype: str) -> int:
    """Elements a load."""
    return LOAD // ITEMSIZE[dtype]


def _accumulator(dtype: str) -> int:
    """Bytes of a score."""
    return 8 if dtype == "float64" else 4


def _vectors(dtype: str) -> int:
    """Loads that a thread holds."""
    return REGISTERS * 4 // (_vector(dtype) * _accumulator(dtype))
