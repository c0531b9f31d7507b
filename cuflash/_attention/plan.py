"""Which kernel, with which tiles: the only place with heuristics."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..jit.gpu import Gpu
from ..jit.launch import Plan
from ..jit.source import Kernel
from .problem import Problem, sum_dtype

if TYPE_CHECKING:
    import cupy

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
BUCKETS = (32, 64, 96, 128, 192, 256)  # head dims that kernels are compiled for

# Where tensor cores are the faster way to full precision; elsewhere they gain nothing.
_TF32_ARCHS = (80, 90, 100, 103)
_DMMA_ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class AttentionPlan(Plan):
    """A launch of attention.

    Parameters
    ----------
    pack : int
        Query heads that share keys and whose rows alternate in a query tile.
    narrower : AttentionPlan or None
        The same with fewer keys a tile, for a variant that needs many registers.
    """

    pack: int = 1
    narrower: AttentionPlan | None = None

    def load(self) -> cupy.RawKernel:
        """The compiled kernel of what this settles to."""
        return super(AttentionPlan, self.settled()).load()

    def settled(self) -> AttentionPlan:
        """This plan, or the first narrower one whose kernel does not spill, or spills least."""
        if self.narrower is None:
            return self
        tried: list[tuple[int, AttentionPlan]] = []
        chosen: AttentionPlan | None = self
        while chosen is not None:
            spilled = _local_memory(chosen)
            if spilled == 0:
                return chosen
            tried.append((spilled, chosen))
            chosen = chosen.narrower
        return min(tried, key=lambda each: each[0])[1]


def _local_memory(chosen: AttentionPlan) -> int:
    """Bytes a thread of a kernel, compiled if need be: without arrays, it is what spills."""
    return int(Plan.load(chosen).local_size_bytes)


@dataclass(frozen=True)
class Tile:
    """How a thread block is cut.

    Parameters
    ----------
    queries, keys : int
        Rows of a query tile and of a key tile.
    warps : int
        Each holds ``queries / warps`` rows.
    stages : int
        Key tiles in shared memory at a time. With 2, the next tile is loaded beside all of this
        one's arithmetic; with 1, the next K beside softmax and P V, this one's V beside Q K^T.
    blocks : int
        Blocks a multiprocessor should hold, so that one's softmax hides under another's products;
        it bounds a thread's registers.
    columns : int
        Columns of V, and of the output, that a block works on: what its registers can hold.
    since : int
        The oldest architecture on which the registers hold it without spilling.
    query_stages : int
        Query tiles in shared memory at a time.
    drops : bool
        Whether the registers hold what dropout needs, too.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    blocks: int
    columns: int = 256
    since: int = 75
    query_stages: int = 1
    drops: bool = True


@dataclass(frozen=True)
class Engine:
    """A kernel file, its tiles, and what else it must be told.

    Parameters
    ----------
    file : str
    tiles : tuple of (int, Tile)
        Each with the largest head dim it serves, the best first.
    rows : str
        The constant that says how many times ``rows_at_once`` rows a warp (or thread) holds.
    rows_at_once : int
    operand_bytes : int
        Of an element in shared memory; 0 where it is as in device memory.
    constants : tuple of (str, bool or str)
    loaders : int
        Warps of a block beside those that have rows.
    box : int
        Columns in shared memory are a multiple of this, and head dims at least as large.
    barriers : int
        Bytes of shared memory behind the tiles.
    persistent : bool
        Blocks, one for each place on the GPU, go through all query tiles.
    exact : bool
        As of a Kernel.
    """

    file: str
    tiles: tuple[tuple[int, Tile], ...]
    rows: str = "kRowTiles"
    rows_at_once: int = 16
    operand_bytes: int = 0
    constants: tuple[tuple[str, bool | str], ...] = ()
    loaders: int = 0
    box: int = 1
    barriers: int = 0
    persistent: bool = False
    exact: bool = False


