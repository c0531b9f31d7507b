"""Numbers at the ends of their ranges, where scaling, splitting and rescaling could break."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_of_every_integer_dtype_have_no_upper_end(cp, dtype: str) -> None:
    """A length that no len_k reaches means all keys, on a GPU."""
    x = cp.ones((1, 2, 5, 16), dtype)
    for integer in ("int8", "uint8", "int32", "uint32", "int64", "uint64"):
        most = cp.asarray([np.iinfo(integer).max], integer)
        lse = cuflash.attention(0 * x, x, x, kv_lengths=most, return_lse=True).lse
        np.testing.assert_allclose(lse.get(), np.log(5), rtol=1e-6)
