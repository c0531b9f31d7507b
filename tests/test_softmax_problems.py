"""The softmax family against its formulas and against SciPy: drawn problems, laws, repeats."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.special
from hypothesis import assume, given
from softmax_problems import (
    FUNCTIONS,
    LAYOUTS,
    Problem,
    answer,
    check,
    host,
    materialise,
    place,
    problems,
)
from strategies import DTYPES

import cuflash

# Where the plan changes: one element, a vector, part of a warp, a warp, a block, two reads.
COLUMNS = [1, 4, 8, 63, 64, 1000, 1001, 1024, 4000, 4001, 16384, 40000, 40001]


@given(problem=problems())
def test_problem(xp, problem):
    call = materialise(problem)
    check(call, *answer(call, xp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("axis", [0, 1])
def test_lengths(xp, axis, columns, dtype):
    for function in FUNCTIONS:
        for rows in (3, 40):
            shape = (rows, columns) if axis else (columns, rows)
            problem = Problem(seed=columns, function=function, dtype=dtype, shape=shape, axis=axis)
            for layout in ("contiguous", "unaligned"):
                call = materialise(dataclasses.replace(problem, layout=layout))
                check(call, *answer(call, xp))


@given(problem=problems(dtype="float64", out_dtype=None))
def test_agrees_with_scipy(problem):
    """Where SciPy's own answer is sound: see the next two tests for where it is not."""
    call = materialise(problem)
    assume(call.x.size and problem.values != "huge")
    theirs = getattr(scipy.special, problem.function)
    options = {}
    x = call.x
    if problem.function == "logsumexp":
        options = {"keepdims": problem.keepdims, "return_sign": problem.return_sign, "b": call.b}
        if call.b is not None:
            x = np.where(call.b == 0, -np.inf, x)
    with np.errstate(all="ignore"):
        want = theirs(x, axis=problem.axis, **options)
    got, sign = answer(call, np)
    want, want_sign = want if problem.return_sign else (want, sign)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-9)
    if sign is not None:
        np.testing.assert_array_equal(sign, want_sign)