# Where blocks go through many query tiles, what they have to do is foreseen:
MOST_FORESEEN = 1 << 16  # up to so many query tiles
WARPGROUP = 64  # rows of one
CHANGE = 1.0  # going on to the next one costs as much as so many key tiles
ALONE = 0.3  # of a whole tile's cost, the part that one with fewer warpgroups at work has, too
EVEN = 1.01  # what the busiest block has to do, as a multiple of the mean, that needs no improving
TRIED = 48  # the largest group of heads that is tried
AT_ONCE = 4  # blocks at least that read a head's K and V at a time where L2 cannot keep them
MOST_PACKED = 16  # query heads in the rows of a tile: a warp has whole packs
FEW_QUERIES = 1024  # beyond that, few of a tile's rows are empty
WEIGHTS_FIRST = 128  # columns of V up to which registers hold the scores until the end
# One block a multiprocessor, whose loaders leave their registers to the others.
_HOPPER = Engine(
    "_attention/forward_sm90.cu",
    (
        (64, Tile(192, 128, 12, 4, 1, query_stages=2, drops=False)),
        (64, Tile(192, 96, 12, 4, 1, query_stages=2)),
        (64, Tile(192, 64, 12, 4, 1, query_stages=2)),
        (128, Tile(128, 128, 8, 2, 1, query_stages=2)),
        (128, Tile(128, 96, 8, 2, 1, query_stages=2)),
        (128, Tile(128, 64, 8, 2, 1, query_stages=2)),
        (192, Tile(128, 96, 8, 2, 1)),
        (192, Tile(128, 64, 8, 2, 1)),
        (256, Tile(128, 80, 8, 2, 1, drops=False)),
        (256, Tile(128, 64, 8, 2, 1)),
    ),
    loaders=4,
    box=64,
    barriers=768,
    persistent=True,
    exact=True,
)
# Two 16-row blocks a warp halve what shared memory must deliver for each product; one, where O is
# too wide for the registers. docs/kernel.rst has the measurements.
_MMA = Engine(
    "_attention/forward_mma.cu",
    (
        (64, Tile(128, 128, 4, 2, 2, since=90, drops=False)),
        (64, Tile(128, 96, 4, 2, 2)),
        (64, Tile(128, 64, 4, 2, 2)),
        (64, Tile(64, 64, 4, 1, 2)),
        (96, Tile(128, 64, 4, 2, 2)),
        (128, Tile(128, 64, 4, 2, 2, drops=False)),
        (128, Tile(128, 64, 4, 1, 2, drops=False)),
        (128, Tile(128, 32, 4, 1, 2, drops=False)),
        (128, Tile(128, 32, 4, 1, 1, drops=False)),
        (128, Tile(64, 64, 4, 2, 2)),
        (256, Tile(64, 64, 4, 1, 2)),
        (256, Tile(64, 32, 4, 1, 2)),
        (256, Tile(64, 32, 4, 1, 1, drops=False)),
        (256, Tile(64, 16, 4, 1, 1)),
    ),
)
_TF32_TILES = (
    (64, Tile(128, 32, 4, 2, 2)),
    (128, Tile(64, 32, 4, 2, 2)),
    (128, Tile(64, 32, 4, 1, 2)),
    (128, Tile(64, 16, 4, 1, 2)),
    (256, Tile(64, 16, 4, 1, 2)),
    (256, Tile(64, 16, 4, 1, 1)),
)
_TF32 = Engine("_attention/forward_fp32.cu", _TF32_TILES, constants=(("kSplit", False),))
_TF32_SPLIT = Engine("_attention/forward_fp32.cu", _TF32_TILES, constants=(("kSplit", True),))
_DMMA = Engine(
    "_attention/forward_fp64.cu",
    (
        (64, Tile(128, 64, 8, 1, 1, drops=False)),
        (64, Tile(128, 32, 8, 1, 1)),
        (128, Tile(128, 16, 8, 1, 1)),
        (128, Tile(64, 16, 4, 1, 1)),
        (256, Tile(64, 16, 4, 1, 1, columns=128)),
        (256, Tile(32, 16, 2, 1, 1, columns=128)),
    ),
)
_SIMT_FLOAT = Engine(
    "_attention/forward_simt.cu",
    (
        (64, Tile(128, 32, 4, 1, 2)),
        (64, Tile(128, 32, 4, 1, 1)),
        (128, Tile(64, 16, 4, 1, 2)),
        (128, Tile(64, 16, 4, 1, 1)),
        (256, Tile(32, 16, 2, 1, 2)),
        (256, Tile(32, 16, 2, 1, 1)),
    ),
    rows="kThreadRows",
    rows_at_once=4,
    operand_bytes=4,
    constants=(("Number", "float32"),),
)
_SIMT_DOUBLE = Engine(
    "_attention/forward_simt.cu",
    (
        (64, Tile(32, 32, 2, 1, 2)),
        (64, Tile(32, 32, 2, 1, 1)),
        (128, Tile(16, 16, 2, 1, 2)),
        (128, Tile(16, 16, 2, 1, 1)),
        (256, Tile(16, 8, 2, 1, 1)),
    ),
    rows="kThreadRows",
    rows_at_once=4,
    operand_bytes=8,
    constants=(("Number", "float64"),),
)


