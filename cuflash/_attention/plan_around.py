"""The small launches around attention: what goes ahead of it, and what merges its parts."""

from __future__ import annotations

import math

from ..jit.launch import Plan
from ..jit.source import Kernel
from .plan import BYTES, SORTERS, AttentionPlan, is_ordered, query_tiles, tasks, tile_words
from .problem import BlockProblem, Problem


def _ahead(
    name: str,
    chosen: AttentionPlan,
    generated: str,
    *,
    bytes: int,
    why: str,
    blocks: int = 1,
    threads: int = SORTERS,
    constants: tuple[tuple[str, int], ...] = (),
) -> Plan:
    """Plan what goes ahead of an attention launch, and has its constants."""
    return Plan(
        kernel=Kernel(
            f"_attention/{name}.cu",
            f"attention_{name}",
            (*chosen.kernel.constants, *constants),
            generated=generated,
        ),
        grid=(blocks, 1, 1),
        threads=threads,
        shared_memory=0,
        bytes=bytes,
        operations=0,
        why=why,
    )


def sequences(problem: Problem, chosen: AttentionPlan) -> Plan:
    """Plan what finds out where sequences lie, for an attention launch that needs it."""
    return _ahead(
        "sequences",
        chosen,
        chosen.kernel.generated,
        bytes=24 * problem.batch[-1] + 4 * query_tiles(problem, chosen),
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
    warps = tasks(problem, chosen) * tile_words(problem, chosen)
    dense = problem.variant.dense
    blocks, in_block = (warps, _DENSE_WARPS) if dense else (-(-warps // _WARPS), _WARPS)
    return _ahead(
        "tiles",
        chosen,
        problem.variant.text + problem.variant.tiles,
        blocks=blocks,
        threads=32 * in_block,
        constants=(("kWarps", in_block),),
        bytes=8 * warps,
        why="masks on ranges of places: which tiles are empty, and which whole",
    )


def order(problem: Problem, chosen: AttentionPlan) -> Plan | None:
    """Plan what has query tiles go first that visit many key tiles, if anything does."""
    if not is_ordered(problem, chosen):
        return None
    count = tasks(problem, chosen)
    return _ahead(
        "order",
        chosen,
        problem.variant.text,
        bytes=4 * count * tile_words(problem, chosen) + 4 * count,
        why="query tiles that visit many key tiles come first, and few last: none is waited for",
    )


def block_kinds(problem: BlockProblem) -> Plan:
    """Plan what evaluates a mask at every place of its blocks."""
    blocks = math.prod(problem.shape)
    return Plan(
        kernel=Kernel(
            "_attention/blocks.cu",
            "attention_blocks",
            (("Element", problem.dtype), ("kWholeBlocks", False), ("kWarps", _WARPS)),
            generated=problem.variant.text,
        ),
        grid=(-(-blocks // _WARPS), 1, 1),
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
