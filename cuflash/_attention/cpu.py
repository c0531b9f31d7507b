"""Attention in NumPy: the kernels' algorithm, tile by tile.

This is FlashAttention (Dao et al., 2022, Algorithm 1) with the loops in FlashAttention-2's order
(Dao, 2023, Algorithm 1): a tile of queries stays, tiles of keys stream past it, and for each query
row a running maximum m, a running sum d = sum exp(s - m) and a running output o are kept. Scores
and sums are float32 (float64 for float64); P is rounded to the inputs' dtype before it meets V, as
on the tensor cores. Nothing of size len_q x len_k is ever held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .dropout import Dropout
from .problem import BlockProblem, Operands, Problem, sum_dtype

TILE_Q = 128
TILE_K = 128
# Scores held at once, over all heads of a step: 8 MB of float32, about a core's share of cache.
SCORES = 1 << 21


@dataclass(frozen=True)
class Sight:
    """The keys each row sees: row i sees [low(i), high(i)). Both ends move by at most 1 a row."""

    length: int
    start: int
    left: int | None
    right: int | None

    def low(self, row: Any) -> Any:
        return 0 * row if self.left is None else np.maximum(0, row + self.start - self.left)

    def high(self, row: Any) -> Any:
        if self.right is None:
            return 0 * row + self.length
        return np.minimum(self.length, row + self.start + self.right + 1)

    def all_of(self, rows: np.ndarray, keys: np.ndarray) -> bool:
        """Whether every row sees every key, so that no score needs the mask."""
        return self.low(rows[-1]) <= keys[0] and keys[-1] < self.high(rows[0])

    def mask(self, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        rows = rows[:, None]
        return (self.low(rows) <= keys) & (keys < self.high(rows))


class Rows:
    """The state (m, d, o) of a tile of query rows: the empty one, its update, its end."""

    def __init__(self, shape: tuple[int, ...], head_dim_v: int, dtype: np.dtype) -> None:
        self.m = np.full(shape, -np.inf, dtype)
        self.d = np.zeros(shape, dtype)
        self.o = np.zeros((*shape, head_dim_v), dtype)

    def update(
        self, s: np.ndarray, v: np.ndarray, dtype_p: np.dtype, kept: np.ndarray | None = None
    ) -> None:
        """Take in the scores s [..., rows, keys] and the values v [..., keys, head_dim_v].

        The sums count all weights; v meets only those that are kept.
        """
        m = np.maximum(self.m, s.max(axis=-1))
        # A row that has seen nothing keeps m = -inf; -inf - -inf would be NaN, so it subtracts 0.
        base = np.where(m == -np.inf, 0, m)
        p = np.exp(s - base[..., None])
        alpha = np.exp(self.m - base)
        self.d = self.d * alpha + p.sum(axis=-1)
        if kept is not None:
            p = np.where(kept, p, 0)
        self.o *= alpha[..., None]
        self.o += p.astype(dtype_p, copy=False).astype(self.o.dtype, copy=False) @ v
        self.m = m

    def take_sink(self, sink: np.ndarray) -> None:
        """Take in a score without a key: only the sum counts it."""
        m = np.maximum(self.m, sink)
        base = np.where(m == -np.inf, 0, m)
        alpha = np.exp(self.m - base)
        self.d = self.d * alpha + np.exp(sink - base)
        self.o *= alpha[..., None]
        self.m = m

    def finish(self, rescale: float = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return out = rescale o / d and lse = m + log d; a row that saw nothing ends 0, -inf."""
        seen = self.d != 0
        out = np.divide(self.o, self.d[..., None], out=np.zeros_like(self.o), where=seen[..., None])
        return out * self.o.dtype.type(rescale), self.m + np.log(self.d)