@functools.lru_cache(maxsize=4096)
def choose(
    problem: Problem,
    gpu: Gpu,
    output: str,
    copies: tuple[str, ...] = (),
    obstacle: str | None = None,
    stored_by_tma: bool = True,
    packs: bool = True,
) -> AttentionPlan:
    """Plan one launch.

    Parameters
    ----------
    problem : Problem
    gpu : Gpu
    output : str
        The dtype of ``out``.
    copies : tuple of str
        Operands that have to be copied first.
    obstacle : str or None
        What keeps Hopper's copy engine from reading the operands.
    stored_by_tma : bool
        Whether nothing keeps it from writing the output.
    packs : bool
        Whether it can bring heads that share keys as rows of one tile.
    """
    engine, why = _engine(problem, gpu, obstacle)
    if problem.variant.steps:
        why = f"{why}; with {problem.variant}"
    if problem.dropout:
        why = f"{why}; with dropout"

    def planned(tile: Tile) -> AttentionPlan:
        if not engine.persistent:
            return plan(problem, output, engine, tile, why, copies)
        fits = shared_memory(engine, problem, tile, staged=True) <= gpu.shared_memory_per_block
        staged = stored_by_tma and BYTES[output] == 2 and fits
        places = tile.blocks * gpu.multiprocessors
        # Packed heads' rows alternate, but dropout decides about pairs of rows of one head.
        pack = best_pack(problem, tile, places) if packs and not problem.dropout else 1
        return plan(problem, output, engine, tile, why, copies, places, staged, pack)

    first, *others = _tiles(engine, problem, gpu)
    chosen: AttentionPlan | None = None
    for tile in reversed(others):
        chosen = replace(planned(tile), narrower=chosen)
    return replace(planned(first), narrower=chosen)


def _engine(problem: Problem, gpu: Gpu, obstacle: str | None) -> tuple[Engine, str]:
    """The engine, and the reason."""
    dtype, arch = problem.dtype, gpu.arch
    if uses_hopper(problem, gpu):
        if obstacle is None:
            return _HOPPER, f"{dtype} on Hopper's own instructions"
        return _MMA, f"{dtype} on the tensor cores; not Hopper's own instructions: {obstacle}"
    if dtype == "float16" or (dtype == "bfloat16" and arch >= 80):
        return _MMA, f"{dtype} on the tensor cores"
    if dtype == "bfloat16":
        return _SIMT_FLOAT, "bfloat16 in float32: no tensor cores for it"
    if dtype == "float64":
        if arch in _DMMA_ARCHS:
            return _DMMA, "float64 on its tensor cores"
        return _SIMT_DOUBLE, "float64 on the FMA units: no tensor cores for it"
    if problem.precision == "tf32" and arch >= 80:
        return _TF32, "precision='tf32'"
    if arch in _TF32_ARCHS:
        return _TF32_SPLIT, "float32 as sums of two TF32 numbers, three products each"
    return _SIMT_FLOAT, "float32 on the FMA units: TF32 is no faster here"


