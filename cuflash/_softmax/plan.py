"""Which kernel runs a call, and how its threads share the rows: the only place with heuristics."""

from __future__ import annotations

import functools

from ..jit.gpu import Gpu
from ..jit.launch import Plan
from ..jit.source import Kernel
from .layout import Layout, Placement
from .problem import Problem

WARP = 32
WARP_COLUMNS = 1024  # the longest row that one warp holds
# 32-bit registers that hold a thread's part of a row: enough loads in flight, and what is left is
# enough for the arithmetic at 1024 threads of 64 registers.
BLOCK_REGISTERS = 16
# A block of the columns kernel has half as many threads, each with twice the registers.
COLUMNS_THREADS = 512
COLUMNS_REGISTERS = 32
SECTOR = 32  # bytes: the least that device memory delivers


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, layout: Layout, gpu: Gpu, copies: tuple[str, ...] = ()) -> Plan:
    """Plan the one launch of a call whose layout fits.

    Parameters
    ----------
    problem : Problem
    layout : Layout
        Of the operands as the kernel will see them.
    gpu : Gpu
    copies : tuple of str
        The arguments that had to be copied for the layout to fit.
    """
    if lies_across(problem, layout):
        return _columns(problem, layout, gpu, copies)
    return _rows(problem, layout, copies)


def lies_across(problem: Problem, layout: Layout) -> bool:
    """Whether neighbouring rows lie denser than a row does, and are worth reading side by side."""
    across, along = abs(layout.x.outer[-1]), abs(layout.x.reduced[-1])
    denser = 0 < across < along
    # Of a run shorter than a sector the cache keeps what the first row's threads did not want.
    fills_sectors = layout.outer[-1] * layout.x.itemsize >= SECTOR
    return denser and (fills_sectors or problem.columns > WARP_COLUMNS)


