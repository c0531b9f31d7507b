"""The judge: attention by its formula, with every score in memory and nothing of cuflash.

`attention` is the truth, in float64 (in long double for float64 inputs, so that the truth is
better than what it judges). `baselines` are what a plain implementation in the inputs' own
precision gets: their error is the measure for everybody else's. Both take the user's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# Doubts are counted in this unit, a few roundings of the precision that scores are kept in.
DOUBT = {"float64": 2.0**-51, "float32": 2.0**-22}
# Beside inputs of 16 bits the GPU's own tanh serves, tanh.approx.f32: PTX promises it to 2**-10.987
# of its value. This much of a capped score, in units of doubt, may be wrong with it.
ROUGH_TANH = 2.0**-10.9 / DOUBT["float32"]


class Answer(NamedTuple):
    out: np.ndarray  # [*batch, heads, len_q, d_v]; heads and batch as in q
    lse: np.ndarray  # [*batch, heads, len_q]
    mass: np.ndarray  # [*batch, heads, len_q, d_v], sum over the keys of p |v|
    # [*batch, heads, len_q, d_v], the part of `mass` that weights below SMALLEST bring. It shows
    # only in rows whose sink takes all but nothing.
    flushed: np.ndarray
    # What errors in the scores, each as large as the sum of all that it was made of, would change
    # at most: of its |scale q k|, and of what variants add.
    out_doubt: np.ndarray  # [*batch, heads, len_q, d_v]
    lse_doubt: np.ndarray  # [*batch, heads, len_q]
    # [*batch, heads or 1, len_q, len_k], True where a query may see a key
    allowed: np.ndarray


# The smallest normal float32. CUDA code is compiled with flush-to-zero: weights below it become 0.
SMALLEST = 2.0**-126


# A user's expression: of score, b, h, i, j, row, len_q and len_k, as arrays that broadcast.
Function = Callable[..., Any]


class Variants(NamedTuple):
    """What else a user may ask for, in the user's form."""

    softcap: float | None = None
    alibi: np.ndarray | None = None  # [..., heads]
    bias: np.ndarray | None = None  # [..., heads, len_q, len_k]
    mask: np.ndarray | None = None  # [..., heads, len_q, len_k]
    sinks: np.ndarray | None = None  # [..., heads]
    score: Function | None = None
    visible: Function | None = None