def is_hopper(chosen: Plan) -> bool:
    """Whether a plan is of the kernel that takes tensor maps."""
    return chosen.kernel.file == _HOPPER.file


def uses_hopper(problem: Problem, gpu: Gpu) -> bool:
    """Whether wgmma and TMA are for such a problem, if nothing about its operands is against it."""
    return gpu.arch == 90 and not gpu.forced and problem.dtype in ("float16", "bfloat16")


def head_dims(engine: Engine, problem: Problem, tile: Tile) -> tuple[int, int]:
    """(kHeadDim, kHeadDimV): buckets, the second no larger than the first nor than tile.columns."""
    d, d_v = (
        next(size for size in BUCKETS if size >= max(dim, engine.box))
        for dim in (problem.head_dim, problem.head_dim_v)
    )
    return max(d, d_v), min(d_v, tile.columns)


def _tiles(engine: Engine, problem: Problem, gpu: Gpu) -> list[Tile]:
    """The first tile that serves the head dims and of which enough blocks fit.

    Behind it, for variants, those of fewer and fewer keys, in case that the first one spills.
    """
    found: list[Tile] = []
    widest = max(problem.head_dim, problem.head_dim_v)
    reserved = gpu.shared_memory_per_multiprocessor - gpu.shared_memory_per_block  # of each block's
    for head_dim, tile in engine.tiles:
        serves = widest <= head_dim and tile.since <= gpu.arch and tile.drops >= problem.dropout
        together = tile.blocks * (shared_memory(engine, problem, tile) + reserved)
        if not serves or together > gpu.shared_memory_per_multiprocessor:
            continue
        if not found or (problem.variant.steps and tile.keys < found[-1].keys):
            found.append(tile)
    if not found:
        raise RuntimeError(f"no tile of {engine.file} serves head dim {widest} on {gpu.name}")
    return found


