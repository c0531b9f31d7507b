"""The NumPy twin: the recurrence the kernels follow, in the same order, over tiles of columns.

Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .problem import Operands, Problem

Array = np.ndarray[Any, Any]

TILE = 1024  # columns


def forward(problem: Problem, operands: Operands) -> None:
    """Fill ``operands.out``, and ``operands.sign`` if there is one. No row may be empty."""
    with np.errstate(all="ignore"):
        if problem.function.endswith("_backward"):
            _backward(problem, operands)
        elif problem.reduces:
            _log_sum_exp(problem, operands)
        else:
            _normalize(problem, operands)


def _normalize(problem: Problem, operands: Operands) -> None:
    """softmax and log_softmax, Algorithm 3: one loop for the pair (m, d), one for the answers."""
    x = _rows(operands.x, problem)
    m, d = empty(x), zero(x)
    for tile in tiles(x):
        m, d = update(m, d, wide(x[..., tile]))
    y = np.empty(x.shape, operands.out.dtype)
    for tile in tiles(x):
        shifted = wide(x[..., tile]) - reference(m)
        if problem.function == "log_softmax":
            y[..., tile] = shifted - np.log(d)
        else:
            # A row with +inf has inf/inf in it: NaN throughout, as in SciPy.
            y[..., tile] = np.exp(shifted) / np.where(m == np.inf, np.nan, d)
    out = _reduced_last(operands.out, problem)
    out[...] = y.reshape(out.shape)  # in one go, because out may be x


def add_up(terms: Array) -> Array:
    """The sum over the last axis, pairwise.

    Along an axis that is not dense in memory NumPy adds one by one, and a thousand roundings of
    equal terms are all to one side.
    """
    return np.ascontiguousarray(terms).sum(axis=-1, keepdims=True)


def update(m: Array, d: Array, tile: Array) -> tuple[Array, Array]:
    """Lines 4 and 5 of Algorithm 3, for a tile of columns at a time."""
    raised = np.maximum(m, tile.max(axis=-1, keepdims=True))
    shift = reference(raised)
    return raised, d * np.exp(m - shift) + add_up(np.exp(tile - shift))


def reference(m: Array) -> Array:
    """What to subtract for a maximum of m: 0 for an infinite one, because inf - inf is NaN."""
    return np.where(np.isfinite(m), m, m.dtype.type(0))


def _log_sum_exp(problem: Problem, operands: Operands) -> None:
    """The log of the weighted sum, by a recurrence that keeps what d loses.

    The pair (m, d) forgets 1e-20 beside the 1 of the largest element, though log(1 + 1e-20) is
    1e-20. So d is kept in two parts: ``top``, from elements equal to m, and ``rest``.
    """
    x = _rows(operands.x, problem)
    weights = None if operands.weights is None else _rows(operands.weights, problem)
    m, top, rest = empty(x), zero(x), zero(x)
    for tile in tiles(x):
        scores = wide(x[..., tile])
        if weights is None:
            w = scores.dtype.type(1)
        else:
            w = wide(weights[..., tile])
            scores = np.where(w == 0, -np.inf, scores)  # gone, whatever it was: 0 * NaN is NaN
        m, top, rest = update_log(m, top, rest, scores, w)
    value, sign = finish_log(m, top, rest)
    if not problem.signed:
        value = np.where(sign < 0, np.nan, value)
    out = _reduced_last(operands.out, problem)
    out[...] = value.reshape(out.shape)
    if operands.sign is not None:
        out = _reduced_last(operands.sign, problem)
        out[...] = sign.reshape(out.shape)


def update_log(
    m: Array, top: Array, rest: Array, scores: Array, weights: Any
) -> tuple[Array, Array, Array]:
    """Take in one tile."""
    raised = np.maximum(m, scores.max(axis=-1, keepdims=True))
    grew = raised > m  # False for NaN, which reaches rest through its own exponential
    rest = np.where(grew, (top + rest) * np.exp(m - raised), rest)
    top = np.where(grew, 0, top)
    at_top = scores == raised
    # The exponential of the maximum itself: 1, but inf for inf and 0 for -inf.
    unit = np.exp(raised - reference(raised))
    terms = weights * np.where(at_top, unit, np.exp(scores - raised))
    top = top + add_up(np.where(at_top, terms, 0))
    rest = rest + add_up(np.where(at_top, 0, terms))
    return raised, top, rest


def finish_log(m: Array, top: Array, rest: Array) -> tuple[Array, Array]:
    """log|sum| and the sum's sign."""
    total = top + rest
    # With rest near -top the total is exact and log1p is not; with rest small it is the reverse.
    dominant = np.abs(rest) < np.abs(top) / 2
    log = np.where(dominant, np.log(np.abs(top)) + np.log1p(rest / top), np.log(np.abs(total)))
    return m + log, np.sign(total)


def _backward(problem: Problem, operands: Operands) -> None:
    """dx = y (dy - sum dy y) of softmax, dx = dy - exp(y) sum dy of log_softmax."""
    dy, y = _rows(operands.x, problem), _rows(operands.weights, problem)
    of_log = problem.function == "log_softmax_backward"
    total = zero(dy)
    for tile in tiles(dy):
        terms = wide(dy[..., tile]) if of_log else wide(dy[..., tile]) * wide(y[..., tile])
        total = total + add_up(terms)
    dx = np.empty(dy.shape, operands.out.dtype)
    for tile in tiles(dy):
        from_above, answers = wide(dy[..., tile]), wide(y[..., tile])
        if of_log:
            dx[..., tile] = from_above - np.exp(answers) * total
        else:
            dx[..., tile] = answers * (from_above - total)
    out = _reduced_last(operands.out, problem)
    out[...] = dx.reshape(out.shape)  # in one go, because out may be dy or y


def _reduced_last(array: Array, problem: Problem) -> Array:
    return array.transpose(problem.kept + problem.axes)


def _rows(array: Array, problem: Problem) -> Array:
    """As (kept axes..., columns): a view, or a copy where several reduced axes do not fold."""
    last = _reduced_last(array, problem)
    return last.reshape(*last.shape[: len(problem.kept)], problem.columns)


def tiles(x: Array) -> Iterator[slice]:
    return (slice(start, start + TILE) for start in range(0, x.shape[-1], TILE))


def wide(tile: Array) -> Array:
    return tile.astype(_accumulator(tile), copy=False)


def _accumulator(x: Array) -> type[np.floating[Any]]:
    """Scores and sums are float32, or float64 for float64 input."""
    return np.float64 if x.dtype == np.float64 else np.float32


def empty(x: Array) -> Array:
    """The maximum of rows that have seen nothing."""
    return np.full((*x.shape[:-1], 1), -np.inf, _accumulator(x))


def zero(x: Array) -> Array:
    return np.zeros((*x.shape[:-1], 1), _accumulator(x))
