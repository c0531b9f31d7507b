"""What went wrong once, or nearly did: signs, sizes and numbers at the ends of their range."""

from __future__ import annotations

import numpy as np
import pytest
from calling import attend, host, judge
from strategies import DTYPES, Problem, materialise
from tolerance import ROUNDOFF

import cuflash
from cuflash import Variant

SIDES = {"len_q": 70, "len_k": 300, "group": 2, "batch": (2,), "shared": ((False,),) * 3}


def half_hidden(xp, form: str) -> dict:
    """The same mask as an array and as an expression."""
    if form == "mask":
        return {"mask": xp.asarray(np.arange(300) % 3 > 0)}
    return {"variant": Variant(mask="j % 3 > 0")}


@pytest.mark.parametrize("form", ["mask", "variant"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, -1e-50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_not_positive(xp, dtype, scale, form):
    call = materialise(Problem(dtype=dtype, scale=scale, **SIDES))
    truth = judge(call, mask=np.arange(300) % 3 > 0)
    truth.check(*attend(call, xp, **half_hidden(xp, form)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_large_negative_biases_have_weights(xp, dtype):
    """The usual -1e9 in place of a mask: a row of nothing else is the mean."""
    call = materialise(Problem(dtype=dtype, **SIDES))
    low = np.zeros((70, 1), np.float32)
    low[5:9] = -1e9
    q, k, v = (xp.asarray(x) for x in (0 * call.q, call.k, call.v))
    out = host(cuflash.attention(q, k, v, bias=xp.asarray(low)))
    mean = call.v.astype(np.float64).mean(axis=-2, keepdims=True).repeat(2, axis=1)
    np.testing.assert_allclose(out.astype(float), np.broadcast_to(mean, out.shape), atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_without_bound(xp, dtype):
    """One of -inf takes no part; one of infinity or NaN has no answer, keys or none."""
    call = materialise(Problem(dtype=dtype, **SIDES))
    sinks = xp.asarray(np.array([-np.inf, np.inf], np.float32))
    for lengths in (300, 0):
        out, lse = map(host, attend(call, xp, sinks=sinks, kv_lengths=lengths))
        plain, plain_lse = map(host, attend(call, xp, kv_lengths=lengths))
        # The kernel with sinks may have other tiles, and so round otherwise.
        unit = 4 * ROUNDOFF[dtype]
        alike = (each[:, 0].astype(np.float64) for each in (out, plain))
        np.testing.assert_allclose(*alike, rtol=unit, atol=unit)
        np.testing.assert_allclose(lse[:, 0], plain_lse[:, 0], rtol=1e-6)
        assert np.isnan(out[:, 1]).all()
        assert np.isnan(lse[:, 1]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_divisors_that_are_products(xp, dtype):
    call = materialise(Problem(dtype=dtype, **SIDES))
    cap = np.array([2.0, 5.0], dtype)
    variant = Variant("score / (cap[h] * 2) + score / (4 / cap[h])")(cap=xp.asarray(cap))
    factor = (1 / (cap * 2) + cap / 4)[:, None, None]
    truth = judge(call, score=lambda score, **_: score * factor)
    truth.check(*attend(call, xp, variant=variant))


def test_multiples_are_exact(xp):
    """j / 41 is 1 at j = 41."""
    call = materialise(Problem(**SIDES))
    for mask in ("j / 41 == 1 or j / 49 == 1", "where(j / 47 >= 1, 1.0, 0.0) > 0 and j < 60"):
        variant = Variant(mask=mask)
        keys = np.arange(300)
        seen = (
            (keys == 41) | (keys == 49) if "or" in mask.split("(")[0] else (keys > 46) & (keys < 60)
        )
        judge(call, mask=seen).check(*attend(call, xp, variant=variant))


VALUES = {
    "abs(x[row, j]) > 0.5": lambda x: abs(x) > 0.5,
    "-x[row, j] < 0.5": lambda x: -x < 0.5,
    "x[row, j] < 4": lambda x: x < 4,
    "abs(x[row, j]) <= 4": lambda x: abs(x) <= 4,
    "x[row, j] == 0.1": lambda x: x == np.float32(0.1),
    "x[row, j] <= 0.3": lambda x: x <= np.float32(0.3),
    "x[row, j] * x[row, j] - x[row, j] * x[row, j] < 1e38": lambda x: x * x - x * x < 1e38,
}


@pytest.mark.parametrize("mask", VALUES)
@pytest.mark.parametrize("special", [0.1, 0.3, np.nan, np.inf, -np.inf, 1e20])
def test_no_tile_is_judged_by_what_cannot_be_bounded(xp, mask, special):
    call = materialise(Problem(**SIDES))
    x = np.random.default_rng(0).standard_normal((70, 300)).astype(np.float32)
    x[:, 64:128] = special
    x[:, 128:256:2] = special
    with np.errstate(all="ignore"):
        seen = VALUES[mask](x)
    judge(call, mask=seen).check(*attend(call, xp, variant=Variant(mask=mask)(x=xp.asarray(x))))


@pytest.mark.parametrize("number", ["shift", "doc[b]"])
def test_rows_that_parameters_choose(xp, number):
    """Of arrays that kernels read eight elements at a time."""
    call = materialise(Problem(dtype="float16", **{**SIDES, "len_k": 304}))
    m = np.random.default_rng(0).random((80, 304)) < 0.5
    values = {"shift": 3} if number == "shift" else {"doc": xp.asarray(np.array([3, 3]))}
    variant = Variant(mask=f"m[row + {number}, j]")(m=xp.asarray(m), **values)
    judge(call, mask=m[3:73]).check(*attend(call, xp, variant=variant))


def test_warming_up_with_a_mask_leaves_nothing_to_compile(cp):
    from cuflash.jit import compile

    q = cp.zeros((2, 256, 64), "float16")
    call = {"mask": cp.ones((256, 256), "bool")}
    cuflash.warmup(cuflash.attention, q, q, q, **call)
    known = set(compile._kernels)
    cuflash.attention(q, q, q, **call)
    assert set(compile._kernels) == known


def test_one_name_with_two_numbers_of_subscripts():
    with pytest.raises(ValueError, match="`x` must have as many subscripts"):
        Variant("score + x[j]") & Variant("score + x")
    Variant("score + x[j]") & Variant("score + x")(x=2)