def best_pack(problem: Problem, tile: Tile, places: int) -> int:
    """How many heads that share keys are rows of one tile: as few as spare a round of blocks."""
    if problem.len_q > FEW_QUERIES:
        return 1
    sizes = [2**i for i in range(MOST_PACKED.bit_length()) if problem.group % 2**i == 0]

    def rounds(pack: int) -> int:
        tiles = -(-problem.len_q * pack // tile.queries)
        return -(-tiles * (pairs_of_heads(problem) // pack) // places)

    return min(sizes, key=rounds)


def shared_memory(engine: Engine, problem: Problem, tile: Tile, staged: bool = False) -> int:
    """Bytes a block: Q, then each stage's K and V, then O where it is staged, then barriers."""
    size = engine.operand_bytes or BYTES[problem.dtype]
    d, d_v = (-(-dim // engine.box) * engine.box for dim in head_dims(engine, problem, tile))
    queries = tile.query_stages * tile.queries
    elements = queries * d + tile.stages * tile.keys * (d + d_v) + staged * tile.queries * d_v
    return size * elements + engine.barriers


def plan(
    problem: Problem,
    output: str,
    engine: Engine,
    tile: Tile,
    why: str,
    copies: tuple[str, ...],
    places: int | None = None,
    staged: bool = False,
    pack: int = 1,
) -> AttentionPlan:
    """Spell out a chosen tile as a launch, of as many blocks at most as there are places."""
    d, d_v = head_dims(engine, problem, tile)
    slices = -(-problem.head_dim_v // d_v)
    tiles = -(-problem.len_q * pack // tile.queries)
    pairs = pairs_of_heads(problem)
    blocks = tiles * slices * (pairs // pack)
    if blocks >= 2**31:
        raise ValueError(
            f"`q` has {problem.len_q} rows in each of {pairs} heads, over all "
            f"batches: {blocks} thread blocks, where fewer than 2**31 can be launched"
        )
    constants: dict[str, bool | int | str] = {
        "Element": problem.dtype,
        "Output": output,
        "kHeadDim": d,
        "kHeadDimV": d_v,
        "kSlices": slices,
        "kBlockM": tile.queries,
        "kBlockN": tile.keys,
        "kThreads": 32 * tile.warps,
        "kStages": tile.stages,
        "kMinBlocks": tile.blocks,
        engine.rows: tile.queries // tile.warps // engine.rows_at_once,
        "kDropout": problem.dropout,
    }
    if engine.persistent:
        constants |= {"kQStages": tile.query_stages, "kStaged": staged}
        holds_scores = d_v <= WEIGHTS_FIRST and not problem.variant.reworks
        # Where O is stored from registers, they hold either the scores or what dropout needs.
        constants["kWeightsFirst"] = holds_scores and (staged or not problem.dropout)
    return AttentionPlan(
        kernel=Kernel(
            engine.file,
            "attention_forward",
            (*constants.items(), *engine.constants),
            exact=engine.exact,
            generated=problem.variant.text,
        ),
        grid=(blocks if places is None else min(blocks, places), 1, 1),
        threads=32 * (tile.warps + engine.loaders),
        shared_memory=shared_memory(engine, problem, tile, staged),
        bytes=traffic(problem, output),
        operations=2 * (problem.head_dim + problem.head_dim_v) * visible(problem) * pairs,
        why=why,
        copies=copies,
        pack=pack,
    )


_WARPS = 4  # of a block of tiles.cu, each for 32 key tiles of a query tile


def tiles(problem: Problem, chosen: AttentionPlan) -> Plan:
    """Plan what finds out which tiles of an attention launch its variants' masks leave."""
    words = tile_words(problem, chosen)
    warps = query_tiles(problem, chosen) * (pairs_of_heads(problem) // chosen.pack) * words
    return Plan(
        kernel=Kernel(
            "_attention/tiles.cu",
            "attention_tiles",
            chosen.kernel.constants,
            generated=problem.variant.text + problem.variant.tiles,
        ),
        grid=(-(-warps // _WARPS), 1, 1),
        threads=32 * _WARPS,
        shared_memory=0,
        bytes=8 * warps,
        operations=0,
        why="masks on ranges of places: which tiles are empty, and which whole",
    )


def tile_words(problem: Problem, chosen: AttentionPlan) -> int:
    """Words of a bit for each key tile."""
    keys = int(dict(chosen.kernel.constants)["kBlockN"])
    return max(1, -(-problem.len_k // (32 * keys)))


PARTS = 64  # that one launch merges


def merge(dtype: str, output: str, shape: tuple[int, ...], copies: tuple[str, ...] = ()) -> Plan:
    """Plan the merging of partial results of `shape`."""
    elements = math.prod(shape)
    constants = (("Element", dtype), ("Output", output), ("kParts", PARTS))
    return Plan(
        kernel=Kernel("_attention/combine.cu", "attention_combine", constants),
        grid=(-(-elements // 256), 1, 1),
        threads=256,
        shared_memory=0,
        bytes=elements * (BYTES[dtype] + BYTES[output]),
        operations=4 * elements,
        why="a thread an element, the parts one after another",
        copies=copies,
    )


@functools.lru_cache(maxsize=4096)
def sweep(problem: Problem, gpu: Gpu, chosen: AttentionPlan) -> int:
    """How many (batch, head) pairs advance through their query tiles together, packed heads as one.

    Where rows see different numbers of keys, blocks with most work start first, in groups of heads
    whose K and V fill half of L2; otherwise a head's tiles follow one another and share its keys.
    Where blocks go through many tiles, the group is the smallest with which they have as much to
    do as one another, or the best that was tried: what they read at a time is of few heads then.
    """
    size = BYTES[problem.dtype] * problem.len_k * (problem.head_dim + problem.head_dim_v)
    pairs, group = pairs_of_heads(problem) // chosen.pack, problem.group // chosen.pack
    together = min(pairs, max(1, gpu.l2_bytes // 2 // max(size, 1) * group))
    if not is_hopper(chosen) or query_tiles(problem, chosen) * pairs > MOST_FORESEEN:
        return 1 if problem.left is None and problem.right is None else together
    costs, blocks = tile_costs(problem, chosen), chosen.grid[0]
    if np.ptp(costs) == 0 or len(costs) * pairs <= blocks:
        return 1
    found = {}
    for heads in range(1, min(pairs, TRIED, max(together, blocks // AT_ONCE)) + 1):
        found[heads] = imbalance(costs, pairs, heads, blocks)
        if found[heads] <= EVEN:
            return heads
    return min(found, key=lambda heads: round(found[heads], 2))


def query_tiles(problem: Problem, chosen: AttentionPlan) -> int:
    """Query tiles of one head, or of one pack of them."""
    return -(-problem.len_q * chosen.pack // int(dict(chosen.kernel.constants)["kBlockM"]))


def tile_costs(problem: Problem, chosen: AttentionPlan) -> np.ndarray:
    """What each query tile of a head costs, from the last to the first, in key tiles."""
    constants = dict(chosen.kernel.constants)
    queries, keys, pack = int(constants["kBlockM"]), int(constants["kBlockN"]), chosen.pack
    rows, len_k, start = problem.len_q * pack, problem.len_k, first_position(problem)
    top = np.arange(0, rows, queries)[::-1]
    bottom = np.minimum(top + queries, rows) - 1
    groups = -(-(bottom + 1 - top) // WARPGROUP) / (queries // WARPGROUP)
    top, bottom = top // pack, bottom // pack  # what was a row of a tile is a query now
    begin, end = np.zeros_like(top), np.full_like(top, len_k)
    if problem.left is not None:
        begin = np.clip(start + top - problem.left, 0, len_k)
    if problem.right is not None:
        end = np.clip(start + bottom + problem.right + 1, 0, len_k)
    costs = ((end - 1) // keys + 1 - begin // keys) * (ALONE + (1 - ALONE) * groups) + CHANGE
    return np.where(end > begin, costs, 0.0)


def imbalance(costs: np.ndarray, pairs: int, together: int, blocks: int) -> float:
    """What the busiest block has to do, as a multiple of the mean: blocks go to and fro."""
    groups, rest = divmod(pairs, together)
    whole = np.tile(np.repeat(costs, together), groups)
    work = np.concatenate([whole, np.repeat(costs, rest)])
    rounds = np.append(work, np.zeros(-len(work) % blocks)).reshape(-1, blocks)
    rounds[1::2] = rounds[1::2, ::-1]
    return float(rounds.sum(0).max() * blocks / max(work.sum(), 1.0))


def pairs_of_heads(problem: Problem) -> int:
    """Heads, over all batches."""
    return problem.heads * math.prod(problem.batch)


def first_position(problem: Problem) -> int:
    """Where the first query stands among the keys, with all of len_k where lengths are arrays."""
    return problem.len_k - problem.len_q if problem.q_start is None else problem.q_start


def visible(problem: Problem) -> int:
    """Scores of one head that are not masked, with all of len_k where lengths are arrays."""
    len_q, len_k, start = problem.len_q, problem.len_k, first_position(problem)
    end = len_k * len_q
    if problem.right is not None:
        end = _clamped_sum(start + problem.right + 1, len_q, len_k)
    begin = 0 if problem.left is None else _clamped_sum(start - problem.left, len_q, len_k)
    return end - begin


def _clamped_sum(first: int, count: int, limit: int) -> int:
    """The sum of first, first + 1, ..., `count` of them, each clamped to [0, limit]."""
    rising = range(max(first, 0), max(min(first + count, limit), max(first, 0)))
    capped = max(0, min(count, first + count - limit))
    return (rising.start + rising.stop - 1) * len(rising) // 2 + limit * capped


def traffic(problem: Problem, output: str) -> int:
    """Bytes of device memory: each operand read once, each result written once."""
    rows = pairs_of_heads(problem) * problem.len_q
    keys = pairs_of_heads(problem) // max(problem.group, 1) * problem.len_k
    inputs = rows * problem.head_dim + keys * (problem.head_dim + problem.head_dim_v)
    lse = rows * BYTES[sum_dtype(problem.dtype)] if problem.return_lse else 0
    return BYTES[problem.dtype] * inputs + BYTES[output] * rows * problem.head_dim_v + lse
