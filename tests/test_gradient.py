"""softmax_backward and log_softmax_backward against their formulas, finite differences, PyTorch."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from poison import poison
from softmax_problems import HALVES, LAYOUTS, exact, host, place, shapes
from strategies import DTYPES, nan_filled
from tolerance import ABSOLUTE, ROUNDOFF

import cuflash
from cuflash._softmax import api

FUNCTIONS = {"softmax": cuflash.softmax_backward, "log_softmax": cuflash.log_softmax_backward}
VALUES = ("normal", "large", "constant", "zeros in y", "inf", "nan")
# Where the plan changes: one element, a vector, part of a warp, a warp, a block, more than one.
COLUMNS = [1, 4, 63, 64, 1000, 1001, 4000, 16384, 40001]


@dataclass(frozen=True)
class Problem:
    """One call, small enough to print."""

    seed: int = 0
    function: str = "softmax"
    dtype: str = "float32"
    shape: tuple[int, ...] = (1,)
    axis: int | tuple[int, ...] | None = None
    values: str = "normal"
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of dy and y
    out: str | None = None  # the layout of a given out, or "dy" or "y" for one of them
    out_dtype: str | None = None  # float32 for half input

    @property
    def axes(self) -> tuple[int, ...]:
        if self.axis is None:
            return tuple(range(len(self.shape)))
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(axis % len(self.shape) for axis in axes)


@st.composite
def problems(draw):
    dtype, shape = draw(st.sampled_from(list(DTYPES))), draw(shapes())
    axis = st.none() | st.integers(-len(shape), len(shape) - 1)
    axis |= st.sets(st.integers(0, len(shape) - 1)).map(lambda axes: tuple(sorted(axes)))
    layouts = st.sampled_from(LAYOUTS)
    out = draw(st.none() | st.sampled_from(["dy", "y"]) | layouts)
    wide = dtype in HALVES and out in LAYOUTS
    return Problem(
        seed=draw(st.integers(0, 2**32 - 1)),
        function=draw(st.sampled_from(list(FUNCTIONS))),
        dtype=dtype,
        shape=shape,
        axis=draw(axis),
        values=draw(st.sampled_from(VALUES)),
        layouts=draw(st.tuples(layouts, layouts)),
        out=out,
        out_dtype=draw(st.sampled_from([None, "float32"] if wide else [None])),
    )


def materialise(problem):
    """(dy, y) in C order: y as if it came from a softmax of the inputs' own precision."""
    random = np.random.default_rng(problem.seed)
    dy, x = (random.standard_normal(problem.shape) for _ in range(2))
    if problem.values == "large":
        dy *= 1e3 if problem.dtype == "float16" else 1e30
    elif problem.values == "constant":
        dy[...] = 2.5
    elif problem.values in ("inf", "nan"):
        special = {"inf": np.inf, "nan": np.nan}[problem.values]
        dy[random.random(dy.shape) < 0.01] = special
    if problem.values == "zeros in y":
        x[random.random(x.shape) < 0.3] = -np.inf
        x[..., :1] = 0
    with np.errstate(all="ignore"):
        y = getattr(cuflash, problem.function)(x, axis=problem.axis)
    return dy.astype(DTYPES[problem.dtype]), y.astype(DTYPES[problem.dtype])


def answer(problem, xp, dy, y):
    """dx in NumPy; checks what comes back, the gaps and that inputs are as they were."""
    arrays = {}
    arrays["dy"], dy_buffer = place(dy, problem.layouts[0], xp)
    arrays["y"], y_buffer = place(y, problem.layouts[1], xp)
    dtype = DTYPES[problem.out_dtype or problem.dtype]
    out = frame = None
    if problem.out in arrays:
        out = arrays[problem.out]
    elif problem.out is not None:
        out, frame = place(nan_filled(y.shape, dtype), problem.out, xp)
    before = {"dy": host(dy_buffer).copy(), "y": host(y_buffer).copy()}
    poison(xp)
    got = FUNCTIONS[problem.function](arrays["dy"], arrays["y"], problem.axis, out=out)
    assert type(got) is xp.ndarray
    assert out is None or got is out
    assert (got.shape, got.dtype) == (y.shape, dtype)
    if frame is not None:
        assert np.isnan(host(frame).astype(float)).sum() >= frame.size - got.size
    for name, buffer in (("dy", dy_buffer), ("y", y_buffer)):
        if problem.out != name:
            assert host(buffer).tobytes() == before[name].tobytes()
    return host(got)


