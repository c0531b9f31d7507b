"""How the threads share the rows of topk and softmax_topk: the only place with heuristics."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...jit.gpu import Gpu
from ...jit.launch import Plan
from ...jit.source import Kernel
from .topk_api import Problem

LOAD = 16  # bytes
WARP = 32
WARPS_BLOCK = 128  # threads of a block whose warps have rows of their own
ITEMS = 32  # elements of a chunk that a thread has at most: bits of a word
WARP_K = 64  # beyond, a warp spends more on its candidates than on its row
WARP_ROW = 16 * 1024  # bytes of a row that a warp reads in turn, where there are rows for all warps
SMALL_ROW = 32 * 1024  # bytes of a row for the smallest block
BUFFER = {"warp": 4 * 1024, "block": 44 * 1024}  # bytes of candidates at most


@dataclass(frozen=True)
class Sharing:
    """Threads, registers and shared memory for a row."""

    per_row: int  # threads
    threads: int  # of a block
    vectors: int
    maxima: int
    capacity: int
    loops: bool


@dataclass(frozen=True)
class Launches:
    """One launch, or two where rows are read in parts."""

    first: Plan
    second: Plan | None
    slices: int

    @property
    def plans(self) -> list[Plan]:
        return [self.first] if self.second is None else [self.first, self.second]


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, axes: int, gpu: Gpu, copies: tuple[str, ...] = ()) -> Launches:
    """Plan a call.

    Parameters
    ----------
    problem : Problem
        With at least one row.
    axes : int
        That tell rows apart, once folded.
    gpu : Gpu
    copies : tuple of str
        The arguments that had to be copied to fit.
    """
    parts = slices(problem, gpu)
    if parts == 1:
        sharing = share(problem, problem.rows, problem.columns, gpu)
        return Launches(_plan(problem, sharing, axes, 1, "whole", gpu, copies), None, 1)
    sharing = block(problem, 512, problem.columns)
    first = _plan(problem, sharing, axes, parts, "slices", gpu, copies)
    sharing = share(problem, problem.rows, parts * problem.k, gpu)
    return Launches(first, _plan(problem, sharing, axes, parts, "merges", gpu, ()), parts)


def most(k: int) -> int:
    """Candidates that may be kept when a threshold is raised: near to k is found sooner than k."""
    return k + k // 4 + 4


def slices(problem: Problem, gpu: Gpu) -> int:
    """Into how many parts rows are divided, to have work for every multiprocessor."""
    if problem.rows > gpu.multiprocessors // 2:
        return 1
    chunk = 512 * _most_vectors(problem.dtype, loops=True) * _vector(problem.dtype)
    # The second launch reads k of each part: no longer than a part.
    balanced = math.isqrt(problem.columns // problem.k)
    wanted = 2 * gpu.multiprocessors // problem.rows
    return max(1, min(wanted, problem.columns // chunk, balanced))


def share(problem: Problem, rows: int, columns: int, gpu: Gpu) -> Sharing:
    """A warp for each short row, a block for each long one."""
    size, resident = LOAD // _vector(problem.dtype), _resident(problem, gpu)
    alone = WARP * _vector(problem.dtype) * _most_vectors(problem.dtype, loops=False)
    busy = rows >= gpu.multiprocessors * resident // WARP // 4
    if problem.k <= WARP_K and (
        columns + LOAD // size <= alone or (busy and columns * size <= WARP_ROW)
    ):
        return _sharing(problem, WARP, WARPS_BLOCK, columns)
    threads = 128 if columns * size <= SMALL_ROW else 256
    threads = min(512, max(threads, bucket(problem.k)))
    two_chunks = 2 * threads * _most_vectors(problem.dtype, loops=True) * LOAD
    while (
        threads < resident
        and 2 * threads * rows <= gpu.multiprocessors * resident
        and columns * size >= two_chunks
    ):
        threads, two_chunks = 2 * threads, 2 * two_chunks
    return block(problem, threads, columns)


def block(problem: Problem, threads: int, columns: int) -> Sharing:
    return _sharing(problem, threads, threads, columns)


def bucket(k: int) -> int:
    """The largest k of those that share a kernel."""
    return max(8, 1 << (k - 1).bit_length())


def _sharing(problem: Problem, per_row: int, threads: int, columns: int) -> Sharing:
    vector = _vector(problem.dtype)
    loads = -(-(columns + vector - 1) // (per_row * vector))  # the row may begin inside a vector
    alone = _most_vectors(problem.dtype, loops=per_row > WARP)
    loops = loads > alone
    vectors = _most_vectors(problem.dtype, loops=True) if loops else _power_of_two(loads)
    items = vectors * vector
    kept = most(bucket(problem.k))
    key = 16 if problem.dtype == "float64" else 8
    room = BUFFER["warp" if per_row == WARP else "block"]

    def capacity(maxima: int) -> int:
        """What was kept, and that many parts of a chunk."""
        return kept * (1 + items // maxima)

    # Half of the maxima or fewer are above a threshold: then it is near to the k-th element.
    maxima = 1
    while maxima < items and (
        per_row * maxima < 2 * bucket(problem.k) or capacity(maxima) * key > min(room, 64 * threads)
    ):
        maxima *= 2
    return Sharing(per_row, threads, vectors, maxima, capacity(maxima), loops)


def _plan(
    problem: Problem,
    sharing: Sharing,
    axes: int,
    parts: int,
    stage: str,
    gpu: Gpu,
    copies: tuple[str, ...],
) -> Plan:
    softmax = problem.function == "softmax_topk"
    slicing, merging = stage == "slices", stage == "merges"
    constants = (
        ("Element", problem.dtype),
        ("Result", problem.dtype if slicing else problem.result),
        ("kOuterAxes", axes),
        ("kThreads", sharing.threads),
        ("kThreadsPerRow", sharing.per_row),
        ("kBlocks", _resident(problem, gpu) // sharing.threads),
        ("kVectors", sharing.vectors),
        ("kMaxima", sharing.maxima),
        ("kCapacity", sharing.capacity),
        ("kLoops", sharing.loops),
        ("kSoftmax", softmax and not merging),
        ("kSlices", slicing),
        ("kMerges", merging),
        ("kProbabilities", softmax and not slicing),
    )
    streams = problem.rows * (parts if slicing else 1)
    size = LOAD // _vector(problem.dtype)
    elements = problem.rows * (parts * problem.k if merging else problem.columns)
    answers = streams * problem.k
    group = "a warp" if sharing.per_row == WARP else f"a block of {sharing.threads} threads"
    of = {"whole": "each row", "slices": f"each of {parts} parts of a row", "merges": "each row"}
    read = "of what the parts left" if merging else "in one read"
    return Plan(
        kernel=Kernel("_softmax/selection/topk.cu", "topk", constants),
        grid=(-(-streams // (sharing.threads // sharing.per_row)), 1, 1),
        threads=sharing.threads,
        shared_memory=0,
        bytes=elements * (size + 8 * merging) + answers * (2 * size + 8),
        # A comparison, and for the sum: maximum, subtraction, exponential, addition.
        operations=elements * (5 if softmax and not merging else 1),
        why=f"{group} for {of[stage]}, {read}; a buffer of {sharing.capacity} candidates",
        copies=copies,
    )


def _vector(dtype: str) -> int:
    """Elements a load."""
    return {"float64": 2, "float32": 4}.get(dtype, 8)


def _resident(problem: Problem, gpu: Gpu) -> int:
    """Threads of a multiprocessor: 64 registers each, or 128 where that would spill."""
    return 1024 if gpu.arch >= 90 and problem.dtype != "float64" and problem.k <= 256 else 512


def _most_vectors(dtype: str, *, loops: bool) -> int:
    if loops:
        return 4 if dtype == "float32" else 2
    return 8 if dtype == "float32" else 4


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
