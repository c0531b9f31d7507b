"""The NumPy twin and what api.py makes of the arguments: small cases whose answers can be seen."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash._attention import api, cpu

INF = np.inf


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def plain(q, k, v, scale):
    """The direct formula for 2-D float64 arrays."""
    p = np.exp(scale * q @ k.T)
    return p / p.sum(axis=-1, keepdims=True) @ v


def bits(*arrays):
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("scale", [None, 0, -0.5, 2, np.float32(0.25)])
def test_scale(scale):
    q, k, v = normal(5, 16), normal(300, 16, seed=1), normal(300, 3, seed=2)
    truth = plain(*(x.astype(float) for x in (q, k, v)), 0.25 if scale is None else scale)
    assert np.allclose(cuflash.attention(q, k, v, scale=scale), truth, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
def test_dtypes(dtype):
    q = normal(2, 3, 4, dtype=dtype)
    out, lse = cuflash.attention(q, q, q, return_lse=True)
    assert out.dtype == q.dtype
    assert lse.dtype == ("float64" if dtype == "float64" else "float32")


def test_default_start_follows_the_lengths():
    """The queries are the last rows of the keys there are; those before the first key are empty."""
    q = np.zeros((2, 1, 3, 4), np.float32)
    k = v = np.zeros((1, 1, 5, 4), np.float32)
    arguments = {"causal": True, "kv_lengths": np.array([5, 2]), "return_lse": True}
    out, lse = cuflash.attention(q, k, v, **arguments)
    assert np.array_equal(out, np.zeros(q.shape))
    assert np.allclose(np.exp(lse[:, 0]), [[3, 4, 5], [0, 1, 2]])


def test_array_of_starts():
    q = np.zeros((2, 1, 3, 4), np.float32)
    arguments = {"window": (1, None), "q_start": np.array([0, 3], "u1"), "return_lse": True}
    _, lse = cuflash.attention(q, q, q, **arguments)
    assert np.allclose(np.exp(lse[:, 0]), [[3, 3, 2], [1, 0, 0]])


def test_nothing_to_attend():
    q, k = normal(2, 3, 4), normal(2, 0, 4)
    out, lse = cuflash.attention(q, k, k, return_lse=True)
    assert np.array_equal(out, np.zeros((2, 3, 4)))
    assert np.array_equal(lse, np.full((2, 3), -INF))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (0, 3, 4), (1, 0, 4), (0, 4)]
)
def test_axes_of_size_0(shape):
    x = np.zeros(shape, np.float32)
    out, lse = cuflash.attention(x, x, x, causal=True, return_lse=True)
    assert out.shape == shape
    assert lse.shape == shape[:-1]


@pytest.mark.parametrize("tile_q", [1, 3, 64])
@pytest.mark.parametrize("tile_k", [1, 5, 64])
def test_tiles_do_not_matter(tile_q, tile_k):
    q, k, v = (normal(2, 4, 19, 8, seed=seed) for seed in range(3))
    options = {"window": (4, 1), "kv_lengths": np.array([19, 11]), "return_lse": True}
    _, problem, operands = api.prepare(q, k[:, :2], v[:, :2], **options)
    operands.out, operands.lse = np.empty(q.shape, "f4"), np.empty(q.shape[:-1], "f4")
    cpu.forward(problem, operands, tile_q=tile_q, tile_k=tile_k)
    out, lse = cuflash.attention(q, k[:, :2], v[:, :2], **options)
    assert np.allclose(operands.out, out, atol=1e-6)
    assert np.allclose(operands.lse, lse, atol=1e-6)


def test_heads_in_several_steps(monkeypatch):
    q, k, v = normal(6, 5, 8), normal(3, 7, 8, seed=1), normal(3, 7, 8, seed=2)
    at_once = cuflash.attention(q, k, v)
    monkeypatch.setattr(cpu, "SCORES", 1)
    assert np.array_equal(cuflash.attention(q, k, v), at_once)


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
def test_what_is_masked_does_not_leak(bad):
    q, k, v = (normal(2, 1, 150, 8, seed=seed) for seed in range(3))
    k[:, :, 140:], v[:, :, 140:] = bad, bad  # past all lengths
    k[0, :, 100:], v[0, :, 100:] = bad, bad  # past the first one's
    lengths = np.array([100, 140])
    masked = cuflash.attention(q, k, v, kv_lengths=lengths)
    k[~np.isfinite(k)], v[~np.isfinite(v)] = 0, 0
    assert np.array_equal(masked, cuflash.attention(q, k, v, kv_lengths=lengths))


def test_masked_scores_do_not_leak():
    """Row i sees key i + 1 and those before it: a NaN in the last key is the last two rows'."""
    q, k, v = normal(9, 8), normal(9, 8), normal(9, 8)
    clean = cuflash.attention(q, k, v, q_start=0, window=(None, 1))
    k[-1] = np.nan
    out = cuflash.attention(q, k, v, q_start=0, window=(None, 1))
    assert np.array_equal(out[:-2], clean[:-2])
    assert np.isnan(out[-2:]).all()