class Variation:
    """What the variants of a call make of the scores of one batch entry."""

    def __init__(self, problem: Problem, operands: Operands, batch: tuple[int, ...]) -> None:
        self.program, self.dtype = problem.variant, np.dtype(problem.lse_dtype)
        self.values = [
            value[batch] if kind.axes and value.ndim > kind.axes else value
            for kind, value in zip(self.program.slots, operands.values)
        ]
        entry = 0
        for index, length in zip(batch, problem.batch):
            entry = entry * length + index
        self.places: dict[str, Any] = {"b": entry, "len_q": problem.len_q}

    def rows(self, heads: np.ndarray, sight: Sight, rows: np.ndarray) -> dict[str, Any]:
        """Where rows [heads, rows, 1] stand."""
        row = rows[:, None]
        more = {"h": heads, "row": row, "i": row + sight.start, "len_k": sight.length}
        return self.places | more

    def scores(self, s: np.ndarray, places: dict[str, Any], keys: np.ndarray) -> np.ndarray:
        """Return what becomes of the scores s [..., rows, keys]."""
        places = {**places, "j": keys, "score": s}
        if self.program.has_score:
            s = self.program.score(places, self.values, self.dtype)
        if self.program.has_mask:
            s = np.where(self.program.mask(places, self.values, self.dtype), s, -np.inf)
        return np.broadcast_to(s.astype(self.dtype, copy=False), places["score"].shape).copy()

    def sink(self, places: dict[str, Any]) -> np.ndarray:
        """Return the sink of each row [..., rows]."""
        return self.program.sink(places, self.values, self.dtype)[..., 0]


def forward(
    problem: Problem, operands: Operands, *, tile_q: int = TILE_Q, tile_k: int = TILE_K
) -> None:
    """Fill ``operands.out`` and, where there is one, ``operands.lse``."""
    with np.errstate(all="ignore"):
        for batch, entry, (q, k, v, out, lse) in _entries(problem, operands):
            sight = _sight(entry, operands, batch)
            variation = Variation(entry, operands, batch)
            for heads, kv_heads in _steps(entry, tile_q * tile_k):
                _forward_heads(
                    entry,
                    sight,
                    variation,
                    operands.dropout,
                    np.arange(entry.heads)[heads],
                    q[heads],
                    k[kv_heads],
                    v[kv_heads],
                    out[heads],
                    None if lse is None else lse[heads],
                    tile_q,
                    tile_k,
                )


# A batch entry: its index, the problem with its own lengths, and its part of q, k, v, out and lse.
Entry = tuple[tuple[int, ...], Problem, tuple[Any, ...]]


def _entries(problem: Problem, operands: Operands) -> Iterator[Entry]:
    o = operands
    if not problem.varlen:
        for batch in np.ndindex(problem.batch):
            lse = None if o.lse is None else o.lse[batch]
            yield batch, problem, (o.q[batch], o.k[batch], o.v[batch], o.out[batch], lse)
        return
    rows, keys = [*map(int, o.q_offsets), problem.len_q], [*map(int, o.k_offsets)]
    keys.append(keys[-1])
    for n, (first, end) in enumerate(itertools.pairwise(rows)):  # the last rows are of no sequence
        its_rows, its_keys = slice(first, end), slice(keys[n], keys[n + 1])
        batch = (min(n, problem.batch[0] - 1),)
        entry = replace(problem, len_q=end - first, len_k=keys[n + 1] - keys[n])
        inputs = o.q[batch][:, its_rows], o.k[batch][:, its_keys], o.v[batch][:, its_keys]
        yield batch, entry, (*inputs, *(x if x is None else x[:, its_rows] for x in (o.out, o.lse)))


def _sight(problem: Problem, operands: Operands, batch: tuple[int, ...]) -> Sight:
    length = problem.len_k
    if operands.kv_lengths is not None:
        length = int(operands.kv_lengths[batch])
    start = length - problem.len_q if problem.q_start is None else problem.q_start
    if operands.q_start is not None:
        start = int(operands.q_start[batch])
    return Sight(length, start, problem.left, problem.right)


