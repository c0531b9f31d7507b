"""How the threads share the rows of topk and softmax_topk: the only place with heuristics."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from ...jit.gpu import Gpu
from ...jit.launch import Plan
from ...jit.source import Kernel
from ..plan import power_of_two
from .topk_api import Problem

LOAD = 16  # bytes
WARP = 32
ITEMS = 32  # elements that a thread has of a chunk at most: the bits of a word
WARPS_BLOCK = 128  # threads of a block whose warps have rows of their own
WARP_K = 64  # beyond, a warp spends more on its candidates than on its row
WARP_ROW = 16 * 1024  # bytes of a row at most that a warp reads, where there are rows for all warps
WARP_ROW_ALONE = 2 * 1024  # the same where there are few rows
SMALL_ROW = 32 * 1024  # bytes of a row for the smallest block
ALONE_ROW = 256 * 1024  # bytes of a row that one block reads sooner than two launches
PART_THREADS = 512  # of a multiprocessor for parts: there are no more of them than two blocks each
SLICE = 16 * 1024  # bytes of a part at least
ROUNDS = 16  # chunks whose candidates a buffer takes, if they are like the first
WARP_KEYS = 512  # candidates and maxima of a warp at most
BUFFER = 40 * 1024  # bytes of those of a block
MAXIMA = 16 * 1024  # bytes of maxima at most


@dataclass(frozen=True)
class Sharing:
    """Threads, registers and shared memory for a row."""

    per_row: int  # threads
    threads: int  # of a block
    blocks: int  # of a multiprocessor
    vectors: int
    maxima: int
    capacity: int


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
    threads = least(problem, 256)
    sharing = block(problem, threads, longest(problem, parts), gpu)
    sharing = dataclasses.replace(sharing, blocks=PART_THREADS // threads)
    first = _plan(problem, sharing, axes, parts, "slices", gpu, copies)
    sharing = share(problem, problem.rows, parts * problem.k, gpu)
    return Launches(first, _plan(problem, sharing, axes, parts, "merges", gpu, ()), parts)


def most(k: int) -> int:
    """Candidates that may be kept when a bound is raised: near to k is found sooner than k."""
    return k + k // 8 + 4


def slices(problem: Problem, gpu: Gpu) -> int:
    """Into how many parts rows are divided, to have work for every multiprocessor."""
    size = LOAD // _vector(problem.dtype)
    if problem.rows > gpu.multiprocessors // 2 or problem.columns * size < ALONE_ROW:
        return 1
    # The second launch reads k of each part: no longer than a part.
    balanced = math.isqrt(problem.columns // problem.k)
    wanted = 2 * gpu.multiprocessors // problem.rows
    return max(1, min(wanted, problem.columns * size // SLICE, balanced))


def longest(problem: Problem, parts: int) -> int:
    """Columns of the last part: the others are as many whole vectors (topk.cu, Row)."""
    vector = _vector(problem.dtype)
    width = problem.columns // parts // vector * vector
    return problem.columns + vector - 1 - (parts - 1) * width


def share(problem: Problem, rows: int, columns: int, gpu: Gpu) -> Sharing:
    """A warp for each short row, a block for each long one."""
    size = LOAD // _vector(problem.dtype)
    resident = _resident(problem, _most_vectors(problem), gpu)
    busy = rows >= gpu.multiprocessors * resident // WARP // 4
    if problem.k <= WARP_K and columns * size <= (WARP_ROW if busy else WARP_ROW_ALONE):
        return _sharing(problem, WARP, WARPS_BLOCK, columns, gpu)
    threads = least(problem, 128 if columns * size <= SMALL_ROW else 256)
    while (
        2 * threads <= resident
        and 2 * threads * rows <= gpu.multiprocessors * resident
        and columns * size >= 2 * threads * LOAD
    ):
        threads *= 2
    return block(problem, threads, columns, gpu)


def block(problem: Problem, threads: int, columns: int, gpu: Gpu) -> Sharing:
    return _sharing(problem, threads, threads, columns, gpu)


def least(problem: Problem, threads: int) -> int:
    """Threads of a block, so many at least that their maxima tell a bound for large k as well."""
    return min(512, max(threads, bucket(problem.k)))


def bucket(k: int) -> int:
    """The largest k of those that share a kernel."""
    return max(8, 1 << (k - 1).bit_length())


def _sharing(problem: Problem, per_row: int, threads: int, columns: int, gpu: Gpu) -> Sharing:
    vector = _vector(problem.dtype)
    loads = -(-(columns + vector - 1) // (per_row * vector))  # the row may begin inside a vector
    vectors = min(power_of_two(loads), _most_vectors(problem))
    items = vectors * vector
    maxima = 1
    key = 16 if problem.dtype == "float64" else 8
    wanted = min(2 * bucket(problem.k), MAXIMA // key)
    while maxima < items and per_row * maxima < wanted:
        maxima *= 2
    room = WARP_KEYS if per_row == WARP else min(BUFFER, 64 * threads) // key
    kept = most(bucket(problem.k))
    capacity = max(min(ROUNDS * kept, room - per_row * maxima), kept + kept // 2)
    blocks = _resident(problem, vectors, gpu) // threads
    return Sharing(per_row, threads, blocks, vectors, maxima, capacity)


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
        ("kBlocks", sharing.blocks),
        ("kVectors", sharing.vectors),
        ("kMaxima", sharing.maxima),
        ("kCapacity", sharing.capacity),
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


def _most_vectors(problem: Problem) -> int:
    """Loads of a thread at a time. A double takes more registers than its own."""
    return 4 if problem.dtype == "float64" else ITEMS // _vector(problem.dtype)


def _resident(problem: Problem, vectors: int, gpu: Gpu) -> int:
    """Threads of a multiprocessor: 64 registers each, or 80 or 128 where that would spill."""
    if gpu.arch < 90 or gpu.arch >= 120 or problem.dtype == "float64" or problem.k > 256:
        return 512
    return 768 if vectors == _most_vectors(problem) else 1024