def truth(problem, dy, y):
    """dx, and how far from it one may be."""
    dy, y, axes = exact(dy), exact(y), problem.axes
    u = ROUNDOFF["float64" if problem.dtype == "float64" else "float32"]
    u_out = ROUNDOFF[problem.out_dtype or problem.dtype]
    # A sum is rounded at each of its additions, and the rest a few times.
    count = math.prod(problem.shape[axis] for axis in axes)
    roundings = 12 + math.sqrt(count)
    if problem.function == "softmax":
        terms, factor, minuend = dy * y, y, dy
    else:
        terms, factor, minuend = dy, np.exp(y), dy
    total = terms.sum(axis=axes, keepdims=True)
    mass = np.abs(terms).sum(axis=axes, keepdims=True)
    if problem.function == "softmax":
        want = factor * (minuend - total)
        error = np.abs(factor) * (np.abs(minuend) + roundings * mass)
    else:
        want = minuend - factor * total
        error = np.abs(minuend) + factor * roundings * mass
    # Numbers below the smallest normal one are 0 on a GPU: in y, and in each product.
    size = 1 + np.abs(minuend) + np.abs(mass) + count
    lost = ABSOLUTE["float64" if problem.dtype == "float64" else "float32"] * size
    limit = (
        u_out * np.abs(want) + u * error + lost + 2 * ABSOLUTE[problem.out_dtype or problem.dtype]
    )
    return want, limit


def check(problem, got, dy, y):
    """The same infinities and NaNs, and all else within limits."""
    with np.errstate(all="ignore"):
        want, limit = truth(problem, dy, y)
        want = np.where(np.isinf(want.astype(got.dtype)), np.sign(want) * np.inf, want)
    got = got.astype(want.dtype)
    special = ~np.isfinite(want)
    np.testing.assert_array_equal(got[special], want[special])
    error, limit = np.abs(got[~special] - want[~special]), limit[~special]
    wrong = ~(error <= limit)
    assert not wrong.any(), (problem, error[wrong][0], limit[wrong][0])


@given(problem=problems())
def test_problem(xp, problem):
    dy, y = materialise(problem)
    check(problem, answer(problem, xp, dy, y), dy, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("axis", [0, 1])
def test_lengths(xp, axis, columns, dtype):
    shape = (5, columns) if axis else (columns, 5)
    for function in FUNCTIONS:
        problem = Problem(columns, function, dtype, shape, axis)
        dy, y = materialise(problem)
        for layouts in (("contiguous", "contiguous"), ("unaligned", "contiguous")):
            problem = dataclasses.replace(problem, layouts=layouts)
            check(problem, answer(problem, xp, dy, y), dy, y)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2), ()])
def test_finite_differences(xp, function, axis):
    """Of the scalar sum(weight * f(x)), in float64, by central differences."""
    forward = getattr(cuflash, function)
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((3, 4, 5)), random.standard_normal((3, 4, 5))
    want = np.empty_like(x)
    step = 1e-5
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        want[index] = (weight * (forward(above, axis) - forward(below, axis))).sum() / (2 * step)
    y = forward(xp.asarray(x), axis)
    got = FUNCTIONS[function](xp.asarray(weight), y, axis)
    # Truncation of order step ** 2, cancellation of order 2 ** -53 / step.
    np.testing.assert_allclose(host(got), want, atol=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_agrees_with_autograd(require, function):
    torch = require("torch")
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 7, 5, dtype=torch.float64)
    y = getattr(torch, function)(x, 1)
    y.backward(dy)
    got = FUNCTIONS[function](dy, y.detach(), 1)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, x.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_empty_axes_and_no_axes(xp, function):
    for shape, axis in [((0,), None), ((3, 0), 1), ((0, 3), (0, 1))]:
        empty = xp.zeros(shape, "float32")
        assert function(empty, empty, axis).shape == shape
    one = xp.asarray(2.0)
    got = function(one, xp.asarray(1.0 if function is cuflash.softmax_backward else 0.0))
    assert got == 0
    assert isinstance(got, np.float64 if xp is np else xp.ndarray)


