"""The NumPy twin: one pass over tiles of columns, which keeps the pair (m, d) and the k largest.

Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, Algorithm 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import cpu
from .topk_api import Operands, Problem

Array = np.ndarray[Any, Any]

TILE = 1024  # columns


def forward(problem: Problem, operands: Operands) -> None:
    """Fill ``operands.values`` and ``operands.indices``. No row may be empty."""
    x = operands.x
    softmax = problem.function == "softmax_topk"
    wide = np.float64 if x.dtype == np.float64 else np.float32
    m, d = np.full((*problem.batch, 1), -np.inf, wide), np.zeros((*problem.batch, 1), wide)
    kept = np.empty((*problem.batch, 0), np.int64)
    with np.errstate(all="ignore"):
        for start in range(0, problem.columns, TILE):
            tile = x[..., start : start + TILE].astype(wide, copy=False)
            if softmax:
                m, d = cpu.update(m, d, tile)
            kept = merge(x, kept, start, tile.shape[-1], problem.k)
        found = np.take_along_axis(x, kept, axis=-1)
        if softmax:
            shifted = found.astype(wide, copy=False) - cpu.reference(m)
            found = np.exp(shifted) / np.where(m == np.inf, np.nan, d)
        operands.values[...] = found
    operands.indices[...] = kept


def merge(x: Array, kept: Array, start: int, width: int, k: int) -> Array:
    """The k largest of those kept and of a tile, as indices, the largest first."""
    tile = np.broadcast_to(np.arange(start, start + width), (*kept.shape[:-1], width))
    candidates = np.concatenate([kept, tile], axis=-1)
    # Those kept come from before the tile: a stable sort has equal elements by index.
    falling = ~order(np.take_along_axis(x, candidates, axis=-1))
    first = np.argsort(falling, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(candidates, first, axis=-1)


def order(x: Any) -> Array:
    """Unsigned integers that grow with x, the kernels' keys: NaN is the largest, and -0 is 0."""
    wide: Any = x.astype(np.float64 if x.dtype == np.float64 else np.float32) + 0.0  # -0 + 0 is 0
    bits = wide.view(f"u{wide.itemsize}")
    sign = bits.dtype.type(1 << (8 * wide.itemsize - 1))
    growing = np.where(bits & sign, ~bits, bits | sign)
    return np.where(np.isnan(wide), ~bits.dtype.type(0), growing)