def attention(
    q,
    k,
    v,
    *,
    scale=None,
    causal=False,
    window=None,
    q_start=None,
    kv_lengths=None,
    dropout=None,
    seed=None,
    **others,
) -> Answer:
    """softmax(scale q k^T) v over the allowed keys, varied by `others`: the fields of Variants.

    A row without any keys is 0, and its lse the row's sink, or -inf.
    """
    exact = np.longdouble if q.dtype == np.float64 else np.float64
    variants = Variants(**others)
    rows, keys, values = heads_repeated(q, k, v, exact)
    at = places(rows, keys, values, q_start, kv_lengths)
    allowed = allowed_keys(rows, keys, values, causal, window, at)
    allowed = visible_keys(allowed, variants, at)
    sink = sinks(variants, exact)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with np.errstate(all="ignore"):
        size = abs(scale) * (np.abs(rows) @ np.abs(keys).swapaxes(-1, -2))
        scores = scale * (rows @ keys.swapaxes(-1, -2))
        scores, size = varied(scores, size, variants, at, q.dtype)
        scores = np.where(allowed, scores, -np.inf)
        top = finite_top(scores, sink)
        p = np.exp(scores - top)
        of_sink = np.exp(sink - top)
        total = p.sum(axis=-1, keepdims=True) + of_sink
        lse = (top + np.log(total))[..., 0]
        p /= np.where(total == 0, 1, total)
        # A row of v that no query may see is not there, whatever stands in it.
        values = np.where(allowed.any(axis=-2)[..., None], values, 0)
        kept, keeping = kept_weights(at, dropout, seed)
        out = np.where(kept, p, 0) @ values / keeping
        # The rest is about rounding errors and need not be exact. An error of e in the score of
        # key j changes lse by p e and out by p e (v_j - out).
        values, p = (np.abs(x).astype(np.float64) for x in (values, p))
        mass = np.where(kept, p, 0) @ values / keeping
        # Twice: a weight just above may be rounded below.
        tiny = kept & (p > 0) & (p < 2 * SMALLEST)
        flushed = np.where(tiny, p, 0) @ values / keeping if tiny.any() else np.zeros_like(mass)
        p *= np.where(allowed & np.isfinite(scores), size, 0).astype(np.float64)
        of_sink = np.where(np.isfinite(sink), of_sink / total * np.abs(sink), 0)
        lse_doubt = p.sum(axis=-1) + of_sink[..., 0].astype(np.float64)
        out_doubt = np.where(kept, p, 0) @ values / keeping
        out_doubt = out_doubt + lse_doubt[..., None] * np.abs(out).astype(np.float64)
    shape = out.shape if q.ndim > 2 else out.shape[1:]
    return Answer(
        out=out.reshape(shape),
        lse=lse.reshape(shape[:-1]),
        mass=mass.reshape(shape),
        flushed=flushed.reshape(shape),
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
    dropout=None,
    seed=None,
    **others,
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
    variants = Variants(**others)
    at = places(*arrays, q_start, kv_lengths)
    allowed = visible_keys(allowed_keys(*arrays, causal, window, at), variants, at)
    sink = sinks(variants, wide)
    attended = allowed.any(axis=-2)[..., None]
    kept, keeping = kept_weights(at, dropout, seed)
    keeping = wide(keeping)
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
        early = wide(1) if has_score(variants) else fold  # what scores are multiplied by at once
        with np.errstate(all="ignore"):
            if sequential:
                scores = matmul(rows * (scale * early), keys.swapaxes(-1, -2))
            else:
                scores = matmul(rows, keys.swapaxes(-1, -2)) * (scale * early)
            scores, _ = varied(scores, wide(0), variants, at, q.dtype)
            scores = np.where(allowed, scores * (fold / early), -np.inf)
            top = finite_top(scores, sink * fold)
            p = exp(scores - top)
            total = p.sum(axis=-1, keepdims=True) + exp(sink * fold - top)
            lse = ((top + log(total)) / fold)[..., 0]
            total = np.where(total == 0, 1, total)
            values = np.where(attended, values, 0)
            if folded:
                out = matmul(narrow(np.where(kept, p, 0)), values) / total / keeping
            else:
                out = matmul(narrow(np.where(kept, p / total, 0)), values) / keeping
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


def places(q, k, v, q_start, kv_lengths) -> dict[str, np.ndarray]:
    """Where scores stand, by the names that expressions have for it."""
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    row = np.arange(q.shape[-2])[:, None]
    length = per_batch(k.shape[-2] if kv_lengths is None else kv_lengths)
    start = length - q.shape[-2] if q_start is None else per_batch(q_start)
    return {
        "b": np.arange(math.prod(batch)).reshape(*batch, 1, 1, 1),
        "h": np.arange(q.shape[-3])[:, None, None],
        "i": row + start,
        "j": np.arange(k.shape[-2]),
        "row": row,
        "len_q": np.asarray(q.shape[-2]),
        "len_k": length,
    }


def allowed_keys(q, k, v, causal, window, at) -> np.ndarray:
    """Which query may see which key, ``[*batch, 1, len_q, len_k]``."""
    len_q, len_k = q.shape[-2], k.shape[-2]
    i, j, length = at["i"], at["j"], at["len_k"]
    allowed = np.broadcast_to(j < length, np.broadcast_shapes(length.shape, (1, len_q, len_k)))
    left, right = window if isinstance(window, tuple) else (window, window)
    if causal:
        allowed = allowed & (j <= i)
    if left is not None:
        allowed = allowed & (j >= i - left)
    if right is not None:
        allowed = allowed & (j <= i + right)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    return np.broadcast_to(allowed, (*batch, 1, len_q, len_k))


def kept_weights(at, dropout, seed) -> tuple[np.ndarray, float]:
    """Which weights dropout keeps, [*batch, heads, len_q, len_k], and the probability of that."""
    if not dropout:
        return np.True_, 1.0
    threshold = min(max(round(dropout * 65536), 1), 65535)
    return dropout_numbers(at["b"], at["h"], at["row"], at["j"], seed) >= threshold, (
        1 - threshold / 65536
    )


def dropout_numbers(b, h, row, j, seed) -> np.ndarray:
    """The number, below 65536, that decides about the weight of each place, one place by one."""
    words = philox_4x32(*dropout_call(b, h, row, j), seed)
    word = np.choose(row // 8 % 2 * 2 + j // 8 % 2, words)
    return (word >> (j % 2 * 16).astype(np.uint64)) & np.uint64(0xFFFF)


def dropout_call(b, h, row, j) -> tuple[np.ndarray, ...]:
    """The counter of the call that makes the number of each place, and seven others."""
    return row // 16 * 8 + row % 8, j // 16 * 4 + j % 8 // 2, h, b


def philox_4x32(a, b, c, d, seed) -> list[np.ndarray]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: seven rounds."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = (np.asarray(x).astype(np.uint64) for x in np.broadcast_arrays(a, b, c, d))
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        of_a, of_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            of_c >> half ^ b ^ np.uint64(keys[0]),
            of_c & mask,
            of_a >> half ^ d ^ np.uint64(keys[1]),
            of_a & mask,
        )
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return [a, b, c, d]


def visible_keys(allowed: np.ndarray, variants: Variants, at) -> np.ndarray:
    """The allowed keys that no variant hides."""
    if variants.mask is not None:
        allowed = allowed & variants.mask
    if variants.visible is not None:
        allowed = allowed & variants.visible(score=None, **at)
    return allowed


def has_score(variants: Variants) -> bool:
    given = (variants.softcap, variants.alibi, variants.bias, variants.score)
    return any(each is not None for each in given)


def varied(scores, size, variants: Variants, at, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of scores of inputs of this dtype, and how large the errors in them may be.

    `size` is the sum of what the scores were made of. What is added to a score counts by its own
    size, for a sum is rounded like the larger part. A soft cap makes no error larger, but tanh has
    one of its own. Of a user's own score it is found out what errors so large do to it.
    """
    wide = scores.dtype.type
    if variants.softcap is not None:
        cap = wide(variants.softcap)
        scores = cap * np.tanh(scores / cap)
        size = size + np.abs(scores) * (1 + (ROUGH_TANH if dtype.itemsize == 2 else 0))
    if variants.alibi is not None:
        distance = np.abs(at["i"] - at["j"]).astype(wide)
        added = np.asarray(variants.alibi).astype(wide)[..., None, None] * distance
        scores, size = scores - added, size + np.abs(added)
    if variants.bias is not None:
        added = np.asarray(variants.bias).astype(wide)
        scores, size = scores + added, size + np.abs(added)
    if variants.score is not None:
        call = lambda score: np.asarray(variants.score(score=score, **at)).astype(wide)
        error = DOUBT["float64" if dtype == np.float64 else "float32"]
        spread = np.abs(call(scores + error * size) - call(scores - error * size)) / (2 * error)
        after = call(scores)  # which need not depend on scores, nor on all that these depend on
        scores = np.broadcast_to(after, np.broadcast_shapes(after.shape, scores.shape))
        size = spread + np.abs(scores)
    return scores, size


def sinks(variants: Variants, dtype) -> np.ndarray:
    """The sink of each row, ``[..., heads, 1, 1]``, -inf where there is none."""
    given = -np.inf if variants.sinks is None else variants.sinks
    return np.asarray(given).astype(dtype)[..., None, None]


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


def finite_top(scores: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """The largest score of each row, its sink among them, or 0 in a row that has none."""
    top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
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