def _steps(problem: Problem, tile: int) -> Iterator[tuple[slice, slice]]:
    """Yield the heads taken together, as (query heads, key heads) with whole groups in each."""
    group = problem.group
    width = max(1, SCORES // max(1, group * tile))
    for first in range(0, problem.kv_heads, width):
        last = min(first + width, problem.kv_heads)
        yield slice(first * group, last * group), slice(first, last)


def _forward_heads(
    problem: Problem,
    sight: Sight,
    variation: Variation,
    dropout: Dropout | None,
    heads: np.ndarray,  # the query heads' numbers
    q: np.ndarray,  # [heads, len_q, head_dim]
    k: np.ndarray,  # [kv_heads, len_k, head_dim]
    v: np.ndarray,  # [kv_heads, len_k, head_dim_v]
    out: np.ndarray,  # [heads, len_q, head_dim_v]
    lse: np.ndarray | None,  # [heads, len_q]
    tile_q: int,
    tile_k: int,
) -> None:
    exact = np.dtype(problem.lse_dtype)
    kv_heads, group = k.shape[0], problem.group
    # Contiguous copies of one step's keys and values: NumPy's product of odd strides is slow, and
    # its answer might depend on them.
    k = np.ascontiguousarray(k[:, None, : sight.length], exact).swapaxes(-1, -2)
    v = np.ascontiguousarray(v[:, None, : sight.length], exact)

    for i in range(0, problem.len_q, tile_q):
        rows = np.arange(i, min(i + tile_q, problem.len_q))
        tile = slice(i, i + rows.size)
        q_tile = np.ascontiguousarray(q[:, tile], exact)
        q_tile = q_tile.reshape(kv_heads, group, rows.size, problem.head_dim)
        state = Rows(q_tile.shape[:-1], problem.head_dim_v, exact)
        places = variation.rows(heads.reshape(kv_heads, group, 1, 1), sight, rows)
        kept = None

        # Between the first row's first key and the last row's last one, each key is seen by some
        # row: nothing else is ever read, so what lies there (NaN, perhaps) cannot leak through V.
        first, last = int(sight.low(rows[0])), int(sight.high(rows[-1]))
        for j in range(first, last, tile_k):
            keys = np.arange(j, min(j + tile_k, last))
            s = q_tile @ k[..., keys[0] : keys[-1] + 1]
            s *= problem.scale
            if problem.variant.steps:
                s = variation.scores(s, places, keys)
            if not sight.all_of(rows, keys):
                np.copyto(s, -np.inf, where=~sight.mask(rows, keys))
            if dropout is not None:
                kept = dropout.kept(places["b"], heads.reshape(kv_heads, group), rows, keys)
            state.update(s, v[:, :, keys[0] : keys[-1] + 1], q.dtype, kept)

        if problem.variant.has_sink:
            state.take_sink(variation.sink(places))
        out_tile, lse_tile = state.finish(1 if dropout is None else dropout.rescale)
        out[:, tile] = out_tile.reshape(out[:, tile].shape)
        if lse is not None:
            lse[:, tile] = lse_tile.reshape(lse[:, tile].shape)


def block_kinds(problem: BlockProblem, values: Sequence[Any], kinds: np.ndarray) -> None:
    """Fill `kinds`, of the problem's shape: the mask is evaluated at every place."""
    (size_q, size_k), dtype = problem.size, np.dtype(sum_dtype(problem.dtype))
    keys, firsts = np.arange(problem.len_k), np.arange(0, problem.len_k, size_k)
    for b, h, block in np.ndindex(kinds.shape[:-1] if problem.len_k else (0, 0, 0)):
        row = np.arange(block * size_q, min((block + 1) * size_q, problem.len_q))[:, None]
        places = {"b": b, "h": h, "row": row, "i": row + problem.q_start, "j": keys}
        places |= {"len_q": problem.len_q, "len_k": problem.len_k}
        seen = problem.variant.mask(places, values, dtype)
        seen = np.broadcast_to(seen, (row.size, problem.len_k))
        some = np.logical_or.reduceat(seen.any(axis=0), firsts)
        whole = np.logical_and.reduceat(seen.all(axis=0), firsts)
        kinds[b, h, block] = some.astype(np.int8) + whole


def merge(
    outs: Sequence[np.ndarray],  # each [..., heads, len_q, head_dim_v]
    lses: Sequence[np.ndarray],  # each [..., heads, len_q]
    out: np.ndarray,
    lse: np.ndarray,
) -> None:
    """Join partial results: a part is the state (m = lse, d = 1, o = out) of its keys."""
    exact = lse.dtype
    with np.errstate(all="ignore"):
        m = lses[0].astype(exact)
        for part_lse in lses[1:]:
            m = np.maximum(m, part_lse)
        base = np.where(m == -np.inf, 0, m)
        d = np.zeros_like(m)
        o = np.zeros(out.shape, exact)
        for part_out, part_lse in zip(outs, lses, strict=True):
            weight = np.exp(part_lse - base)
            d += weight
            # A part that saw no keys has no say, whatever its out holds.
            part = weight[..., None] * part_out.astype(exact)
            o += np.where(part_lse[..., None] == -np.inf, 0, part)
        seen = d != 0
        out[...] = np.divide(o, d[..., None], out=np.zeros_like(o), where=seen[..., None])
        lse[...] = m + np.log(d)
