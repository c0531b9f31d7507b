"""topk and softmax_topk against a stable sort and SciPy: drawn problems, edges, laws, repeats."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from poison import poison
from softmax_problems import host
from strategies import DTYPES
from topk_problems import (
    FUNCTIONS,
    VALUES,
    Problem,
    answer,
    check,
    largest,
    materialise,
    problems,
)

import cuflash


def judge(xp, problem):
    x = materialise(problem)
    check(problem, x, *answer(problem, x, xp))


@given(problem=problems())
def test_problem(xp, problem):
    judge(xp, problem)


@given(problem=problems(layout="contiguous", out=None))
def test_values_of_every_kind(xp, problem):
    """The same call for all kinds of values: thresholds, ties and overflowing buffers."""
    for values in VALUES:
        judge(xp, dataclasses.replace(problem, values=values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 8, 50, 128, 256, 700, 1024])
def test_forms(xp, k, dtype):
    """One call for each form that a plan can take: few and many, short and long rows."""
    for rows, columns in [(1, k), (9, k + 1), (300, 1000), (2, 5000), (3, 40001), (1, 300_000)]:
        if columns < k or (xp is np and columns > 5000):
            continue
        for values in ("normal", "ties", "ascending"):
            for function in FUNCTIONS:
                judge(xp, Problem(k, function, dtype, (rows, columns), -1, k, values))


def test_against_scipy(xp):
    x = np.random.default_rng(0).standard_normal((20, 3000))
    values, indices = cuflash.softmax_topk(xp.asarray(x), 30)
    y = scipy.special.softmax(x, axis=-1)
    np.testing.assert_array_equal(host(indices), np.argsort(-y, axis=-1, kind="stable")[:, :30])
    np.testing.assert_allclose(host(values), -np.sort(-y, axis=-1)[:, :30], rtol=1e-13)


@pytest.mark.parametrize("dtype", [bool, "int8", "uint8", "int32", "uint64", "int64"])
def test_integers_become_float64_first(xp, dtype):
    x = xp.asarray(np.array([[3, 1, 0], [0, 1, 2]], dtype))
    for function in FUNCTIONS:
        values, indices = getattr(cuflash, function)(x, 2)
        assert values.dtype == np.float64
        want = largest(host(x), 2)
        np.testing.assert_array_equal(host(indices), want)
    np.testing.assert_array_equal(
        host(cuflash.topk(x, 2).values), np.take_along_axis(host(x), want, 1).astype(float)
    )


def test_arrays_without_axes_numbers_and_lists(xp):
    for values, indices in (cuflash.topk(xp.asarray(3.0), 1), cuflash.topk(xp.asarray([3.0]), 1)):
        assert (values.shape, indices.shape) == ((1,), (1,))
        assert (float(values[0]), int(indices[0])) == (3, 0)
    assert cuflash.softmax_topk(5, 1).values.tolist() == [1]
    assert cuflash.topk([[1, 5, 2]], np.int8(2)).indices.tolist() == [[1, 2]]


def test_nothing_to_do(xp):
    for shape, axis, want in [((0, 3), 1, (0, 2)), ((3, 0), 0, (2, 0)), ((2, 0, 4), -1, (2, 0, 2))]:
        values, indices = cuflash.topk(xp.zeros(shape, "float32"), 2, axis=axis)
        assert values.shape == indices.shape == want
        assert (values.dtype, indices.dtype) == (np.float32, np.int64)


def test_outputs_may_be_given_one_at_a_time(xp):
    x = xp.asarray(np.random.default_rng(0).standard_normal((4, 30)))
    want = cuflash.softmax_topk(x, 3)
    values, indices = xp.empty((4, 3)), xp.empty((4, 3), "int64")
    got = cuflash.softmax_topk(x, 3, out=(values, None))
    assert got.values is values
    assert (host(got.indices) == host(want.indices)).all()
    got = cuflash.softmax_topk(x, 3, out=(None, indices))
    assert got.indices is indices
    np.testing.assert_array_equal(host(got.values), host(values))


def test_broadcast_and_reversed_rows(xp):
    x = np.random.default_rng(0).standard_normal((5, 1, 200)).astype("float32")
    there = xp.broadcast_to(xp.asarray(x), (5, 3, 200))[::-1]
    indices = cuflash.topk(there, 4).indices
    want = largest(np.broadcast_to(x, (5, 3, 200))[::-1], 4)
    np.testing.assert_array_equal(host(indices), want)
    indices = cuflash.topk(there[..., ::-1], 4).indices
    want = largest(np.broadcast_to(x, (5, 3, 200))[::-1, :, ::-1], 4)
    np.testing.assert_array_equal(host(indices), want)


def test_more_axes_than_strides(xp):
    x = np.random.default_rng(0).standard_normal((3,) * 6 + (20,))
    there = xp.asarray(x)[::2, ::2, ::2, ::2, ::2, ::2]
    values, indices = cuflash.topk(there, 4)
    np.testing.assert_array_equal(host(indices), largest(host(there), 4))
    out = (xp.zeros((3,) * 6 + (5,))[::2, ::2, ::2, ::2, ::2, ::2, :4], None)
    assert cuflash.topk(there, 4, out=out).values is out[0]
    np.testing.assert_array_equal(host(out[0]), host(values))


def test_tiles_of_the_twin_change_nothing(monkeypatch):
    from cuflash._softmax.selection import topk_cpu

    for values in ("ties", "nan"):
        problem = Problem(shape=(4, 300), k=40, values=values)
        for tile in (1, 7, 300, 1024):
            monkeypatch.setattr(topk_cpu, "TILE", tile)
            judge(np, problem)


# On the GPU only.


@pytest.mark.sanitizer
@pytest.mark.parametrize("k", [1, 50, 300])
def test_repeats_are_bitwise_equal(cp, k):
    random = np.random.default_rng(0)
    for shape in [(700, 400), (7, 5000), (2, 200_000)]:
        x = cp.asarray(np.floor(random.standard_normal(shape) * 500), "float32")
        first = cuflash.softmax_topk(x, k)
        for _ in range(50):
            poison(cp)
            again = cuflash.softmax_topk(x, k)
            assert bool((again.values == first.values).all())
            assert bool((again.indices == first.indices).all())


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", (10, 128_000)), ("float64", (3, 1_000_001)), ("float16", (2, 10**7))],
)
@pytest.mark.parametrize("values", ["normal", "ascending", "descending", "constant", "periodic"])
def test_long_rows(cp, dtype, shape, values):
    for k in (1, 50, 1024):
        for function in FUNCTIONS:
            judge(cp, Problem(k, function, dtype, shape, -1, k, values))


def test_many_rows(cp):
    for k in (1, 5, 63):
        for shape in [(65536, 63), (70_001, 64), (20_000, 200)]:
            judge(cp, Problem(k, "softmax_topk", "float32", shape, -1, min(k, shape[1])))
