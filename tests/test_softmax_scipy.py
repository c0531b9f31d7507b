"""The real-valued cases of SciPy's own tests, scipy/special/tests/test_logsumexp.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from softmax_problems import host

from cuflash import log_softmax, logsumexp, softmax

INF, NAN = np.inf, np.nan


def close(got, want, rtol=1e-7):
    want = np.asarray(host(want))
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(host(got), want, rtol=rtol)


def equal(got, want):
    np.testing.assert_array_equal(host(got), want)


# logsumexp.


def test_small_large_and_many(xp):
    equal(logsumexp(xp.asarray([])), -INF)
    a = np.arange(200.0)
    close(logsumexp(xp.asarray(a)), np.log(np.sum(np.exp(a))))
    close(logsumexp(xp.asarray([1000.0, 1000.0])), 1000 + math.log(2))
    close(logsumexp(xp.full((1000,), 10000)), 10000 + math.log(1000))
    x = np.full((2, 10**6), 1e-40)
    for axis in (None, 0, 1):
        log = logsumexp(xp.asarray(np.log(x)), axis=axis)
        close(np.exp(host(log)), np.sum(x, axis=axis))


def test_infinity_and_nan(xp):
    for value in (INF, -INF, NAN):
        equal(logsumexp(xp.asarray([value])), value)
    equal(logsumexp(xp.asarray([-INF, -INF])), -INF)
    for x in (INF, -INF):
        for y in (INF, -INF):
            with np.errstate(all="ignore"):
                want = np.log(np.exp(x) + np.exp(y))
            equal(logsumexp(xp.asarray([x, y])), want)


def test_axes_of_different_magnitude(xp):
    a = xp.asarray([[1e10, 1e-10], [-1e10, -INF]])
    close(logsumexp(a, axis=-1), np.array([1e10, -1e10]))
    close(logsumexp(a, axis=-1, keepdims=True), np.array([[1e10], [-1e10]]))
    close(logsumexp(a, axis=(-1, -2)), np.float64(1e10))


def test_weights(xp):
    a, b = np.arange(200.0), np.arange(200.0, 0, -1)
    close(logsumexp(xp.asarray(a), b=xp.asarray(b)), np.log(np.sum(b * np.exp(a))))
    a, b = xp.asarray([1000, 1000]), xp.asarray([1.2, 1.2])
    close(logsumexp(a, b=b), 1000 + math.log(2.4))
    x = np.full((2, 10**5), 1e-40)
    b = np.stack([np.linspace(1, 1000, 10**5)] * 2)
    for axis in (None, 0, 1):
        log = logsumexp(xp.asarray(np.log(x)), b=xp.asarray(b), axis=axis)
        close(np.exp(host(log)), np.sum(b * x, axis=axis))


def test_sign(xp):
    r, s = logsumexp(xp.asarray([1, 1, 1]), b=xp.asarray([1, -1, -1]), return_sign=True)
    close(r, 1.0)
    equal(s, -1)
    r, s = logsumexp(xp.asarray([1, 1]), b=xp.asarray([1, -1]), return_sign=True)
    equal(r, -INF)
    equal(s, 0)


def test_shapes(xp):
    a = xp.ones((1, 2, 3, 4))
    for axis, shape in [(2, (1, 2, 4)), ((1, 3), (1, 3))]:
        assert logsumexp(a, axis=axis, b=xp.ones_like(a)).shape == shape
        r, s = logsumexp(a, axis=axis, b=xp.ones_like(a), return_sign=True)
        assert r.shape == s.shape == shape
    logsumexp(xp.zeros((4, 1, 2, 1)), b=xp.ones((3, 1, 5)))


def test_weight_of_zero(xp):
    close(logsumexp(xp.asarray([1, 10000]), b=xp.asarray([1, 0])), 1.0)


@pytest.mark.parametrize("argument", [1, [1, 2, 3]])
def test_array_like(argument):
    assert logsumexp(argument) == logsumexp(np.atleast_1d(argument))
    close(logsumexp([1000, 1000]), 1000 + math.log(2))


DTYPES = ["float32", "float64", "int32", "int64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_a(xp, dtype):
    want = np.dtype(dtype if "float" in dtype else "float64").type(1000 + math.log(2))
    close(logsumexp(xp.asarray([1000, 1000], dtype)), want)


@pytest.mark.parametrize("dtype_a", DTYPES)
@pytest.mark.parametrize("dtype_b", DTYPES)
def test_dtypes_of_a_and_b(xp, dtype_a, dtype_b):
    common = np.result_type(np.dtype(dtype_a), np.dtype(dtype_b))
    common = common if common.kind == "f" else np.dtype("float64")
    got = logsumexp(xp.asarray([2, 1], dtype_a), b=xp.asarray([1, -1], dtype_b))
    close(got, common.type(math.log(math.exp(2) - math.exp(1))), rtol=1e-6)


def test_one_element_much_larger_than_the_rest(xp):
    """SciPy issue 18295."""
    close(logsumexp(xp.asarray([0.0, -40.0])), np.logaddexp(0.0, -40.0))


def test_inputs_are_not_written(xp):
    a, b = xp.asarray([5.0, 4.0]), xp.asarray([3.0, 2.0])
    logsumexp(a)
    logsumexp(a, b=b)
    equal(a, [5, 4])
    equal(b, [3, 2])


def test_negative_weight_of_the_largest(xp):
    """SciPy issue 22903."""
    a = xp.asarray([3.06409428, 0.37251854, 3.87471931])
    b = xp.asarray([1.88190708, 2.84174795, -0.85016884])
    close(logsumexp(a, b=b), logsumexp(a, b=b, return_sign=True)[0])
    assert np.isfinite(host(logsumexp(a, b=b)))
    b = xp.asarray([1.88190708, 2.84174795, -3.85016884])
    equal(logsumexp(a, b=b), NAN)


@pytest.mark.parametrize(("b", "want"), [(None, 1), ([-1.0], -1)])
def test_sign_of_infinity(xp, b, want):
    """SciPy issue 23548."""
    value, sign = logsumexp(
        xp.asarray([INF]), b=None if b is None else xp.asarray(b), return_sign=True
    )
    equal(value, INF)
    equal(sign, want)


# softmax.

# From mpmath with 200 digits.
OF_0_TO_3 = [0.03205860328008499, 0.08714431874203256, 0.23688281808991013, 0.6439142598879722]


def test_softmax_of_one_axis(xp):
    for x, want in [
        ([1000.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([0.0, 1.0], np.array([1, np.e]) / (1 + np.e)),
    ]:
        close(softmax(xp.asarray(x)), np.array(want), rtol=1e-13)
    x = xp.arange(4.0)
    close(softmax(x), np.array(OF_0_TO_3), rtol=1e-13)
    close(softmax(x + 100), np.array(OF_0_TO_3), rtol=1e-13)
    close(softmax(x.reshape(2, 2)), np.array(OF_0_TO_3).reshape(2, 2), rtol=1e-13)


def test_softmax_of_some_axes(xp):
    x = xp.asarray([[1000.0, 0.0], [1000.0, 0.0]])
    close(softmax(x, axis=0), np.full((2, 2), 0.5), rtol=1e-13)
    close(softmax(x, axis=1), np.array([[1.0, 0.0], [1.0, 0.0]]), rtol=1e-13)
    x = xp.asarray([[-25.0, 0.0, 25.0, 50.0], [1.0, 325.0, 749.0, 750.0]])
    want = np.array(
        [
            [
                2.678636961770877e-33,
                1.9287498479371314e-22,
                1.3887943864771144e-11,
                0.999999999986112,
            ],
            [0.0, 1.9444526359919372e-185, 0.2689414213699951, 0.7310585786300048],
        ]
    )
    close(softmax(x, axis=1), want, rtol=1e-13)
    close(softmax(x.T, axis=0), want.T, rtol=1e-13)
    close(softmax(x.reshape(2, 2, 2), axis=(1, 2)), want.reshape(2, 2, 2), rtol=1e-13)


def test_softmax_of_integers_numbers_and_lists(xp):
    close(softmax(xp.asarray([1000, 0, 0, 0])), np.array([1.0, 0, 0, 0]), rtol=1e-13)
    close(softmax(1000), np.float64(1), rtol=1e-13)
    close(softmax([1000, 0, 0, 0]), np.array([1.0, 0, 0, 0]), rtol=1e-13)


# log_softmax.

# From mpmath with 200 digits.
LOG_OF_0_TO_3 = [
    -3.4401896985611953,
    -2.4401896985611953,
    -1.4401896985611953,
    -0.44018969856119533,
]


def test_log_softmax_of_one_axis(xp):
    close(log_softmax(xp.asarray([1000.0, 1.0])), np.array([0.0, -999.0]), rtol=1e-13)
    close(log_softmax(xp.asarray([1000, 1])), np.array([0.0, -999.0]), rtol=1e-13)
    close(log_softmax(1.0), np.float64(0), rtol=1e-13)
    close(log_softmax([1000, 1]), np.array([0.0, -999.0]), rtol=1e-13)


@pytest.mark.parametrize("offset", [0, 100])
def test_log_softmax_is_the_same_for_shifted_values(xp, offset):
    close(log_softmax(xp.arange(4.0) + offset), np.array(LOG_OF_0_TO_3), rtol=1e-13)


def test_log_softmax_of_some_axes(xp):
    x = xp.arange(4.0).reshape(2, 2)
    close(log_softmax(x), np.array(LOG_OF_0_TO_3).reshape(2, 2), rtol=1e-13)
    x = xp.asarray([[1000.0, 1.0], [1000.0, 1.0]])
    close(log_softmax(x, axis=0), np.full((2, 2), np.log(0.5)), rtol=1e-13)
    close(log_softmax(x, axis=1), np.array([[0.0, -999.0]] * 2), rtol=1e-13)
    x, want = xp.arange(8.0).reshape(2, 4), np.array([LOG_OF_0_TO_3] * 2)
    close(log_softmax(x, axis=1), want, rtol=1e-13)
    close(log_softmax(x.T, axis=0), want.T, rtol=1e-13)
    close(log_softmax(x.reshape(2, 2, 2), axis=(1, 2)), want.reshape(2, 2, 2), rtol=1e-13)
