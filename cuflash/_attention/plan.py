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
BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512)  # head dims that kernels are compiled for
WIDE = 256  # wider ones are rare: kernels for them have so many columns of V, or as many as of K

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
    streamed : int or None
        The variant's slot whose array blocks have brought to shared memory, tile by tile.
    """

    pack: int = 1
    streamed: int | None = None
    narrower: AttentionPlan | None = None

    def load(self) -> cupy.RawKernel:
        """The compiled kernel of what this settles to."""
        return super(AttentionPlan, self.settled()).load()

    def candidates(self) -> list[AttentionPlan]:
        """This plan and all narrower ones."""
        return [self, *([] if self.narrower is None else self.narrower.candidates())]

    def settled(self) -> AttentionPlan:
        """This plan, or the first narrower one whose kernel does not spill, or spills least."""
        if self.narrower is None:
            return self
        tried: list[tuple[int, AttentionPlan]] = []
        for chosen in self.candidates():
            spilled = _local_memory(chosen)
            if spilled == 0:
                return chosen
            tried.append((spilled, chosen))
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
        Each holds ``queries / warps`` rows. A block has as many for each of its `parts`.
    stages : int
        Key tiles in shared memory at a time. With 2, the next tile is loaded beside all of this
        one's arithmetic; with 1, the next K beside softmax and P V, this one's V beside Q K^T.
    blocks : int
        Blocks a multiprocessor should hold, so that one's softmax hides under another's products;
        it bounds a thread's registers.
    columns : int
        Columns of V, and of the output, that a warp works on: what its registers can hold.
    since : int
        The oldest architecture on which the registers hold it without spilling.
    query_stages : int
        Query tiles in shared memory at a time.
    parts : int
        Into how many parts of `columns` a block may cut V, each for warps of its own. What is
        wider still is cut into slices, each for a block of its own.
    for_blocks : bool
        Only for masks of blocks that it divides and the tiles before it do not.
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
    parts: int = 1
    for_blocks: bool = False
    drops: bool = True

    def divides(self, blocks: tuple[tuple[int, int], ...]) -> bool:
        """Whether it lies within one block, of each of some sizes."""
        return all(q % self.queries == 0 and k % self.keys == 0 for q, k in blocks)


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
    streaming : tuple of (int, Tile)
        Those that leave room for a tile of a variant's array, as ``tiles``.
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
    streaming: tuple[tuple[int, Tile], ...] = ()


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
SORTERS = 1024  # threads of sequences.cu and order.cu, of one block
# Words of bits that order.cu reads: 5 to 11 microseconds. A thread has 64 query tiles at most, and
# a bit for each.
MOST_ORDERED = 64 * SORTERS
# Instructions of masks for each score, from which on a copy for each of them takes too long to
# compile (docs/hopper.rst): they are evaluated in a loop then.
LONG_MASK = 16
WEIGHTS_FIRST = 128  # columns of V up to which registers hold the scores until the end
# One block a multiprocessor, whose loaders leave their registers to the others.
_HOPPER = Engine(
    "_attention/forward_sm90.cu",
    (
        (64, Tile(192, 128, 12, 4, 1, query_stages=2, drops=False)),
        (64, Tile(192, 96, 12, 4, 1, query_stages=2)),
        (64, Tile(192, 64, 12, 4, 1, query_stages=2)),
        # A tile of 192 rows lies across two rows of blocks of 128, and visits what is in either: in
        # 384 rows 2 x 192 x 2p of the keys, where p of the blocks are there and none of them above
        # one another, but 3 x 128 x p in tiles of 128.
        (64, Tile(128, 128, 8, 4, 1, query_stages=2, for_blocks=True)),
        (64, Tile(128, 64, 8, 4, 1, query_stages=2, for_blocks=True)),
        (128, Tile(128, 128, 8, 2, 1, query_stages=2)),
        (128, Tile(128, 96, 8, 2, 1, query_stages=2)),
        (128, Tile(128, 64, 8, 2, 1, query_stages=2)),
        (192, Tile(128, 96, 8, 2, 1)),
        (192, Tile(128, 64, 8, 2, 1)),
        (256, Tile(128, 80, 8, 2, 1, drops=False)),
        (256, Tile(128, 64, 8, 2, 1)),
    ),
    # A place for the next Q makes room at 128, and one for K and V at 64: docs/hopper.rst.
    streaming=(
        (64, Tile(192, 128, 12, 3, 1, query_stages=2)),
        (64, Tile(192, 96, 12, 3, 1, query_stages=2)),
        (64, Tile(192, 64, 12, 4, 1, query_stages=2)),
        (128, Tile(128, 128, 8, 2, 1)),
        (128, Tile(128, 64, 8, 2, 1, query_stages=2)),
        (192, Tile(128, 96, 8, 2, 1)),
        (192, Tile(128, 64, 8, 2, 1)),
        (256, Tile(128, 64, 8, 2, 1)),
    ),
    loaders=4,
    box=64,
    barriers=784,
    persistent=True,
    exact=True,
)
# Two 16-row blocks a warp halve what shared memory must deliver for each product; one, where O is
# too wide for the registers. docs/kernel.rst has the measurements; tiles beyond 256 follow from
# arithmetic alone (docs/wide_and_dropout.rst), and nobody has timed them.
_MMA = Engine(
    "_attention/forward_mma.cu",
    (
        (64, Tile(128, 128, 4, 2, 2, since=90, drops=False)),
        (64, Tile(128, 96, 4, 2, 2, drops=False)),
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
        (512, Tile(64, 64, 4, 1, 1, parts=2, drops=False)),
        (512, Tile(64, 32, 4, 1, 1, parts=2)),
        (512, Tile(64, 16, 4, 1, 1, parts=2)),
        (512, Tile(32, 16, 2, 1, 1, parts=2)),
        (512, Tile(128, 64, 8, 1, 1)),
        (512, Tile(64, 32, 4, 1, 1)),
        (512, Tile(64, 16, 4, 1, 1)),
        (512, Tile(32, 16, 2, 1, 1)),
    ),
)
_TF32_TILES = (
    (64, Tile(128, 32, 4, 2, 2)),
    (128, Tile(64, 32, 4, 2, 2)),
    (128, Tile(64, 32, 4, 1, 2)),
    (128, Tile(64, 16, 4, 1, 2)),
    (256, Tile(64, 16, 4, 1, 2)),
    (256, Tile(64, 16, 4, 1, 1)),
    (512, Tile(64, 16, 4, 1, 1, parts=2, drops=False)),
    (512, Tile(32, 16, 2, 1, 1, parts=2)),
    (512, Tile(64, 16, 4, 1, 1)),
    (512, Tile(32, 16, 2, 1, 1)),
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
        (512, Tile(32, 8, 2, 1, 1, columns=128, parts=4)),
        (512, Tile(16, 8, 1, 1, 1, columns=128, parts=4)),
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
        (512, Tile(32, 16, 4, 1, 1, columns=512)),
        (512, Tile(32, 8, 4, 1, 1, columns=512)),
        (512, Tile(16, 8, 4, 1, 1, columns=512)),
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
        (512, Tile(8, 8, 2, 1, 1, columns=512)),
        (512, Tile(4, 8, 1, 1, 1, columns=128, parts=2)),
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
    streams: int | None = None,
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
    streams : int or None
        The variant's slot whose array it can bring.
    """
    engine, why = _engine(problem, gpu, obstacle)
    if problem.variant.steps:
        why = f"{why}; with {problem.variant}"
    if problem.dropout:
        why = f"{why}; with dropout"
    names = [name for step in problem.variant.steps for name, _ in step.kinds]  # of the slots

    def planned(tile: Tile, streamed: int | None = None) -> AttentionPlan:
        if not engine.persistent:
            return plan(problem, output, engine, tile, why, copies)
        size = shared_memory(engine, problem, tile, True, streamed is not None)
        staged = stored_by_tma and BYTES[output] == 2 and size <= gpu.shared_memory_per_block
        places = tile.blocks * gpu.multiprocessors
        # Packed heads' rows alternate, but blocks may be a head's own, dropout decides about pairs
        # of rows of one head, and tiles of a bias are of one head.
        apart = problem.dropout or (problem.variant.blocks and problem.variant.mask_names("h"))
        apart = apart or streamed is not None
        pack = best_pack(problem, tile, places) if packs and not apart else 1
        reason = why if streamed is None else f"{why}; {names[streamed]} by tiles"
        return plan(problem, output, engine, tile, reason, copies, places, staged, pack, streamed)

    found = [planned(tile) for tile in _tiles(engine, problem, gpu)]
    if not found:
        raise RuntimeError(
            f"no tile of {engine.file} serves head dim {widest(problem)} on {gpu.name}"
        )
    if streams is not None and engine.streaming and found[0].pack == 1:
        tiles = _tiles(engine, problem, gpu, streamed=True)
        blocks = problem.variant.blocks
        divide = [each[0].divides(blocks) for each in (tiles, _tiles(engine, problem, gpu))]
        if divide != [False, True]:  # tiles across blocks would visit up to twice as many
            found = [planned(tile, streams) for tile in tiles] + found
    chosen = found.pop()
    while found:
        chosen = replace(found.pop(), narrower=chosen)
    return chosen


