"""Which kernel runs a call, and how its threads share the rows: the only place with heuristics."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from ..jit.gpu import Gpu
from ..jit.launch import Plan
from ..jit.source import Kernel
from .layout import Layout, Placement
from .problem import Problem

# Times are of float32 on an H200, in microseconds, unless told otherwise.
WARP = 32
LEAST_THREADS = 128  # a block
# The same where a row has a warp or less. Softmax of 4000 x 63: 4.45; 4.67 with 128.
WARPS_THREADS = 256
# A block that holds a row in registers, and the 32-bit registers of it that a thread holds. Softmax
# of 4000 x 32000: 253 with these, 264 with 256 threads, 329 with 16 registers. bfloat16, two to a
# register, 526 with 256 threads and 555 with 512 (4000 x 128000; 574 with 256 in another run).
MOST_THREADS, WIDE_THREADS = 512, 256
TILE_REGISTERS = 32
# Rows that are not held: threads of a block at most, bytes that a thread has under way, and single
# elements, each of which has an address. logsumexp of 4000 x 32000: 121; 124 with 32 bytes, 130
# with 512 threads besides.
STREAM_THREADS, STREAM_BYTES, STREAM_LOADS = 256, 64, 8
# The same across rows, where every load has an address. Softmax of 1000 x 65536 along axis 0: 162
# held in 32 registers; read twice, since 24 are too few, 199.
COLUMNS_REGISTERS, COLUMNS_LOADS, COLUMNS_STREAM = 32, 16, 16
# Threads a multiprocessor, from which a warp takes a row that is only read. 512 did as well.
WARP_STREAMS = 1024
SECTOR = 32  # bytes: the least that device memory delivers
NARROW = 64  # bytes: the least that it delivers at full speed; held 32 bytes wide, as above: 244
LINE = 128  # bytes: what a warp's loads are best at
LONG = 1024  # columns: a row that is worth reading beside its neighbours, however few
RAGGED = 1024  # columns: shorter rows are read by single elements; measured for writing calls alone
# Few rows: bytes that are worth a block of their own. Softmax of 10 x 32000: 6.0; 10.2 in two
# launches of as many small parts as there is room for.
LEAST_PART = 16384
MOST_CLUSTER = 8  # blocks, on every GPU that has clusters
# Columns: longer rows are summed in two launches of all blocks, shorter ones in clusters. logsumexp
# of 10 x 128000: 7.7 in clusters, 10.1 in two launches; where the two cross was not measured.
CLUSTERED = 200_000
MOST_SPLITS = 512  # parts of a row, whose states every warp of the second launch reads

STATIC_SHARED = 48 * 1024  # bytes of a block, in which its warps leave their states

HALVES = ("float16", "bfloat16")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Operation of a function, and numbers in the state of a row.
OPERATIONS = {
    "softmax": ("Softmax", 2),
    "log_softmax": ("LogSoftmax", 2),
    "logsumexp": ("LogSumExp", 3),
    "cross_entropy": ("CrossEntropy", 4),
    "softmax_backward": ("SoftmaxBackward", 1),
    "log_softmax_backward": ("LogSoftmaxBackward", 1),
}


@dataclass(frozen=True)
class Sharing:
    """How a kernel's threads share the rows: its constants, but for what the problem says."""

    kernel: str
    units: int  # blocks, or clusters, that take the rows once
    threads: int  # a block
    beside: tuple[str, int]  # how threads lie: kThreadsPerRow, kLanes or kCluster
    vector: int
    vectors: int
    why: str
    ragged: bool = False
    held: bool = False
    splits: int = 1
    slice: int = 0  # columns of a part


