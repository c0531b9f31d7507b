"""Which kernel runs a call, and how its threads share the rows: the only place with heuristics."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..jit.gpu import Gpu
from ..jit.launch import Plan
from ..jit.source import Kernel
from .layout import Layout, Placement
from .problem import Problem

WARP = 32
LEAST_THREADS = 128  # a block
LONG = 1024  # columns: a row that is worth reading beside its neighbours, however few
SECTOR = 32  # bytes: the least that device memory delivers

# Threads of a row at most, and the 32-bit registers in which each holds its part of it. A thread
# has 64 at 1024 threads a block and 128 at 512; what is left over must do for the arithmetic. The
# columns kernel also holds an address for each load, so that single elements must be fewer.
WARP_REGISTERS = 32
BLOCK_THREADS, BLOCK_REGISTERS = 1024, 16
COLUMNS_THREADS, COLUMNS_REGISTERS, COLUMNS_LOADS = 512, 24, 16
# Of a row that is not held, a thread has this much at a time: loads in flight, and their registers.
STREAM_THREADS, STREAM_REGISTERS, STREAM_LOADS = 512, 16, 8


@dataclass(frozen=True)
class Sharing:
    """How a kernel's threads share the rows: its constants, but for what the problem says."""

    kernel: str
    blocks: int
    threads: int
    beside: tuple[str, int]  # the constant that says how threads lie, kThreadsPerRow or kLanes
    vector: int
    vectors: int
    held: bool
    why: str


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, layout: Layout, gpu: Gpu, copies: tuple[str, ...] = ()) -> Plan:
    """Plan the one launch of a call.

    Parameters
    ----------
    problem : Problem
    layout : Layout
        Of the operands as the kernel will see them: it fits.
    gpu : Gpu
    copies : tuple of str
        The arguments that had to be copied for that.
    """
    across = lies_across(problem, layout)
    sharing = _columns(problem, layout, gpu) if across else _rows(problem, layout)
    if problem.reduces:
        reads, how = 1, "one read"
    elif sharing.held:
        reads, how = 1, "held in registers"
    else:
        reads, how = 2, "too long for a block's registers: two reads"
    elements = problem.rows * problem.columns
    written = problem.rows * (1 + problem.signed) if problem.reduces else elements
    return Plan(
        kernel=_kernel(problem, layout, sharing),
        grid=(sharing.blocks, 1, 1),
        threads=sharing.threads,
        shared_memory=0,
        bytes=elements * layout.x.itemsize * (reads + problem.weighted)
        + written * layout.out.itemsize,
        # Maximum, subtraction, exponential, sum, and what makes it an answer.
        operations=elements * (4 if problem.reduces else 5),
        why=f"{sharing.why}, {how}; {sharing.vector * layout.x.itemsize} bytes a load",
        copies=copies,
    )


def lies_across(problem: Problem, layout: Layout) -> bool:
    """Whether neighbouring rows lie denser than a row does, and are worth reading side by side."""
    across, along = abs(layout.x.outer[-1]), abs(layout.x.reduced[-1])
    # Of a run shorter than a sector, the cache keeps for one row what another row's load brought.
    fills_sectors = layout.outer[-1] * layout.x.itemsize >= SECTOR
    return 0 < across < along and (fills_sectors or problem.columns > LONG)