def _engine(problem: Problem, gpu: Gpu, obstacle: str | None) -> tuple[Engine, str]:
    """The engine, and the reason."""
    dtype, arch = problem.dtype, gpu.arch
    if _has_hopper(problem, gpu):
        if widest(problem) > WIDE:
            obstacle = f"head dim {widest(problem)} is beyond {WIDE}"
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
    if problem.precision == "tf32" and arch >= 80 and _tiles(_TF32, problem, gpu):
        return _TF32, "precision='tf32'"
    if arch in _TF32_ARCHS:
        return _TF32_SPLIT, "float32 as sums of two TF32 numbers, three products each"
    return _SIMT_FLOAT, "float32 on the FMA units: TF32 is no faster here"


def is_hopper(chosen: Plan) -> bool:
    """Whether a plan is of the kernel that takes tensor maps."""
    return chosen.kernel.file == _HOPPER.file


def uses_hopper(problem: Problem, gpu: Gpu) -> bool:
    """Whether wgmma and TMA are for such a problem, if nothing about its operands is against it."""
    return _has_hopper(problem, gpu) and widest(problem) <= WIDE


def _has_hopper(problem: Problem, gpu: Gpu) -> bool:
    """Whether wgmma and TMA are there, for such a dtype."""
    return gpu.arch == 90 and not gpu.forced and problem.dtype in ("float16", "bfloat16")


