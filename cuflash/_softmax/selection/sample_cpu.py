"""The NumPy twin of `sample`: slices, random numbers and rounds of the kernels, for many rows.

A row is cut into slices, each with its pair (m, d). A uniform number finds first the slice and then
the column where the cumulative mass passes it. A token that a filter turns down gives way to the
tokens above it, from which the next round draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...philox import philox
from .sample_problem import Problem

Array = np.ndarray[Any, Any]

SLICE_BYTES = 4096  # of accumulators: a slice is what a warp holds in 32 registers a thread
BLOCK = 1 << 21  # elements at a time, so that the temporaries stay small


def sample(problem: Problem, logits: Array, out: Array) -> None:
    """Fill `out`.

    Parameters
    ----------
    problem : Problem
    logits : ndarray
        Of the problem's shape, with any strides.
    out : ndarray of int64, (rows,)
        Tokens; -1 for rows that have no distribution.
    """
    x = np.moveaxis(logits, problem.axis, -1).reshape(problem.rows, problem.columns)
    step = max(1, BLOCK // problem.columns)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for first in range(0, problem.rows, step):
            rows = slice(first, min(first + step, problem.rows))
            out[rows] = _sample(problem, x[rows], first)


def uniform(seed: int, offset: int, rows: Array, draw: int) -> Array:
    """A number in [0, 1) for each row, of 53 bits.

    The counter is (row, offset), 64 bits each, with the number of the draw in the row's upper 16.
    """
    low = 0xFFFFFFFF
    counter = np.empty((len(rows), 4), np.uint32)
    counter[:, 0] = rows & low
    counter[:, 1] = (rows >> 32) | draw << 16
    counter[:, 2:] = offset & low, offset >> 32
    words = philox(counter, np.array([seed & low, seed >> 32], np.uint32)).astype(np.uint64)
    return ((words[:, 1] << np.uint64(32) | words[:, 0]) >> np.uint64(11)) * 2.0**-53


def _sample(problem: Problem, x: Array, first: int) -> Array:
    """Tokens of the rows from number `first` on."""
    x = x.astype(np.float64 if problem.dtype == "float64" else np.float32)
    if problem.greedy:
        return x.argmax(axis=1)
    if problem.top_k is None:
        return _draw(problem, x, first)
    # Descending, ties by lowest index. A NaN counts as the largest, so that its row is refused.
    order = np.argsort(np.where(np.isnan(x), -np.inf, -x), axis=1, kind="stable")
    order = order[:, : problem.top_k]
    chosen = _draw(problem, np.take_along_axis(x, order, axis=1), first)
    tokens = np.take_along_axis(order, np.maximum(chosen, 0)[:, None], axis=1)[:, 0]
    return np.where(chosen < 0, -1, tokens)


@dataclass(frozen=True)
class _Set:
    """Tokens that may still be drawn: those above a row's `score`, or level and before `column`.

    Their weights are relative to `largest`; none has an exponent below `least`.
    """

    largest: Array  # (rows,)
    score: Array  # (rows,)
    column: Array  # (rows,)
    scale: Any
    least: Any

    def weights(self, tiles: Array, columns: Array) -> Array:
        """The weights of (rows, ...) scores that stand in these columns."""
        largest, score, column = (
            a.reshape(-1, *[1] * (tiles.ndim - 1)) for a in (self.largest, self.score, self.column)
        )
        exponents = (tiles - largest) * self.scale
        above = (tiles > score) | ((tiles == score) & (columns < column))
        return np.where(above & (exponents >= self.least), np.exp2(exponents), 0)

    def at(self, rows: Array) -> _Set:
        return _Set(self.largest[rows], self.score[rows], self.column[rows], self.scale, self.least)


def _draw(problem: Problem, x: Array, first: int) -> Array:
    """Columns of `x` drawn by their weights, -1 where there is nothing to draw from."""
    tiles, columns = _sliced(x)
    scale = x.dtype.type(problem.scale)
    # Each slice relative to its own maximum, then all relative to the row's.
    m = tiles.max(axis=2)
    d = np.exp2((tiles - _reference(m)[..., None]) * scale).sum(axis=2)
    largest = m.max(axis=1)
    masses = d * np.exp2((m - _reference(largest)[:, None]) * scale)
    totals = masses.sum(axis=1, dtype=np.float64)
    # Everything is above a score of -inf: the first draw is from the whole row.
    everything = np.full_like(largest, -np.inf), np.full(len(x), np.iinfo(np.int64).max)
    drawable = _Set(largest, *everything, scale, x.dtype.type(-np.inf))

    drawn = np.full(len(x), -1)
    active = np.flatnonzero(totals > 0)  # not so for NaN
    drawable, masses = drawable.at(active), masses[active]
    nucleus = (np.inf if problem.top_p is None else problem.top_p) * totals[active]
    draw = 0
    while active.size:
        u = uniform(problem.seed, problem.offset, first + active, draw)
        part, rest = _pick(masses, u)
        within = drawable.weights(tiles[active, part], columns[part])
        column = columns[part, _pick(within, rest)[0]]
        drawn[active] = column
        if not problem.filtered:
            break
        score = x[active, column]
        likely = (score - drawable.largest) * scale >= x.dtype.type(problem.least)
        drawable = _Set(drawable.largest, score, column, scale, x.dtype.type(problem.least))
        masses = drawable.weights(tiles[active], columns[None]).sum(axis=2)
        stays = likely & (masses.sum(axis=1, dtype=np.float64) < nucleus)
        again = np.flatnonzero(~stays)
        active, drawable, masses, nucleus = (
            active[again],
            drawable.at(again),
            masses[again],
            nucleus[again],
        )
        draw += 1
    return drawn


def _sliced(x: Array) -> tuple[Array, Array]:
    """(rows, slices, length) scores, padded with -inf, and the columns (slices, length) of them."""
    length = min(SLICE_BYTES // x.itemsize, x.shape[1])
    slices = -(-x.shape[1] // length)
    padded = x
    if slices * length > x.shape[1]:
        padded = np.full((len(x), slices * length), -np.inf, x.dtype)
        padded[:, : x.shape[1]] = x
    return padded.reshape(len(x), slices, length), np.arange(slices * length).reshape(
        slices, length
    )


def _reference(m: Array) -> Array:
    """What to subtract for a maximum of m: 0 for -inf, because -inf + inf is NaN."""
    return np.where(m == -np.inf, m.dtype.type(0), m)


def _pick(masses: Array, fraction: Array) -> tuple[Array, Array]:
    """The part of each row that holds `fraction` of its mass, and how far into it that lies."""
    ends = masses.cumsum(axis=1, dtype=np.float64)
    totals = ends[:, -1]
    # Rounding must not reach the total: past the last part that weighs anything is nothing.
    targets = np.minimum(fraction * totals, np.nextafter(totals, 0))
    part = (ends > targets[:, None]).argmax(axis=1)
    each = np.arange(len(masses))
    mass = masses[each, part].astype(np.float64)
    rest = (targets - (ends[each, part] - mass)) / mass
    return part, np.clip(rest, 0, np.nextafter(1.0, 0))