def test_empty_rows_ignore_their_queries():
    q = np.full((2, 4), np.nan, np.float32)
    out, lse = cuflash.attention(q, q, q, causal=True, q_start=-2, return_lse=True)
    assert np.array_equal(out, np.zeros((2, 4)))
    assert np.array_equal(lse, np.full(2, -INF))


def test_large_scores():
    q = np.full((3, 4), 1e4, np.float16)
    assert np.array_equal(cuflash.attention(q, q, q), q)


def test_same_bits_each_run_and_for_any_strides():
    q, k, v = (normal(2, 3, 140, 24, seed=seed) for seed in range(3))
    first = bits(*cuflash.attention(q, k, v, causal=True, return_lse=True))
    views = [
        np.asfortranarray(q),
        k[..., ::-1, :].copy()[..., ::-1, :],
        np.repeat(v, 2, -1)[..., ::2],
    ]
    assert not any(view.flags.c_contiguous for view in views)
    for _ in range(3):
        assert bits(*cuflash.attention(*views, causal=True, return_lse=True)) == first


def test_outputs_come_back_themselves():
    q = normal(2, 3, 4, dtype="float16")
    expected = cuflash.attention(q, q, q, return_lse=True)
    out, lse = np.empty((3, 2, 4), "float16").swapaxes(0, 1), np.empty((2, 3), np.float32)
    assert cuflash.attention(q, q, q, out=out) is out
    assert np.array_equal(out, expected.out)
    for given in ((out, lse), (None, lse), (out, None), out, None):
        result = cuflash.attention(q, q, q, return_lse=True, out=given)
        assert type(result) is api.AttentionResult
        assert bits(*result) == bits(*expected)
        for array, its_place in zip(result, given if isinstance(given, tuple) else (given,)):
            assert its_place is None or array is its_place


def test_out_in_float32_for_halves():
    q, out = normal(3, 4, dtype="float16"), np.empty((3, 4), np.float32)
    cuflash.attention(q, q, q, out=out)
    assert np.array_equal(out.astype("float16"), cuflash.attention(q, q, q))
    assert not np.array_equal(out, out.astype("float16"))


@pytest.mark.parametrize("length", [0, 3, np.int8(7)])
def test_one_length_for_all(length):
    q, k = normal(2, 1, 4, 8), normal(2, 1, 7, 8, seed=1)
    lengths = np.full(2, length, np.uint8)
    out = cuflash.attention(q, k, k, kv_lengths=length, causal=True)
    assert np.array_equal(out, cuflash.attention(q, k, k, kv_lengths=lengths, causal=True))