def widest(problem: Problem) -> int:
    """The larger head dim of the two."""
    return max(problem.head_dim, problem.head_dim_v)


def head_dims(engine: Engine, problem: Problem, tile: Tile) -> tuple[int, int]:
    """(kHeadDim, kHeadDimV): buckets, the second no larger than the first nor than a block has."""
    d, d_v = (
        next(size for size in BUCKETS if size >= max(dim, engine.box))
        for dim in (problem.head_dim, problem.head_dim_v)
    )
    d = max(d, d_v)
    if d > WIDE:
        d_v = d if d_v > WIDE else WIDE
    return d, min(d_v, tile.columns * tile.parts)


def parts(engine: Engine, problem: Problem, tile: Tile) -> int:
    """Into how many parts a block cuts its columns of V."""
    return -(-head_dims(engine, problem, tile)[1] // tile.columns)


def _tiles(engine: Engine, problem: Problem, gpu: Gpu, streamed: bool = False) -> list[Tile]:
    """The first tile that serves the head dims and of which enough blocks fit, if there is one.

    Where a mask is made of blocks, it is the first one that divides them, if there is one: tiles
    across several blocks visit what is in any of them, and have to look into each. Behind it, for
    variants, come those of fewer and fewer keys, in case that the first one spills.
    """
    blocks = problem.variant.blocks
    serving = _serving(engine, problem, gpu, streamed)
    dividing = [tile for tile in serving if blocks and tile.divides(blocks)]
    found: list[Tile] = []
    for tile in dividing or [tile for tile in serving if not tile.for_blocks]:
        if not found or (problem.variant.steps and tile.keys < found[-1].keys):
            found.append(tile)
    return found


def _serving(engine: Engine, problem: Problem, gpu: Gpu, streamed: bool) -> list[Tile]:
    """The tiles that serve the head dims and of which enough blocks fit, the best first."""
    found: list[Tile] = []
    reserved = gpu.shared_memory_per_multiprocessor - gpu.shared_memory_per_block  # of each block's
    for head_dim, tile in engine.streaming if streamed else engine.tiles:
        serves = widest(problem) <= head_dim and tile.since <= gpu.arch
        serves = serves and tile.drops >= problem.dropout
        if tile.parts > 1:  # without a second part, half the warps would be missing
            serves = serves and parts(engine, problem, tile) > 1
        size = shared_memory(engine, problem, tile, streamed=streamed)
        together = tile.blocks * (size + reserved)
        if serves and together <= gpu.shared_memory_per_multiprocessor:
            found.append(tile)
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


def shared_memory(
    engine: Engine, problem: Problem, tile: Tile, staged: bool = False, streamed: bool = False
) -> int:
    """Bytes a block: Q, each stage's K and V, O where it is staged, a variant's tile, barriers."""
    size = engine.operand_bytes or BYTES[problem.dtype]
    d, d_v, keys = (
        -(-dim // engine.box) * engine.box for dim in (*head_dims(engine, problem, tile), tile.keys)
    )
    queries = tile.query_stages * tile.queries
    elements = queries * d + tile.stages * tile.keys * (d + d_v)
    elements += tile.queries * (staged * d_v + streamed * keys)
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
    streamed: int | None = None,
) -> AttentionPlan:
    """Spell out a chosen tile as a launch, of as many blocks at most as there are places."""
    d, d_v = head_dims(engine, problem, tile)
    slices = -(-problem.head_dim_v // d_v)
    warps = tile.warps * parts(engine, problem, tile)
    tiles = most_query_tiles(problem, tile.queries, pack)
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
        "kThreads": 32 * warps,
        "kStages": tile.stages,
        "kMinBlocks": tile.blocks,
        "kVarlen": problem.varlen,
        engine.rows: tile.queries // tile.warps // engine.rows_at_once,
        "kDropout": problem.dropout,
        "kMaskInLoop": (problem.variant.mask_instructions or 0) > LONG_MASK,
    }
    if engine.persistent:
        constants |= {"kQStages": tile.query_stages, "kStaged": staged}
        # What becomes of scores takes registers of its own: 28 to 328 bytes would spill.
        holds_scores = d_v <= WEIGHTS_FIRST and not problem.variant.has_score
        # Where O is stored from registers, they hold either the scores or what dropout needs.
        constants["kWeightsFirst"] = holds_scores and (staged or not problem.dropout)
        # Of three warpgroups each has too few registers, and with dropout it was slower.
        constants["kHalfAhead"] = tile.queries < 3 * WARPGROUP and not problem.dropout
    variant = problem.variant
    if variant.blocks_decide:  # then a tile has one element of each, and is known exactly
        constants["kWholeBlocks"] = tile.divides(variant.blocks)
    text = variant.text if streamed is None else variant.streaming(streamed)
    return AttentionPlan(
        kernel=Kernel(
            engine.file,
            "attention_forward",
            (*constants.items(), *engine.constants),
            exact=engine.exact,
            generated=text,
        ),
        grid=(blocks if places is None else min(blocks, places), 1, 1),
        threads=32 * (warps + engine.loaders),
        shared_memory=shared_memory(engine, problem, tile, staged, streamed is not None),
        bytes=traffic(problem, output),
        operations=2 * (problem.head_dim + problem.head_dim_v) * visible(problem) * pairs,
        why=why,
        copies=copies,
        pack=pack,
        streamed=streamed,
    )


@functools.lru_cache(maxsize=4096)
def sweep(problem: Problem, gpu: Gpu, chosen: AttentionPlan, by_head: bool = False) -> int:
    """How many (batch, head) pairs advance through their query tiles together, packed heads as one.

    Where rows see different numbers of keys, blocks with most work start first, in groups of heads
    whose K and V fill half of L2; otherwise a head's tiles follow one another and share its keys.
    Where blocks go through many tiles, the group is the smallest with which they have as much to
    do as one another, or the best that was tried: what they read at a time is of few heads then.
    Batch entries that share a bias (`by_head`) go through its rows together, as far as L2 has room
    for their K and V: device memory is asked for it once, where each entry by itself asked again.
    """
    size = BYTES[problem.dtype] * problem.len_k * (problem.head_dim + problem.head_dim_v)
    pairs, group = pairs_of_heads(problem) // chosen.pack, problem.group // chosen.pack
    together = min(pairs, max(1, gpu.l2_bytes // 2 // max(size, 1) * group))
    if by_head:
        return min(together, math.prod(problem.batch))
    if problem.varlen:
        return 1  # they are in an order of their own
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
    queries = int(dict(chosen.kernel.constants)["kBlockM"])
    return most_query_tiles(problem, queries, chosen.pack)


def tasks(problem: Problem, chosen: AttentionPlan) -> int:
    """Query tiles of all heads and batches."""
    return query_tiles(problem, chosen) * (pairs_of_heads(problem) // chosen.pack)


def tile_words(problem: Problem, chosen: AttentionPlan) -> int:
    """Words of a bit for each key tile."""
    keys = int(dict(chosen.kernel.constants)["kBlockN"])
    return max(1, -(-problem.len_k // (32 * keys)))


def is_ordered(problem: Problem, chosen: AttentionPlan) -> bool:
    """Whether query tiles that visit many key tiles go first, where a mask decides about that.

    Not where each block has one query tile, nor where these are so many that even a long one ends
    long before the last; packed sequences have an order of their own.
    """
    count = tasks(problem, chosen)
    some = chosen.grid[0] < count and count * tile_words(problem, chosen) <= MOST_ORDERED
    return some and is_hopper(chosen) and not problem.varlen


def most_query_tiles(problem: Problem, queries: int, pack: int = 1) -> int:
    """Tiles of so many queries; of sequences no more than that, whatever their lengths are."""
    if problem.varlen:  # and the rows behind the last one
        return problem.len_q // queries + problem.batch[-1] + 1
    return -(-problem.len_q * pack // queries)


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
    """Heads, over all batches; packed sequences are one."""
    return problem.heads * (1 if problem.varlen else math.prod(problem.batch))


def first_position(problem: Problem) -> int:
    """Where the first query stands among the keys, with all of len_k where lengths are arrays."""
    return problem.len_k - problem.len_q if problem.q_start is None else problem.q_start


def visible(problem: Problem) -> int:
    """Scores of one head that are not masked, with all of len_k where lengths are arrays.

    Packed sequences count as equally long.
    """
    if problem.varlen:
        count = problem.batch[-1]
        len_q, len_k = problem.len_q // count, problem.len_k // count
        return count * visible(replace(problem, len_q=len_q, len_k=len_k, varlen=False))
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
