"""Numbers at the ends of their ranges, where scaling, splitting and rescaling could break."""

from __future__ import annotations

import math

import calling
import numpy as np
import pytest

import cuflash

DTYPES = ["float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinitely_low_score_has_no_weight(xp, dtype: str) -> None:
    q, k, v = (xp.asarray(x, dtype) for x in ([[1]], [[-np.inf], [0]], [[1], [2]]))
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    assert calling.host(out).tolist() == [[2]]
    assert calling.host(lse).tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinitely_high_score_makes_its_row_nan(xp, dtype: str) -> None:
    q, k, v = (xp.asarray(x, dtype) for x in ([[1], [0.5]], [[np.inf], [0]], [[1], [2]]))
    out = calling.host(cuflash.attention(q, k, v, window=(None, None)))
    assert np.isnan(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-300, 1e-40, -1e-40, 0.0, 3e38])
def test_scales_at_the_ends_of_float32(xp, dtype: str, scale: float) -> None:
    """With q = 0 every scale gives every key the same weight."""
    q, k = (xp.zeros((1, 3, 64), dtype) for _ in range(2))
    v = xp.asarray(np.arange(3 * 64).reshape(1, 3, 64) % 5, dtype)
    out, lse = cuflash.attention(q, k, v, scale=scale, causal=True, return_lse=True)
    np.testing.assert_allclose(calling.host(lse), np.log([[1, 2, 3]]), rtol=1e-6)
    expected = np.cumsum(calling.host(v).astype(float), axis=1) / np.arange(1, 4)[:, None]
    np.testing.assert_allclose(calling.host(out).astype(float), expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        (dtype, largest)
        for dtype in [*DTYPES, "bfloat16"]
        for largest in [1e2, 1e3, 1e4, 6e4, 1e10]
        if dtype != "float16" or largest < 65504
    ],
)
def test_huge_scores_give_what_is_right_or_nan(xp, dtype: str, largest: float) -> None:
    """The key of the highest score has all the weight; a row that overflows is NaN, not wrong."""
    rng = np.random.default_rng(0)
    q, k = (rng.uniform(-largest, largest, (2, n, 64)).astype(dtype) for n in (70, 200))
    v = rng.standard_normal((2, 200, 64)).astype(dtype)
    scores = np.einsum("hid,hjd->hij", q.astype(float), k.astype(float)) / 8
    best = scores.argmax(-1)
    ordered = np.sort(scores, axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 30 + 1e-5 * np.abs(ordered[..., -1])
    right = np.take_along_axis(v.astype(float), best[..., None], axis=1)
    out = calling.host(cuflash.attention(*(xp.asarray(x) for x in (q, k, v)))).astype(float)
    good = np.isnan(out) | np.isclose(out, right, rtol=1e-2, atol=1e-6)
    assert clear.sum() > 20
    assert good[clear].all()
    assert np.isfinite(out).all() or largest > 1e3


@pytest.mark.parametrize("head_dim_v", [64, 256, 512])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_of_the_largest_size_weigh_to_a_mean_or_nan(xp, dtype: str, head_dim_v: int) -> None:
    """Where float32 has hardly room for weights, an output may be NaN, but never out of range."""
    rng = np.random.default_rng(0)
    q, k = np.zeros((1, 200, 64)), np.zeros((1, 300, 64))
    q[..., 0], q[..., 1] = rng.choice([4096, 8192, 16384, 32768], (1, 200)), 1
    k[..., 0], k[..., 1] = rng.choice([7936, 8064, 8128, 8192], (1, 300)), rng.integers(0, 64, 300)
    v = rng.uniform(1, 2, (1, 300, head_dim_v))
    arrays = [xp.asarray(x.astype(dtype)) for x in (q, k, v)]
    out = calling.host(cuflash.attention(*arrays, scale=math.log(2))).astype(float)
    assert (np.isnan(out) | ((out > 0.98) & (out < 2.02))).all()
    assert np.isfinite(out[q[..., 0] < 16384]).all()  # scores below 2^26


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_of_every_integer_dtype_have_no_upper_end(cp, dtype: str) -> None:
    """A length that no len_k reaches means all keys, on a GPU."""
    x = cp.ones((1, 2, 5, 16), dtype)
    for integer in ("int8", "uint8", "int32", "uint32", "int64", "uint64"):
        most = cp.asarray([np.iinfo(integer).max], integer)
        lse = cuflash.attention(0 * x, x, x, kv_lengths=most, return_lse=True).lse
        np.testing.assert_allclose(lse.get(), np.log(5), rtol=1e-6)
