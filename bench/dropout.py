"""Dropout: no two libraries drop the same weights, so what answer is right is to be found out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import attention, peers
from .contest import Judge, error_of
from .timing import Contestant, Stopwatch

# Rows that are looked at: where they are, their scores, and the values of all keys, on the host.
Row = tuple[Any, np.ndarray, np.ndarray]

STEPS = 1 << 16  # cuflash takes the nearest multiple of one in so many as the probability
WRONG = 1e9
SPREAD = 4.0  # what the errors' variance may be off by; without dropout it is 0
CERTAIN = math.log(2 / 1e-9)


def by_kept_weights(
    rows: Sequence[Row],
    v: Any,
    rate: float,
    ours: Callable[[Any], Contestant],
    stopwatch: Stopwatch,
) -> Judge:
    """Judge our own answer by the weights that its seed keeps.

    They are found by other values and must be the same for these. Of M weights, ``(1 - rate) M``
    are kept, give or take six standard errors.
    """
    rate = round(rate * STEPS) / STEPS
    found = kept_weights([place for place, _, _ in rows], v, ours, stopwatch)
    pieces, kept, shown = [], 0, 0
    for (place, scores, values), mask in zip(rows, found):
        right = attention.weighed(scores, values, str(v.dtype), kept=mask / (1 - rate))
        pieces.append((place, *right))
        kept += np.count_nonzero(mask)
        shown += np.count_nonzero(np.isfinite(scores))
    allowed = 6 * math.sqrt(rate * (1 - rate) / shown)
    share_error = abs(kept / shown - (1 - rate)) / allowed
    return lambda result, strictly: max(error_of(result, pieces), share_error)


def kept_weights(
    places: Sequence[Any], v: Any, ours: Callable[[Any], Contestant], stopwatch: Stopwatch
) -> list[np.ndarray]:
    """Return which weights of some rows are not dropped.

    Values that are 0 but for N at key j in column c show the weight of key j in column c, and as
    a weight is about 1 / N, nothing underflows. A call shows as many keys as there are columns.
    """
    length, columns = v.shape[-2:]
    shown = stopwatch.array(length * np.eye(columns, dtype=np.float32)).astype(v.dtype)
    probe = v.copy()
    us = ours(probe)
    found: list[list[np.ndarray]] = [[] for _ in places]
    with us.scope():
        for start in range(0, length, columns):
            count = min(columns, length - start)
            probe[...] = 0
            probe[..., start : start + count, :] = shown[:count]
            out = us.call()
            for masks, place in zip(found, places):
                masks.append(peers.to_host(out[place])[:, :count] != 0)
    return [np.concatenate(masks, axis=-1) for masks in found]


def by_chance(rows: Sequence[Row], dtype: str, rate: float) -> Judge:
    """Judge an answer of which nobody knows what was dropped.

    A weight p becomes p / (1 - r) or, with probability r, 0. Its error is p e, where e has mean 0,
    variance r / (1 - r), and is at most max(1, r / (1 - r)) in size. An element of the result errs
    by a sum of such errors times values: Bernstein's inequality says what that is below, but once
    in a billion. The squares of the errors are as large as their variances on average. And the sum
    of all errors along the right answer, which tells a wrong mean, is within eight standard errors
    of 0.
    """
    odds = rate / (1 - rate)
    pieces, drift_variance, drift_rounding = [], 0.0, 0.0
    for place, scores, values in rows:
        right, rounding = attention.weighed(scores, values, dtype)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        variance = odds * (weights**2 @ values**2)
        largest = max(1, odds) * (weights * np.abs(values).max(-1)).max(-1, keepdims=True)
        third = CERTAIN * largest / 3
        allowed = third + np.sqrt(third**2 + 2 * CERTAIN * variance) + rounding
        pieces.append((place, right, allowed, variance))
        drift_variance += odds * np.sum((weights * (right @ values.T)) ** 2)
        drift_rounding += np.sum(rounding * np.abs(right))
    drift_allowed = 8 * math.sqrt(drift_variance) + drift_rounding

    def judge(result: Any, strictly: bool) -> float:
        worst, spread, drift = [], [], 0.0
        for place, right, allowed, variance in pieces:
            error = peers.to_host(result[place]) - right
            worst.append(np.max(np.abs(error) / allowed))
            spread.append(np.mean(error**2 / variance))
            drift += np.sum(error * right)
        worst.append(abs(drift) / drift_allowed)
        return float(max(worst)) if 1 / SPREAD < np.mean(spread) < SPREAD else WRONG

    return judge