def test_numbers_and_lists_are_taken():
    np.testing.assert_array_equal(cuflash.softmax_backward([1, 0], [0.5, 0.5]), [0.25, -0.25])
    assert cuflash.log_softmax_backward(3, 0.0) == 0


@pytest.mark.sanitizer
@pytest.mark.parametrize("columns", [5, 1000, 40000])
def test_repeats_are_bitwise_equal(cp, columns):
    random = np.random.default_rng(0)
    dy = cp.asarray(random.standard_normal((7, columns)), "float32")
    y = cuflash.softmax(dy[::-1], axis=1)
    for function in FUNCTIONS.values():
        first = function(dy, y, 1)
        for _ in range(50):
            assert bool((function(dy, y, 1) == first).all())


def test_explain_and_warmup_know_the_functions():
    for function in FUNCTIONS.values():
        x = np.zeros((3, 4))
        assert "NumPy" in cuflash.explain(function, x, x, axis=1)
        assert cuflash.warmup(function, x, x) == 0
        with pytest.raises(np.exceptions.AxisError):
            cuflash.explain(function, x, x, axis=2)


# Bad input: refused by name, before anything runs.


@pytest.fixture
def nothing_runs(monkeypatch):
    def ran(caller):
        raise AssertionError("the work began")

    monkeypatch.setattr(api, "_backend", ran)


def rejects(error, name, *words, call, **options):
    with pytest.raises(error) as caught:
        call(**options)
    for word in (f"`{name}`", *words):
        assert re.search(re.escape(str(word)), str(caught.value)), (word, str(caught.value))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", FUNCTIONS.values())
class TestBadInput:
    def test_shapes_and_dtypes_that_differ(self, xp, call):
        x = xp.zeros((3, 4), "float32")
        rejects(ValueError, "dy", (3, 4), (4,), call=call, dy=x[0], y=x)
        for dtype in ("float16", "float64", "int32"):
            rejects(TypeError, "dy", "float32", dtype, call=call, dy=x.astype(dtype), y=x)
        rejects(TypeError, "dy", "complex64", call=call, dy=x.astype("complex64"), y=x)

    def test_axis(self, xp, call):
        x = xp.zeros((3, 4))
        rejects(np.exceptions.AxisError, "axis", 2, call=call, dy=x, y=x, axis=2)
        rejects(ValueError, "axis", (0, 0), call=call, dy=x, y=x, axis=(0, 0))
        rejects(TypeError, "axis", 1.0, call=call, dy=x, y=x, axis=1.0)

    @pytest.mark.parametrize(
        "value", [None, "text", 1j, np.ma.masked_array([1.0], [True])], ids=str
    )
    def test_not_an_array(self, call, value):
        rejects(TypeError, "dy", call=call, dy=value, y=np.zeros(1))
        rejects(TypeError, "y", call=call, dy=np.zeros(1), y=value)

    def test_out(self, xp, call):
        x, y = xp.zeros((3, 4), "float32"), xp.zeros((3, 4), "float32")
        given = {"call": call, "dy": x, "y": y}
        rejects(ValueError, "out", (3, 4), (4, 3), out=xp.zeros((4, 3), "float32"), **given)
        rejects(TypeError, "out", "float32", out=xp.zeros((3, 4), "float64"), **given)
        rejects(TypeError, "out", "tuple", out=(x, y), **given)
        memory = xp.zeros(16, "float32")
        for name, other in (("dy", "y"), ("y", "dy")):
            part = {name: memory[:12].reshape(3, 4), other: x}
            out = memory[4:].reshape(3, 4)
            rejects(ValueError, "out", f"`{name}`", "unless", call=call, out=out, **part)

    def test_out_that_cannot_be_written(self, call):
        x = np.zeros((3, 4))
        out = np.zeros((3, 4))
        out.flags.writeable = False
        rejects(ValueError, "out", call=call, dy=x, y=x, out=out)
        out = as_strided(np.zeros(4), (3, 4), (0, 8))
        rejects(ValueError, "out", call=call, dy=x, y=x, out=out)

    def test_host_and_device_are_not_mixed(self, cp, call):
        rejects(TypeError, "y", call=call, dy=cp.zeros(3), y=np.zeros(3))