@pytest.mark.parametrize("dtype", [bool, "int8", "uint8", "int32", "uint64", "int64"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_integers_become_float64_first(xp, function, dtype):
    x = np.array([[3, 1, 0], [0, 1, 2]], dtype)
    got = getattr(cuflash, function)(xp.asarray(x), axis=1)
    assert got.dtype == np.float64
    with np.errstate(all="ignore"):
        want = getattr(scipy.special, function)(x.astype(float), axis=1)
    np.testing.assert_allclose(host(got), want, rtol=1e-14)


def test_weights_of_zero_remove_infinity_and_nan(xp):
    a = xp.asarray([np.inf, np.nan, 2.0, -np.inf])
    b = xp.asarray([0.0, 0.0, 1.0, 1.0])
    assert cuflash.logsumexp(a, b=b) == 2
    assert cuflash.logsumexp(a, b=xp.zeros(4)) == -np.inf
    assert cuflash.logsumexp(a[:1], b=b[:1]) == -np.inf


def test_sums_that_cancel_are_minus_infinity_without_sign(xp):
    log, sign = cuflash.logsumexp(
        xp.asarray([1000.0, 1000.0]), b=xp.asarray([1.0, -1.0]), return_sign=True
    )
    assert (log, sign) == (-np.inf, 0)
    # The largest terms cancel and the rest remains.
    a, b = xp.asarray([1000.0, 1000.0, 990.0]), xp.asarray([1.0, -1.0, 2.0])
    np.testing.assert_allclose(host(cuflash.logsumexp(a, b=b)), 990 + np.log(2), rtol=1e-15)


def test_a_number_for_b_goes_with_any_kind_and_dtype(xp):
    a = xp.asarray([[1, 2], [3, 4]], "float32")
    got = cuflash.logsumexp(a, axis=1, b=2)
    assert got.dtype == np.float32
    want = cuflash.logsumexp(a, axis=1) + np.float32(np.log(2))
    np.testing.assert_allclose(host(got), host(want), rtol=1e-6)
    assert cuflash.logsumexp(a, b=True) == cuflash.logsumexp(a)
    assert cuflash.logsumexp(a, b=0) == -np.inf


def test_b_broadcasts_both_ways(xp):
    random = np.random.default_rng(0)
    a, b = random.standard_normal((4, 1, 7)), random.random((5, 1))
    for axis in (0, 1, 2, (0, 2), None):
        got = cuflash.logsumexp(xp.asarray(a), axis=axis, b=xp.asarray(b))
        want = np.log((b * np.exp(a)).sum(axis=axis))
        np.testing.assert_allclose(host(got), want, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_a_and_b_meet_as_numpy_has_it(xp, dtype):
    a = xp.ones(3, DTYPES[dtype])
    for other in ("bool", "int8", "int32", "int64", "float32", "float64"):
        stand_in = "float16" if dtype == "bfloat16" else dtype
        want = np.result_type(np.dtype(stand_in), np.dtype(other))
        want = DTYPES[dtype] if want == "float16" else want
        assert cuflash.logsumexp(a, b=xp.ones(3, other)).dtype == want
    if dtype == "bfloat16":
        assert cuflash.logsumexp(a, b=xp.ones(3, "float16")).dtype == np.float32


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_empty_axes_give_empty_answers(xp, function):
    for shape, axis in [((0,), None), ((3, 0), 1), ((3, 0), 0), ((0, 3), (0, 1))]:
        got = getattr(cuflash, function)(xp.zeros(shape, "float32"), axis=axis)
        assert (got.shape, got.dtype) == (shape, np.float32)


def test_logsumexp_over_nothing(xp):
    for shape, axis, want in [((3, 0), 1, (3,)), ((0, 2), (0, 1), ()), ((3, 0), 0, (0,))]:
        log, sign = cuflash.logsumexp(xp.zeros(shape), axis=axis, return_sign=True)
        assert log.shape == sign.shape == want
        assert (host(log) == -np.inf).all()
        assert (host(sign) == 0).all()
    assert cuflash.logsumexp(xp.zeros((3, 0)), axis=1, keepdims=True).shape == (3, 1)


@pytest.mark.parametrize("length", [3, 40, 5000, 70000])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_infinity_makes_all_others_impossible(xp, dtype, length):
    """log_softmax: -inf beside it, NaN in its own place, and NaN throughout beside a NaN."""
    row = np.zeros(length, dtype)
    row[:3] = 1, np.inf, 1000
    with_nan = row.copy()
    with_nan[-1] = np.nan
    got = host(cuflash.log_softmax(xp.asarray(np.stack([row, with_nan])), axis=1))
    assert np.isnan(got[0, 1])
    assert (np.delete(got[0], 1) == -np.inf).all()
    assert np.isnan(got[1]).all()
    assert np.isnan(host(cuflash.softmax(xp.asarray(row)))).all()


def test_no_axes_to_reduce(xp):
    x = xp.asarray([[1.0, np.inf], [-np.inf, np.nan]])
    np.testing.assert_array_equal(
        host(cuflash.softmax(x, axis=())), [[1, np.nan], [np.nan, np.nan]]
    )
    np.testing.assert_array_equal(host(cuflash.logsumexp(x, axis=())), host(x))


def test_arrays_without_axes(xp):
    x = xp.asarray(3.0)
    for axis in (None, 0, -1):
        for got, want in [
            (cuflash.softmax(x, axis=axis), 1),
            (cuflash.log_softmax(x, axis=axis), 0),
            (cuflash.logsumexp(x, axis=axis), 3),
        ]:
            assert got == want
            assert got.shape == ()
            assert isinstance(got, np.float64 if xp is np else xp.ndarray)
    out = xp.empty(())
    assert cuflash.softmax(x, out=out) is out
    assert out == 1
    assert cuflash.logsumexp(x, keepdims=True).shape == (1,)  # as in SciPy


def test_numbers_and_lists_are_taken():
    assert cuflash.softmax(5) == 1
    assert cuflash.logsumexp(2, b=[1.0, 1.0]) == 2 + np.log(2)
    np.testing.assert_array_equal(cuflash.log_softmax([[0, 0]], axis=0), [[0.0, 0.0]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_can_be_stored_as_float32(xp, dtype):
    call = materialise(Problem(dtype=dtype, shape=(3, 100), axis=1, values="wide"))
    rounded, _ = answer(call, xp)
    out = xp.empty((3, 100), "float32")
    assert cuflash.softmax(xp.asarray(call.x), axis=1, out=out) is out
    np.testing.assert_array_equal(host(out).astype(rounded.dtype), rounded)
    assert (host(out) != rounded.astype("float32")).any()


def test_out_of_logsumexp_may_be_one_of_the_two(xp):
    a = xp.asarray([[1.0, 2.0], [3.0, 4.0]])
    out, sign = xp.empty(2), xp.empty(2)
    got = cuflash.logsumexp(a, axis=0, return_sign=True, out=(out, None))
    assert got[0] is out
    assert (host(got[1]) == 1).all()
    got = cuflash.logsumexp(a, axis=0, return_sign=True, out=(None, sign))
    assert got[1] is sign
    np.testing.assert_array_equal(host(got[0]), host(out))
    kept = xp.empty((1, 2))
    assert cuflash.logsumexp(a, axis=0, keepdims=True, out=kept) is kept
    np.testing.assert_array_equal(host(kept)[0], host(out))


def test_answers_lie_as_the_input_does(xp):
    x = xp.zeros((3, 4, 5)).transpose(2, 0, 1)
    assert cuflash.softmax(x, axis=0).strides == x.strides


# Laws.


@given(problem=problems(out=None, out_dtype=None, values="normal", weighted=False))
def test_layout_changes_nothing(xp, problem):
    call = materialise(dataclasses.replace(problem, layout="contiguous"))
    want, _ = answer(call, xp)
    for layout in LAYOUTS:
        other = dataclasses.replace(call, problem=dataclasses.replace(problem, layout=layout))
        check(other, *answer(other, xp))
    check(call, want)


@pytest.mark.parametrize("columns", [50, 3000, 30000])
def test_a_constant_changes_only_the_log_of_the_sum(xp, columns):
    x = np.random.default_rng(0).standard_normal((4, columns)).round(3)
    shifted = xp.asarray(x + 4096)
    x = xp.asarray(x)
    np.testing.assert_allclose(
        host(cuflash.softmax(shifted, 1)), host(cuflash.softmax(x, 1)), rtol=1e-11
    )
    difference = cuflash.logsumexp(shifted, 1) - cuflash.logsumexp(x, 1)
    np.testing.assert_allclose(host(difference), 4096, rtol=1e-14)


def test_tiles_of_the_recurrence_change_nothing(monkeypatch):
    from cuflash._softmax import cpu

    problem = Problem(function="logsumexp", shape=(5, 300), axis=1, values="wide", weighted=True)
    call = materialise(problem)
    for tile in (1, 7, 300, 1024):
        monkeypatch.setattr(cpu, "TILE", tile)
        for function in FUNCTIONS:
            other = dataclasses.replace(problem, function=function)
            other = dataclasses.replace(call, problem=other)
            check(other, *answer(other, np))


# On the GPU only.


@pytest.mark.sanitizer
@pytest.mark.parametrize("columns", [5, 1000, 4001, 40000])
def test_repeats_are_bitwise_equal(cp, columns):
    for shape, axis in [((7, columns), 1), ((columns, 40), 0)]:
        x = cp.asarray(np.random.default_rng(0).standard_normal(shape), "float32")
        for function in FUNCTIONS:
            first = getattr(cuflash, function)(x, axis=axis)
            for _ in range(100):
                again = getattr(cuflash, function)(x, axis=axis)
                assert bool((again == first).all())


def test_more_axes_than_strides_are_copied_and_said(cp):
    shape, axes = (2, 3, 2, 3, 2, 3, 2, 3, 2, 3), (0, 2, 4, 6, 8)
    x, _ = place(np.random.default_rng(0).standard_normal(shape), "gaps", cp)
    np.testing.assert_allclose(
        cuflash.softmax(x, axis=axes).get(), scipy.special.softmax(x.get(), axis=axes), rtol=1e-13
    )
    out, _ = place(np.zeros(shape), "steps", cp)
    cuflash.softmax(x, axis=axes, out=out)
    np.testing.assert_allclose(out.get(), scipy.special.softmax(x.get(), axis=axes), rtol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numpy_adds_alike_along_any_axis(function):
    """Pairwise also where the axis is not dense: one by one, equal terms err to one side."""
    x = np.random.default_rng(0).choice(np.float32([-0.3, 0.7]), (5000, 3))
    across = getattr(cuflash, function)(x, axis=0)
    along = getattr(cuflash, function)(np.ascontiguousarray(x.T), axis=1)
    np.testing.assert_array_equal(across, along.T)
