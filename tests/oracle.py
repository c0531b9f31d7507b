"""The judge: attention by its formula, with every score in memory and nothing of cuflash.

`attention` is the truth, in float64 (in long double for float64 inputs, so that the truth is
better than what it judges). `baselines` are what a plain implementation in the inputs' own
precision gets: their error is the measure for everybody else's. Both take the user's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    out: np.ndarray  # [*batch, heads, len_q, d_v]; heads and batch as in q
    lse: np.ndarray  # [*batch, heads, len_q]
    mass: np.ndarray  # [*batch, heads, len_q, d_v], sum over the keys of p |v|
    # What errors in the scores, each as large as the sum of its |scale q k|, would change at most.
    out_doubt: np.ndarray  # [*batch, heads, len_q, d_v]
    lse_doubt: np.ndarray  # [*batch, heads, len_q]
    allowed: np.ndarray  # [*batch, 1, len_q, len_k], True where a query may see a key


def attention(
    q, k, v, *, scale=None, causal=False, window=None, q_start=None, kv_lengths=None
) -> Answer:
    """softmax(scale q k^T) v over the allowed keys; a row without any is 0 with lse -inf."""
    exact = np.longdouble if q.dtype == np.float64 else np.float64
    rows, keys, values = heads_repeated(q, k, v, exact)
    allowed = allowed_keys(rows, keys, values, causal, window, q_start, kv_lengths)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with np.errstate(all="ignore"):
        scores = np.where(allowed, scale * (rows @ keys.swapaxes(-1, -2)), -np.inf)
        top = finite_top(scores)
        p = np.exp(scores - top)
        total = p.sum(axis=-1, keepdims=True)
        lse = (top + np.log(total))[..., 0]
        p /= np.where(total == 0, 1, total)
        # A row of v that no query may see is not there, whatever stands in it.
        values = np.where(allowed.any(axis=-2)[..., None], values, 0)
        out = p @ values
        # The rest is about rounding errors and need not be exact. An error of e in the score of
        # key j changes lse by p e and out by p e (v_j - out).
        rows, keys, values, p = (np.abs(x).astype(np.float64) for x in (rows, keys, values, p))
        mass = p @ values
        p *= np.where(allowed, abs(scale) * (rows @ keys.swapaxes(-1, -2)), 0)
        lse_doubt = p.sum(axis=-1)
        out_doubt = p @ values + lse_doubt[..., None] * np.abs(out).astype(np.float64)
    shape = out.shape if q.ndim > 2 else out.shape[1:]
    return Answer(
        out=out.reshape(shape),
        lse=lse.reshape(shape[:-1]),
        mass=mass.reshape(shape),
        out_doubt=out_doubt.reshape(shape),
        lse_doubt=lse_doubt.reshape(shape[:-1]),
        allowed=allowed,
    )


def baselines(
    q,
    k,
    v,
    *,
    scale=None,
    causal=False,
    window=None,
    q_start=None,
    kv_lengths=None,
    precision=None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Plain evaluations, (out, lse) each, with scores and sums in float32.

    P is rounded to the inputs' dtype (float64 inputs: everything is float64), out is not. The
    first normalises P before it is rounded. The second folds log2(e) into the scale, rounds P as
    it comes and divides at the end. The third, for float32 and float64, also scales q beforehand
    and adds up all products one by one. All are good float arithmetic; where one is lucky and
    right to the last bit, another seldom is. ``precision="tf32"`` rounds all operands of products
    to TF32's 11 bits, in the first to the nearest, in the second towards zero.
    """
    wide = np.float64 if q.dtype == np.float64 else np.float32
    arrays = heads_repeated(q, k, v, wide)
    allowed = allowed_keys(*arrays, causal, window, q_start, kv_lengths)
    attended = allowed.any(axis=-2)[..., None]
    scale = wide(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    found = []
    one_by_one = [(True, True)] if q.dtype.itemsize > 2 and precision is None else []
    for folded, sequential in [(False, False), (True, False), *one_by_one]:
        narrow = operand_rounding(q.dtype, precision, towards_zero=folded)
        matmul = one_product_at_a_time if sequential else np.matmul
        rows, keys, values = (narrow(array) for array in arrays)
        fold, exp, log = (
            (wide(math.log2(math.e)), np.exp2, np.log2) if folded else (wide(1), np.exp, np.log)
        )
        with np.errstate(all="ignore"):
            if sequential:
                scores = matmul(rows * (scale * fold), keys.swapaxes(-1, -2))
            else:
                scores = matmul(rows, keys.swapaxes(-1, -2)) * (scale * fold)
            scores = np.where(allowed, scores, -np.inf)
            top = finite_top(scores)
            p = exp(scores - top)
            total = p.sum(axis=-1, keepdims=True)
            lse = ((top + log(total)) / fold)[..., 0]
            total = np.where(total == 0, 1, total)
            values = np.where(attended, values, 0)
            if folded:
                out = matmul(narrow(p), values) / total
            else:
                out = matmul(narrow(p / total), values)
        assert out.dtype == lse.dtype == wide
        shape = out.shape if q.ndim > 2 else out.shape[1:]
        found.append((out.reshape(shape), lse.reshape(shape[:-1])))
    return found


def merge(outs: Sequence[np.ndarray], lses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The attention over all keys from the attentions over disjoint sets of them."""
    exact = np.longdouble if outs[0].dtype == np.float64 else np.float64
    lse = np.stack([lse.astype(exact) for lse in lses])
    top = np.where(np.isneginf(lse).all(axis=0), 0, lse.max(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.exp(lse - top)
        total = weight.sum(axis=0)
        merged = top + np.log(total)
        weight = (weight / np.where(total == 0, 1, total))[..., None]
        parts = np.stack([out.astype(exact) for out in outs])
        return np.where(weight == 0, 0, weight * parts).sum(axis=0), merged


def allowed_keys(q, k, v, causal, window, q_start, kv_lengths) -> np.ndarray:
    """Which query may see which key, ``[*batch, 1, len_q, len_k]``."""
    len_q, len_k = q.shape[-2], k.shape[-2]
    i = np.arange(len_q)[:, None]
    j = np.arange(len_k)
    length = per_batch(len_k if kv_lengths is None else kv_lengths)
    start = length - len_q if q_start is None else per_batch(q_start)
    allowed = np.broadcast_to(j < length, np.broadcast_shapes(length.shape, (1, len_q, len_k)))
    left, right = window if isinstance(window, tuple) else (window, window)
    if causal:
        allowed = allowed & (j <= i + start)
    if left is not None:
        allowed = allowed & (j >= i + start - left)
    if right is not None:
        allowed = allowed & (j <= i + start + right)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    return np.broadcast_to(allowed, (*batch, 1, len_q, len_k))


def per_batch(number) -> np.ndarray:
    """An int, or one for each batch, shaped to stand beside ``[*batch, heads, len_q, len_k]``."""
    return np.asarray(number).astype(np.int64)[..., None, None, None]


def heads_repeated(q, k, v, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At least 3-D, in `dtype`, with as many heads in k and v as in q."""
    q, k, v = (np.asarray(x).astype(dtype) for x in (q, k, v))
    q, k, v = (x[None] if x.ndim == 2 else x for x in (q, k, v))
    return q, *(np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))


def one_product_at_a_time(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b as a single thread adds it up."""
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    total = np.zeros(shape, a.dtype)
    for n in range(a.shape[-1]):
        total += a[..., :, n, None] * b[..., None, n, :]
    return total


def finite_top(scores: np.ndarray) -> np.ndarray:
    """The largest score of each row, or 0 in a row that has none."""
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    return np.where(np.isneginf(top), scores.dtype.type(0), top)


def operand_rounding(dtype: np.dtype, precision: str | None, towards_zero: bool):
    """What an operand of a product goes through before it is multiplied."""
    if precision == "tf32":
        half = 0 if towards_zero else 0x1000  # half of the last place that stays

        def to_tf32(x: np.ndarray) -> np.ndarray:
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            return ((bits + np.uint32(half)) & np.uint32(0xFFFFE000)).view(np.float32)

        return to_tf32
    wide = np.float64 if dtype == np.float64 else np.float32
    return lambda x: x.astype(dtype).astype(wide)