def _rows(problem: Problem, layout: Layout, copies: tuple[str, ...]) -> Plan:
    columns = problem.columns
    vector = _vector(problem, layout, along_rows=True)
    loads = -(-columns // vector)
    wide = problem.dtype == "float64"
    if columns <= WARP_COLUMNS:
        per_row = min(WARP, _power_of_two(loads))
        threads = 128
        held = not problem.reduces
        vectors = _power_of_two(-(-loads // per_row))
        why = f"{per_row} threads a row, which they hold in registers"
    else:
        values = max(vector, BLOCK_REGISTERS // (2 if wide else 1))
        per_row = threads = min(1024, max(128, _power_of_two(-(-columns // values))))
        vectors = values // vector
        held = not problem.reduces and columns <= per_row * values
        if held:
            why = "a block for each row, which it holds in registers"
        else:
            why = "a block for each row, too long for its registers: two reads"
    if not held:
        per_row = min(per_row, 512)
        threads = min(threads, 512)
        vectors = min(vectors, 4 if vector > 1 else 8)
    if problem.reduces:
        why = f"{per_row} threads a row, one read"
    return Plan(
        kernel=_kernel(
            "rows",
            problem,
            layout,
            (
                ("kHeld", held),
                ("kThreads", threads),
                ("kThreadsPerRow", per_row),
                ("kVector", vector),
                ("kVectors", vectors),
            ),
        ),
        grid=(-(-problem.rows // (threads // per_row)), 1, 1),
        threads=threads,
        shared_memory=0,
        bytes=_bytes(problem, layout, reads=1 if held or problem.reduces else 2),
        operations=_operations(problem),
        why=f"{why}; {_loads(layout, vector)}",
        copies=copies,
    )


def _columns(problem: Problem, layout: Layout, gpu: Gpu, copies: tuple[str, ...]) -> Plan:
    columns, width = problem.columns, layout.outer[-1]
    vector = _vector(problem, layout, along_rows=False)
    values = max(vector, COLUMNS_REGISTERS // (2 if problem.dtype == "float64" else 1))
    if problem.reduces:  # keeps a state for each row beside the tile
        values = max(vector, values // 2)
    vectors = values // vector
    lanes = min(WARP, _power_of_two(-(-width // vector)))
    # Narrower tiles make more blocks, and hold longer rows; but not narrower than a sector.
    narrowest = max(1, SECTOR // (vector * layout.x.itemsize))
    batches = problem.rows // width

    def too_wide(lanes: int) -> bool:
        few = batches * -(-width // (lanes * vector)) < gpu.multiprocessors
        overflows = not problem.reduces and columns > COLUMNS_THREADS // lanes * vectors
        return few or overflows

    while lanes > narrowest and too_wide(lanes):
        lanes //= 2
    slices = min(COLUMNS_THREADS // lanes, _power_of_two(-(-columns // vectors)))
    threads = max(128, lanes * slices)
    slices = threads // lanes
    held = not problem.reduces and columns <= slices * vectors
    vectors = min(vectors, _power_of_two(-(-columns // slices)))
    if problem.reduces:
        reads = "one read"
    else:
        reads = "held in registers" if held else "too long for a block's registers: two reads"
    return Plan(
        kernel=_kernel(
            "columns",
            problem,
            layout,
            (
                ("kHeld", held),
                ("kThreads", threads),
                ("kLanes", lanes),
                ("kVector", vector),
                ("kVectors", vectors),
            ),
        ),
        grid=(batches * -(-width // (lanes * vector)), 1, 1),
        threads=threads,
        shared_memory=0,
        bytes=_bytes(problem, layout, reads=1 if held or problem.reduces else 2),
        operations=_operations(problem),
        why=(
            f"neighbouring rows lie densest: {lanes * vector} of them side by side, "
            f"{slices} threads each, {reads}; {_loads(layout, vector)}"
        ),
        copies=copies,
    )


def _kernel(
    name: str, problem: Problem, layout: Layout, constants: tuple[tuple[str, bool | int], ...]
) -> Kernel:
    return Kernel(
        file=f"_softmax/{name}.cu",
        entry=f"softmax_{name}",
        constants=(
            ("Element", problem.dtype),
            ("Result", problem.result),
            # Divisions by sizes are what odd layouts cost, and twice as much in 64 bits.
            ("Index", "uint32" if max(problem.rows, problem.columns) < 2**31 else "int64"),
            ("kReduces", problem.reduces),
            ("kLog", problem.function == "log_softmax"),
            ("kWeighted", problem.weighted),
            ("kSigned", problem.signed),
            ("kOuterAxes", len(layout.outer)),
            ("kReducedAxes", len(layout.reduced)),
            *constants,
        ),
    )


def _vector(problem: Problem, layout: Layout, *, along_rows: bool) -> int:
    """The most elements, up to 16 bytes of them, that every load and store can take at once."""
    walked = [layout.x] + ([layout.weights] if layout.weights else [])
    if not problem.reduces:
        walked.append(layout.out)
    size = layout.reduced[-1] if along_rows else layout.outer[-1]

    def takes(placement: Placement, vector: int) -> bool:
        along, across = placement.reduced, placement.outer
        if not along_rows:
            along, across = across, along
        others = (*along[:-1], *across)
        nbytes = vector * placement.itemsize
        return (
            nbytes <= 16
            and along[-1] == 1
            and placement.alignment % nbytes == 0
            and all(stride % vector == 0 for stride in others)
        )

    for vector in (8, 4, 2):
        if size % vector == 0 and all(takes(placement, vector) for placement in walked):
            return vector
    return 1


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _bytes(problem: Problem, layout: Layout, *, reads: int) -> int:
    elements = problem.rows * problem.columns
    read = elements * layout.x.itemsize * (reads + problem.weighted)
    written = problem.rows * (1 + problem.signed) if problem.reduces else elements
    return read + written * layout.out.itemsize


def _operations(problem: Problem) -> int:
    """Maximum, subtraction, exponential and sum for each element, and its answer."""
    return problem.rows * problem.columns * (4 if problem.reduces else 5)


def _loads(layout: Layout, vector: int) -> str:
    nbytes = vector * layout.x.itemsize
    return f"{nbytes} bytes a load"