class TestProblem:
    """What api.prepare makes of window, causal and q_start: sides that bound nothing are None."""

    @staticmethod
    def sides(len_q=4, len_k=7, **options):
        q, k = np.empty((2, 1, len_q, 8), np.float32), np.empty((2, 1, len_k, 8), np.float32)
        _, problem, _ = api.prepare(q, k, k, **options)
        return problem.left, problem.right, problem.q_start, problem.q_start_array

    def test_causal(self):
        assert self.sides(causal=True) == (None, 0, None, False)
        assert self.sides(causal=True, window=2) == (2, 0, None, False)
        assert self.sides(causal=True, q_start=1) == (None, 0, 1, False)

    def test_one_query_at_the_end_sees_all(self):
        assert self.sides(len_q=1, causal=True) == (None, None, None, False)
        lengths = np.array([3, 5])
        assert self.sides(len_q=1, causal=True, kv_lengths=lengths) == (None, None, None, False)

    def test_wide_windows(self):
        assert self.sides(window=(5, 2)) == (5, 2, None, False)
        assert self.sides(window=(6, 3)) == (None, None, None, False)
        assert self.sides(window=(3, 4), q_start=1) == (3, 4, 1, False)
        assert self.sides(window=(4, 6), q_start=1) == (None, None, None, False)
        assert self.sides(window=2**80) == (None, None, None, False)

    def test_starts(self):
        starts = np.array([0, 3])
        assert self.sides(q_start=starts) == (None, None, None, False)
        assert self.sides(q_start=starts, causal=True) == (None, 0, None, True)


def test_merge():
    q, k, v = (normal(2, 3, 8, seed=seed, dtype="float64") for seed in range(3))
    whole = cuflash.attention(q, k, v, causal=True, return_lse=True)
    parts = [
        cuflash.attention(
            q, k[:, j : j + 1], v[:, j : j + 1], causal=True, q_start=-j, return_lse=True
        )
        for j in range(3)
    ]
    for merged in (cuflash.merge_attention(*zip(*parts)), cuflash.merge_attention(*zip(whole))):
        assert type(merged) is api.MergedAttention
        assert np.allclose(merged.out, whole.out, atol=1e-15)
        assert np.allclose(merged.lse, whole.lse, atol=1e-15)


def test_merge_parts_without_keys():
    """A part whose lse is -inf has no say, whatever it holds; if all are so, the row is empty."""
    out, lse = normal(2, 4, dtype="float16"), np.array([1, -INF], np.float32)
    nan, none = np.full((2, 4), np.nan, np.float16), np.full(2, -INF, np.float32)
    merged = cuflash.merge_attention([nan, out], [none, lse])
    assert np.array_equal(merged.out, [out[0], np.zeros(4)])
    assert np.array_equal(merged.lse, lse)
    assert merged.out.dtype == np.float16


def test_merge_into_outputs():
    outs, lses = [normal(2, 3, 4), normal(2, 3, 4, seed=1)], [normal(2, 3), normal(2, 3, seed=1)]
    expected = cuflash.merge_attention(outs, lses)
    out, lse = np.empty((2, 3, 4), np.float32), np.empty((2, 3), np.float32)
    for given in ((out, lse), (None, lse), out):
        merged = cuflash.merge_attention(outs, lses, out=given)
        assert bits(*merged) == bits(*expected)
        for array, its_place in zip(merged, given if isinstance(given, tuple) else (given,)):
            assert its_place is None or array is its_place


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_pytorch(require, axes):
    torch = require("torch")
    q = torch.ones((2, 1, 5, 8)[-axes:], dtype=torch.bfloat16)
    out, lse = cuflash.attention(q, q, q, causal=True, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, q)
    assert torch.allclose(lse.exp(), torch.arange(1.0, 6.0) * np.exp(8**0.5))
    into = torch.empty_like(q)
    assert cuflash.attention(q, q, q, out=into) is into
    merged = cuflash.merge_attention([out, out], [lse, lse])
    assert torch.equal(merged.out, q)
    assert torch.allclose(merged.lse, lse + np.log(2))


def test_jax(require):
    jnp = require("jax").numpy
    q = jnp.ones((2, 5, 8), jnp.float32)
    out, lse = cuflash.attention(q, q, q, kv_lengths=3, return_lse=True)
    assert type(out) is type(lse) is type(q)
    assert jnp.allclose(out, 1)
