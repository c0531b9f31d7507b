"""Block-sparse attention: its time beside the dense time's share that its blocks are of all."""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from . import attention, peers, variant_peers, variants
from .contest import Entry, by_pieces
from .timing import Stopwatch
from .variant_peers import Rule

UNIT, OVER = "TFLOP/s", "density"  # what is reported, and what it is drawn over
SECONDS = 50.0  # for the default sweep; least rounds and the start come on top
SECONDS_A_CASE = 4.0  # of a part of it: most of that is FlexAttention's compiler
DENSE = "dense"  # our own call without the blocks
SIZE = 128  # queries and keys of a block
RANDOM, PATTERN = "random", "local + global"
DENSITIES, REACH = (0.05, 0.1, 0.25, 0.5, 0.75), 2  # of random blocks; of the pattern's
MOST = 1.15  # times the density's share of the dense time: the project's target


@cache
def draw(pattern: str, density: float, heads: int, count: int) -> np.ndarray:
    """Return which of count x count blocks are there: each head's own, or the same of all heads.

    Random ones are there with the probability `density`, and so is one at least in each row.
    """
    if pattern == PATTERN:
        import cuflash

        found = cuflash.BlockMask.local_global(count, count, local=REACH, leading=REACH)
        return found[None]
    drawn = np.random.default_rng(0).random((heads, count, count))
    return drawn <= np.maximum(density, drawn.min(-1, keepdims=True))


@dataclass(frozen=True)
class Case:
    """Some blocks of one shape of the room of attention."""

    dtype: str
    head_dim: int
    length: int
    pattern: str
    asked: float = 0.0  # density, of random blocks

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return attention.Case(self.dtype, self.head_dim, self.length, False).shape

    @property
    def blocks(self) -> np.ndarray:
        return draw(self.pattern, self.asked, self.shape[1], -(-self.length // SIZE))

    @property
    def density(self) -> float:
        return float(self.blocks.mean())

    @property
    def work(self) -> float:
        """Operations of the blocks that are there."""
        batch, heads, n, d = self.shape
        return 4 * batch * heads * n * n * d * self.density

    @property
    def memory(self) -> int:
        """Bytes of device memory: q, k, v, everybody's answers."""
        return 10 * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def labels(self) -> dict[str, str | int | float]:
        shape = {"dtype": self.dtype, "d": self.head_dim, "N": self.length}
        return shape | {"blocks": self.pattern, OVER: round(self.density, 4)}

    def build(self, stopwatch: Stopwatch) -> Entry:
        import cuflash

        qkv = [stopwatch.normal(self.shape, self.dtype) for _ in range(3)]
        blocks, here = self.blocks, stopwatch.array(self.blocks)
        us, kernel = variants.ours(qkv, {"variant": cuflash.BlockMask(here, SIZE)}, None)
        dense = replace(variants.ours(qkv, {}, None)[0], name=DENSE)
        others = variant_peers.flex_blocks(qkv, here, SIZE) if peers.torch_with_gpu() else []
        target = {"peer": DENSE, "most": MOST, "share": self.density}
        return Entry(
            [us, *others],
            by_pieces(variants.pieces(*qkv, seen(blocks, SIZE))),
            peers.matmul(stopwatch, self.dtype),
            unlike=(dense, by_pieces(attention.pieces(*qkv, causal=False))),
            notes={"kernel": kernel, "target": target},
        )


def seen(blocks: np.ndarray, size: int) -> Rule:
    """Return the blocks, (1 or heads, n_q, n_k), as a rule for the reference."""
    return Rule(mask=lambda b, h, i, j: blocks[h % len(blocks), i // size, j // size])


def arguments(add: Callable[..., Any]) -> None:
    """Say which options the room takes besides everybody's."""
    add("--dtype", nargs="+", choices=peers.DTYPES)
    add("--n", nargs="+", type=int, help="lengths of the sequences")
    add("--d", nargs="+", type=int, help="head dimensions")


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; by default all densities at one length."""
    dims = options.d or ((128,) if options.quick else (64, 128))
    densities = (0.05, 0.25) if options.quick else DENSITIES
    kinds = [*((RANDOM, density) for density in densities), (PATTERN, 0.0)]
    shapes = product(options.dtype or ("bfloat16",), dims, options.n or (16384,))
    return [Case(*shape, *kind) for shape, kind in product(shapes, kinds)]


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    return {}  # the room of attention measures it