def _rows(problem: Problem, layout: Layout) -> Sharing:
    """A group of threads, a warp or less, for each short row; a block for each long one."""
    columns = problem.columns
    vector = _vector(problem, layout, layout.reduced[-1], along_rows=True)
    loads = -(-columns // vector)
    held = not problem.reduces
    if columns * _words(problem) <= WARP * WARP_REGISTERS:
        threads = LEAST_THREADS
        per_row = min(WARP, _power_of_two(loads))
        vectors = _power_of_two(-(-loads // per_row))
        why = f"{per_row} thread{'s' if per_row > 1 else ''} a row"
    else:
        vectors = max(1, BLOCK_REGISTERS // (vector * _words(problem)))
        most = BLOCK_THREADS if held else STREAM_THREADS
        threads = per_row = min(most, max(LEAST_THREADS, _power_of_two(-(-loads // vectors))))
        held = held and loads <= per_row * vectors
        why = "a block for each row"
    if not held:
        threads, per_row = min(threads, STREAM_THREADS), min(per_row, STREAM_THREADS)
        vectors = min(vectors, _streamed(problem, vector))
    blocks = -(-problem.rows // (threads // per_row))
    return Sharing("rows", blocks, threads, ("kThreadsPerRow", per_row), vector, vectors, held, why)


def _columns(problem: Problem, layout: Layout, gpu: Gpu) -> Sharing:
    """A tile of rows for each block, several threads for each row."""
    columns, width = problem.columns, layout.outer[-1]
    vector = _vector(problem, layout, width, along_rows=False)
    if problem.reduces:
        vectors = _streamed(problem, vector)
    else:
        vectors = min(COLUMNS_LOADS, max(1, COLUMNS_REGISTERS // (vector * _words(problem))))

    def blocks(lanes: int) -> int:
        return problem.rows // width * -(-width // (lanes * vector))

    def holds(lanes: int) -> bool:
        return problem.reduces or columns <= COLUMNS_THREADS // lanes * vectors

    # Narrower tiles give every multiprocessor a block, and hold longer rows. The narrowest still
    # takes whole sectors.
    lanes = min(WARP, _power_of_two(-(-width // vector)))
    narrowest = max(1, SECTOR // (vector * layout.x.itemsize))
    while lanes > narrowest and (blocks(lanes) < gpu.multiprocessors or not holds(lanes)):
        lanes //= 2
    slices = min(COLUMNS_THREADS // lanes, _power_of_two(-(-columns // vectors)))
    slices = max(slices, LEAST_THREADS // lanes)
    held = holds(lanes) and not problem.reduces
    most = _power_of_two(-(-columns // slices)) if held else _streamed(problem, vector)
    return Sharing(
        "columns",
        blocks(lanes),
        lanes * slices,
        ("kLanes", lanes),
        vector,
        min(vectors, most),
        held,
        f"{lanes * vector} rows side by side, {slices} threads each",
    )


def _kernel(problem: Problem, layout: Layout, sharing: Sharing) -> Kernel:
    return Kernel(
        file=f"_softmax/{sharing.kernel}.cu",
        entry=f"softmax_{sharing.kernel}",
        constants=(
            ("Element", problem.dtype),
            ("Result", problem.result),
            ("Index", "uint32" if max(problem.rows, problem.columns) < 2**31 else "int64"),
            ("kReduces", problem.reduces),
            ("kLog", problem.function == "log_softmax"),
            ("kWeighted", problem.weighted),
            ("kSigned", problem.signed),
            ("kOuterAxes", len(layout.outer)),
            ("kReducedAxes", len(layout.reduced)),
            ("kThreads", sharing.threads),
            sharing.beside,
            ("kVector", sharing.vector),
            ("kVectors", sharing.vectors),
            ("kHeld", sharing.held),
        ),
    )


def _vector(problem: Problem, layout: Layout, run: int, *, along_rows: bool) -> int:
    """The most elements of a run, up to 16 bytes, that every load and store can take at once."""
    walked = [layout.x] + ([layout.weights] if layout.weights else [])
    if not problem.reduces:
        walked.append(layout.out)

    def takes(placement: Placement, vector: int) -> bool:
        along, across = placement.reduced, placement.outer
        if not along_rows:
            along, across = across, along
        nbytes = vector * placement.itemsize
        return (
            nbytes <= 16
            and along[-1] == 1
            and placement.alignment % nbytes == 0
            and all(stride % vector == 0 for stride in (*along[:-1], *across))
        )

    for vector in (8, 4, 2):
        if run % vector == 0 and all(takes(placement, vector) for placement in walked):
            return vector
    return 1


def _streamed(problem: Problem, vector: int) -> int:
    """Loads that a thread has in flight on its way through a row that it does not hold."""
    return min(STREAM_LOADS, max(1, STREAM_REGISTERS // (vector * _words(problem))))


def _words(problem: Problem) -> int:
    """The 32-bit registers of a score."""
    return 2 if problem.dtype == "float64" else 1


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