@dataclass(frozen=True)
class Launches:
    """The plans of a call, in order, and what they share."""

    plans: tuple[Plan, ...]
    splits: int  # parts of a row
    slice: int  # columns of a part
    workspace: int  # bytes for the parts' states


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, layout: Layout, gpu: Gpu, copies: tuple[str, ...] = ()) -> Launches:
    """Plan a call: one launch, or two where rows are split among blocks that share no memory.

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
    sharing = _columns(problem, layout, gpu) if across else _rows(problem, layout, gpu)
    first = _plan(problem, layout, sharing, gpu, copies, partial=sharing.splits > 1)
    if sharing.splits == 1:
        return Launches((first,), 1, problem.columns, 0)
    second = _parts if problem.reduces else functools.partial(_plan, copies=(), finish=True)
    return Launches(
        (first, second(problem, layout, sharing, gpu)),
        sharing.splits,
        sharing.slice,
        problem.rows * sharing.splits * _state_bytes(problem),
    )


def lies_across(problem: Problem, layout: Layout) -> bool:
    """Whether neighbouring rows lie denser than a row does, and are worth reading side by side."""
    across, along = abs(layout.x.outer[-1]), abs(layout.x.reduced[-1])
    # Of a run shorter than a sector, the cache keeps for one row what another row's load brought.
    fills_sectors = layout.outer[-1] * layout.x.itemsize >= SECTOR
    return 0 < across < along and (fills_sectors or problem.columns > LONG)


def _rows(problem: Problem, layout: Layout, gpu: Gpu) -> Sharing:
    """A warp or less, a block, a cluster or several blocks for each row."""
    vector = widest_vector(problem, layout, layout.reduced[-1], along_rows=True)
    whole = ragged_vector(problem, layout)
    if whole > vector and problem.reduces and problem.columns > RAGGED:
        sharing = _dense_rows(problem, layout, gpu, whole, whole - 1)
        return dataclasses.replace(sharing, ragged=True)
    return _dense_rows(problem, layout, gpu, vector, 0)


def _dense_rows(problem: Problem, layout: Layout, gpu: Gpu, vector: int, lead: int) -> Sharing:
    """Rows of vectors; `lead` elements at most that the first of them has before the row."""
    loads = -(-(problem.columns + lead) // vector)
    if loads <= WARP * _tile(problem, vector):
        return _rows_of_a_warp(problem, layout, gpu, vector, loads)
    parts = _parts_wanted(problem, layout, gpu, problem.rows)
    if problem.reduces:
        return _streamed_rows(problem, gpu, vector, loads, parts)
    held = _most_threads(problem, vector) * _tile(problem, vector)
    if loads <= held and (parts == 1 or gpu.arch < 90):
        return _rows_of_a_block(problem, vector, loads)
    cluster = power_of_two(-(-loads // held))
    if gpu.arch >= 90 and cluster <= MOST_CLUSTER:
        return _cluster_rows(problem, vector, loads, max(cluster, min(parts, MOST_CLUSTER)))
    if parts > 1:
        return _split_rows(problem, vector, MOST_THREADS, parts)
    vectors, beside = _streamed(problem, vector), ("kThreadsPerRow", MOST_THREADS)
    why = "a block for each row"
    return Sharing("rows", problem.rows, MOST_THREADS, beside, vector, vectors, why)


def _rows_of_a_warp(problem: Problem, layout: Layout, gpu: Gpu, vector: int, loads: int) -> Sharing:
    most = _tile(problem, vector)
    per_row = min(WARP, power_of_two(loads))
    # Enough rows to fill the card: fewer threads a row have more loads in flight each.
    while (
        problem.rows * per_row > 1024 * gpu.multiprocessors
        and -(-loads // per_row) < min(8, most // 2 + 1)
        and per_row * vector * layout.x.itemsize > SECTOR
    ):
        per_row //= 2
    vectors = power_of_two(-(-loads // per_row))
    why = f"{per_row} thread{'s' if per_row > 1 else ''} a row"
    units = -(-problem.rows // (WARPS_THREADS // per_row))
    beside = ("kThreadsPerRow", per_row)
    held = not problem.reduces
    return Sharing("rows", units, WARPS_THREADS, beside, vector, vectors, why, held=held)


def _rows_of_a_block(problem: Problem, vector: int, loads: int) -> Sharing:
    nbytes = vector * ITEMSIZE[problem.dtype] * (1 + problem.weighted)
    vectors = min(_tile(problem, vector), max(1, STREAM_BYTES // nbytes))
    threads = max(LEAST_THREADS, power_of_two(-(-loads // vectors)))
    if threads > _most_threads(problem, vector):
        threads, vectors = _most_threads(problem, vector), _tile(problem, vector)
    beside = ("kThreadsPerRow", threads)
    why = "a block for each row"
    return Sharing("rows", problem.rows, threads, beside, vector, vectors, why, held=True)


def _streamed_rows(problem: Problem, gpu: Gpu, vector: int, loads: int, parts: int) -> Sharing:
    """Rows that are read once and give one number."""
    vectors = _streamed(problem, vector)
    if problem.rows * WARP >= WARP_STREAMS * gpu.multiprocessors:
        units = -(-problem.rows // (LEAST_THREADS // WARP))
        beside = ("kThreadsPerRow", WARP)
        return Sharing("rows", units, LEAST_THREADS, beside, vector, vectors, "a warp for each row")
    threads = min(STREAM_THREADS, max(LEAST_THREADS, power_of_two(-(-loads // vectors))))
    beside = ("kThreadsPerRow", threads)
    if gpu.arch >= 90 and parts > 1 and problem.columns <= CLUSTERED:
        cluster = power_of_two(min(parts, MOST_CLUSTER))
        return Sharing(
            "cluster_rows",
            problem.rows,
            MOST_THREADS,
            ("kCluster", cluster),
            vector,
            vectors,
            f"{cluster} blocks for each row",
        )
    if parts > 1:
        return _split_rows(problem, vector, threads, parts)
    why = "a block for each row"
    return Sharing("rows", problem.rows, threads, beside, vector, vectors, why)


def _split_rows(problem: Problem, vector: int, threads: int, parts: int) -> Sharing:
    beside = ("kThreadsPerRow", threads)
    vectors = _streamed(problem, vector)
    return _split("rows", problem, problem.rows, threads, beside, vector, vectors, parts)


def _cluster_rows(problem: Problem, vector: int, loads: int, cluster: int) -> Sharing:
    """Rows that a cluster of blocks can hold in registers."""
    cluster, threads = power_of_two(cluster), _most_threads(problem, vector)
    while threads > LEAST_THREADS and loads <= cluster * threads // 2:
        threads //= 2
    vectors = power_of_two(-(-loads // (cluster * threads)))
    return Sharing(
        "cluster_rows",
        problem.rows,
        threads,
        ("kCluster", cluster),
        vector,
        vectors,
        f"{cluster} blocks for each row",
        held=True,
    )


def _columns(problem: Problem, layout: Layout, gpu: Gpu) -> Sharing:
    """A tile of rows for each block, several threads for each row."""
    width = layout.outer[-1]
    vector = widest_vector(problem, layout, width, along_rows=False)
    # Each load has an address of its own.
    registers = vector * words(problem) * (1 + problem.weighted)
    most = min(COLUMNS_LOADS, max(1, COLUMNS_REGISTERS // registers))
    widest = min(WARP, power_of_two(-(-width // vector)))
    while widest * vector * _state_bytes(problem) * (MOST_THREADS // WARP + 1) > STATIC_SHARED:
        widest //= 2
    line = min(widest, max(1, LINE // (vector * layout.x.itemsize)))
    sector = min(widest, max(1, NARROW // (vector * layout.x.itemsize)))
    runs = problem.rows // width

    def units(lanes: int) -> int:
        return runs * -(-width // (lanes * vector))

    def sharing(lanes: int, vectors: int, *, held: bool) -> Sharing:
        slices = min(MOST_THREADS // lanes, power_of_two(-(-problem.columns // vectors)))
        slices = max(slices, LEAST_THREADS // lanes)
        why = f"{lanes * vector} rows side by side, {slices} threads each"
        beside, threads = ("kLanes", lanes), lanes * slices
        return Sharing("columns", units(lanes), threads, beside, vector, vectors, why, held=held)

    if not problem.reduces:
        # The widest tile whose rows can be held, so long as every multiprocessor has a block.
        for lanes in _halves(widest, sector):
            fills = units(lanes) >= gpu.multiprocessors or lanes == sector
            if fills and problem.columns <= MOST_THREADS // lanes * most:
                vectors = min(most, -(-problem.columns * lanes // MOST_THREADS))
                return sharing(lanes, vectors, held=True)
    vectors = min(STREAM_LOADS, max(1, COLUMNS_STREAM // registers))
    lanes = next(
        (one for one in _halves(widest, line) if units(one) >= 2 * gpu.multiprocessors), line
    )
    parts = _parts_wanted(problem, layout, gpu, units(lanes), lanes * vector)
    if parts > 1:
        beside, threads = ("kLanes", lanes), MOST_THREADS
        return _split("columns", problem, units(lanes), threads, beside, vector, vectors, parts)
    return sharing(lanes, vectors, held=False)


def _parts_wanted(problem: Problem, layout: Layout, gpu: Gpu, units: int, width: int = 1) -> int:
    """How many blocks should share a row, so that all rows together fill the card."""
    wanted = 2 * gpu.multiprocessors // max(1, units)
    worth = problem.columns * width * layout.x.itemsize // LEAST_PART
    return max(1, min(wanted, worth))


def _split(
    kernel: str,
    problem: Problem,
    units: int,
    threads: int,
    beside: tuple[str, int],
    vector: int,
    vectors: int,
    parts: int,
) -> Sharing:
    """Rows in parts for blocks that meet in a second launch only."""
    unit = 8  # columns: no vector crosses the border of a part
    part = -(-problem.columns // min(parts, MOST_SPLITS))
    part = -(-part // unit) * unit
    splits = -(-problem.columns // part)
    why = f"{splits} blocks for each row" if kernel == "rows" else f"{splits} blocks for each tile"
    return Sharing(kernel, units, threads, beside, vector, vectors, why, splits=splits, slice=part)


def _plan(
    problem: Problem,
    layout: Layout,
    sharing: Sharing,
    gpu: Gpu,
    copies: tuple[str, ...],
    *,
    partial: bool = False,
    finish: bool = False,
) -> Plan:
    elements = problem.rows * problem.columns
    operand = elements * layout.x.itemsize
    cluster = sharing.beside[1] if sharing.beside[0] == "kCluster" else 1
    if problem.reduces or partial or finish:
        reads, how = 1, "one read"
    elif sharing.held:
        reads, how = 1, "held in registers"
    else:
        reads, how = 2, "two reads"
    if partial:
        written = 0
    elif problem.reduces:
        written = problem.rows * (1 + problem.signed)
    else:
        written = elements
    return Plan(
        kernel=_kernel(problem, layout, sharing, gpu, partial, finish),
        grid=(sharing.units * cluster * sharing.splits, 1, 1),
        threads=sharing.threads,
        shared_memory=0,
        bytes=operand * (1 + problem.weighted) * reads + written * layout.out.itemsize,
        # Maximum, subtraction, exponential, sum, and what makes it an answer.
        operations=elements * (4 if problem.reduces or partial else 5),
        why=f"{sharing.why}, {how}; {sharing.vector * layout.x.itemsize} bytes a load",
        copies=copies,
    )


def _parts(problem: Problem, layout: Layout, sharing: Sharing, gpu: Gpu) -> Plan:
    """The launch that joins the states of rows' parts, a warp for each row."""
    kernel = _kernel(problem, layout, sharing, gpu, False, True)
    constants = dict(kernel.constants) | {"kThreads": LEAST_THREADS}
    return Plan(
        kernel=Kernel("_softmax/parts.cu", "softmax_parts", tuple(constants.items())),
        grid=(-(-problem.rows // (LEAST_THREADS // WARP)), 1, 1),
        threads=LEAST_THREADS,
        shared_memory=0,
        bytes=problem.rows * (sharing.splits * _state_bytes(problem) + layout.out.itemsize),
        operations=problem.rows * sharing.splits * 4,
        why="joins the parts of each row",
    )


def _kernel(
    problem: Problem, layout: Layout, sharing: Sharing, gpu: Gpu, partial: bool, finish: bool
) -> Kernel:
    walked = _walked(problem, layout)
    stages = (("kHeld", sharing.held), ("kPartial", partial), ("kFinish", finish))
    return Kernel(
        file=f"_softmax/{sharing.kernel}.cu",
        entry=f"softmax_{sharing.kernel}",
        constants=(
            ("Element", problem.dtype),
            ("Result", problem.result),
            ("Index", "uint32" if max(problem.rows, problem.columns) < 2**31 else "int64"),
            ("Operation", f"struct {OPERATIONS[problem.function][0]}"),
            ("kReduces", problem.reduces),
            ("kBeside", problem.weighted),
            ("kSigned", problem.signed),
            ("kOuterAxes", len(layout.outer)),
            ("kReducedAxes", len(layout.reduced)),
            ("kDense", _dense(layout, walked)),
            ("kRagged", sharing.ragged),
            ("kThreads", sharing.threads),
            ("kBlocks", _least_blocks(problem, layout, sharing, gpu)),
            sharing.beside,
            ("kVector", sharing.vector),
            ("kVectors", sharing.vectors),
            *(() if sharing.kernel == "cluster_rows" else stages),
        ),
    )


def _least_blocks(problem: Problem, layout: Layout, sharing: Sharing, gpu: Gpu) -> int:
    """Blocks that a multiprocessor must have room for: 64 registers a thread.

    One, which leaves it to the compiler, where that would spill: on sm_100 and later, and where
    addresses, parts of vectors or doubles of several rows need registers of their own.
    """
    if sharing.kernel == "columns":
        plain = words(problem) == 1
    else:
        plain = _dense(layout, _walked(problem, layout)) and not sharing.ragged
    return max(1, 1024 // sharing.threads) if plain and gpu.arch < 100 else 1


def _walked(problem: Problem, layout: Layout) -> list[Placement]:
    """The arrays that have an element for each element of x."""
    walked = [layout.x] + ([layout.weights] if layout.weights else [])
    return walked if problem.reduces else [*walked, layout.out]


def widest_vector(problem: Problem, layout: Layout, run: int, *, along_rows: bool) -> int:
    """The most elements of a run, up to 16 bytes, that every load and store can take at once."""

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

    walked = _walked(problem, layout)
    for vector in (8, 4, 2):
        if run % vector == 0 and all(takes(placement, vector) for placement in walked):
            return vector
    return 1


def ragged_vector(problem: Problem, layout: Layout) -> int:
    """The elements of 16 bytes, if rows are dense and begin alike between them in all arrays."""
    walked = _walked(problem, layout)
    vector = 16 // max(placement.itemsize for placement in walked)

    def begins(placement: Placement) -> list[int]:
        return [n % vector for n in (placement.phase // placement.itemsize, *placement.outer)]

    alike = all(
        placement.phase % placement.itemsize == 0 and begins(placement) == begins(layout.x)
        for placement in walked
    )
    return vector if alike and _dense(layout, walked) else 1


def _dense(layout: Layout, walked: list[Placement]) -> bool:
    return len(layout.reduced) == 1 and all(placement.reduced[-1] == 1 for placement in walked)


def _tile(problem: Problem, vector: int) -> int:
    """Loads whose elements a thread can hold in registers."""
    registers = vector * words(problem) * (1 + problem.weighted)
    return max(1, TILE_REGISTERS // (registers // 2 if _packed(problem, vector) else registers))


def _most_threads(problem: Problem, vector: int) -> int:
    """Threads of a block that holds a row."""
    return WIDE_THREADS if _packed(problem, vector) else MOST_THREADS


def _packed(problem: Problem, vector: int) -> bool:
    """Whether a held row's elements stay two to a register, as Held in rows.cuh has it."""
    return vector > 1 and problem.dtype in HALVES and not (problem.reduces or problem.weighted)


def _streamed(problem: Problem, vector: int) -> int:
    """Loads that a thread has in flight on its way through a row that it does not hold."""
    nbytes = vector * ITEMSIZE[problem.dtype] * (1 + problem.weighted)
    return min(STREAM_LOADS, max(1, STREAM_BYTES // nbytes))


def _state_bytes(problem: Problem) -> int:
    return OPERATIONS[problem.function][1] * 4 * words(problem)


def words(problem: Problem) -> int:
    """The 32-bit registers of a score."""
    return 2 if problem.dtype == "float64" else 1


def _halves(most: int, least: int) -> list[int]:
    """`most`, a power of two, and what halving it gives, down to `least`."""
    return [most >> i for i in range(most.bit_length()) if most >> i >= least]


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
