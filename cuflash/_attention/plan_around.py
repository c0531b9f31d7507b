"""The small launches around attention: what goes ahead of it, and what merges its parts."""

from __future__ import annotations

import math

from ..jit.launch import Plan
from ..jit.source import Kernel
from .plan import BYTES, AttentionPlan, is_hopper, pairs_of_heads, query_tiles
from .problem import BlockProblem, Problem

_SORTERS = 1024  # threads of sequences.cu and order.cu
# Words of bits that order.cu reads in one block: a few microseconds. So a thread has 64 query tiles
# at most, and a bit for each.
_MOST_ORDERED = 64 * _SORTERS


def sequences(problem: Problem, chosen: AttentionPlan) -> Plan:
    """Plan what finds out where sequences lie, for an attention launch that needs it."""
    return Plan(
        kernel=Kernel(
            "_attention/sequences.cu",
            "attention_sequences",
            chosen.kernel.constants,
            generated=chosen.kernel.generated,
        ),
        grid=(1, 1, 1),
        threads=_SORTERS,
        shared_memory=0,
        bytes=24 * problem.batch[-1] + 4 * query_tiles(problem, chosen),
        operations=0,
        why="offsets on the device: which query tiles there are, those of most keys first",
    )


# Of a block of tiles.cu and blocks.cu, each with 32 key tiles of a query tile, or with a block.
_WARPS = 4
# Of a block of tiles.cu that looks at arrays of truth values: 32 key tiles of a query tile are up
# to 768 KB. A warp has 4 words of 8 bytes a lane under way, 1 KB: if that takes 700 ns, 16 warps on
# each of 132 multiprocessors read 3 TB/s.
_DENSE_WARPS = 16


def tiles(problem: Problem, chosen: AttentionPlan) -> Plan:
    """Plan what finds out which tiles of an attention launch its variants' masks leave."""
    words = tile_words(problem, chosen)
    warps = query_tiles(problem, chosen) * (pairs_of_heads(problem) // chosen.pack) * words
    dense = problem.variant.dense
    blocks, threads = (warps, _DENSE_WARPS) if dense else (-(-warps // _WARPS), _WARPS)
    return Plan(
        kernel=Kernel(
            "_attention/tiles.cu",
            "attention_tiles",
            (*chosen.kernel.constants, ("kWarps", threads)),
            generated=problem.variant.text + problem.variant.tiles,
        ),
        grid=(blocks, 1, 1),
        threads=32 * threads,
        shared_memory=0,
        bytes=8 * warps,
        operations=0,
        why="masks on ranges of places: which tiles are empty, and which whole",
    )


def order(problem: Problem, chosen: AttentionPlan) -> Plan | None:
    """Plan what has query tiles that visit many key tiles go first, where that may matter.

    Not where each block has one query tile, nor where these are so many that even a long one ends
    long before the last; packed sequences have an order of their own.
    """
    tasks = query_tiles(problem, chosen) * (pairs_of_heads(problem) // chosen.pack)
    blocks = chosen.grid[0]
    words = tasks * tile_words(problem, chosen)
    if problem.varlen or not is_hopper(chosen) or tasks <= blocks or words > _MOST_ORDERED:
        return None
    return Plan(
        kernel=Kernel(
            "_attention/order.cu",
            "attention_order",
            chosen.kernel.constants,
            generated=problem.variant.text,
        ),
        grid=(1, 1, 1),
        threads=_SORTERS,
        shared_memory=0,
        bytes=4 * words + 4 * tasks,
        operations=0,
        why="query tiles that visit more than twice the mean come first: they would be waited for",
    )


def tile_words(problem: Problem, chosen: AttentionPlan) -> int:
    """Words of a bit for each key tile."""
    keys = int(dict(chosen.kernel.constants)["kBlockN"])
    return max(1, -(-problem.len_k // (32 * keys)))


def block_kinds(problem: BlockProblem) -> Plan:
    """Plan what evaluates a mask at every place of its blocks."""
    blocks = math.prod(problem.shape)
    grid = -(-blocks // _WARPS)
    if grid >= 2**31:
        raise ValueError(f"`size` must make fewer than 2**33 blocks, not {blocks}: {problem.size}")
    return Plan(
        kernel=Kernel(
            "_attention/blocks.cu",
            "attention_blocks",
            (("Element", problem.dtype), ("kWholeBlocks", False), ("kWarps", _WARPS)),
            generated=problem.variant.text,
        ),
        grid=(grid, 1, 1),
        threads=32 * _WARPS,
        shared_memory=0,
        bytes=blocks,
        operations=0,
        why="a warp a block, place by place until it has seen both: a hidden one, a shown one",
    )


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
