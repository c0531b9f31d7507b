"""Drawn calls of softmax, log_softmax and logsumexp, and the judge of their answers.

Hypothesis draws shapes, layouts, kinds of values and a seed; `materialise` makes the arrays. The
judge is the formula in float64 (in long double for float64 input) with a limit for each element,
from the roundings that any evaluation in the accumulator's precision has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st
from poison import poison
from strategies import DTYPES, nan_filled
from tolerance import ABSOLUTE, ROUNDOFF

import cuflash

FUNCTIONS = ("softmax", "log_softmax", "logsumexp")
HALVES = ("float16", "bfloat16")
VALUES = ("normal", "wide", "huge", "constant", "rising", "some -inf", "rows of -inf", "inf", "nan")
LAYOUTS = ("contiguous", "permuted", "gaps", "unaligned", "negative", "steps")
MOST = 1 << 15  # elements
# Around the lengths at which a plan changes: vectors, warps, tiles, blocks.
LENGTHS = (31, 32, 33, 63, 127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025, 2048, 4100, 9000)


@dataclass(frozen=True)
class Problem:
    """One call, small enough to print."""

    seed: int = 0
    function: str = "softmax"
    dtype: str = "float32"
    shape: tuple[int, ...] = (1,)
    axis: int | tuple[int, ...] | None = None
    values: str = "normal"
    layout: str = "contiguous"
    out: str | None = None  # the layout of a given out, or "x" for out=x
    out_dtype: str | None = None  # float32 for half input
    weighted: bool = False
    keepdims: bool = False
    return_sign: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        if self.axis is None:
            return tuple(range(len(self.shape)))
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(axis % len(self.shape) for axis in axes)


@dataclass(frozen=True)
class Call:
    problem: Problem
    x: np.ndarray
    b: np.ndarray | None = None

    @property
    def reduced(self) -> tuple[int, ...]:
        """logsumexp's shape with keepdims."""
        shape = np.broadcast_shapes(self.x.shape, () if self.b is None else self.b.shape)
        return tuple(1 if i in self.problem.axes else n for i, n in enumerate(shape))


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    """Problems of every kind; `fixed` fields are taken as given."""

    def pick(name: str, strategy: st.SearchStrategy) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    function = pick("function", st.sampled_from(FUNCTIONS))
    dtype = pick("dtype", st.sampled_from(list(DTYPES)))
    shape = pick("shape", shapes())
    axis = st.none() | st.integers(-len(shape), len(shape) - 1)
    axis |= st.sets(st.integers(0, len(shape) - 1)).map(lambda axes: tuple(sorted(axes)))
    logs = function == "logsumexp"
    outs = st.none() | st.sampled_from(LAYOUTS)
    out = pick("out", outs if logs else outs | st.just("x"))
    out_dtypes = [None, "float32"] if dtype in HALVES and out in LAYOUTS else [None]
    return Problem(
        seed=pick("seed", st.integers(0, 2**32 - 1)),
        function=function,
        dtype=dtype,
        shape=shape,
        axis=pick("axis", axis),
        values=pick("values", st.just("normal") | st.sampled_from(VALUES)),
        layout=pick("layout", st.just("contiguous") | st.sampled_from(LAYOUTS)),
        out=out,
        out_dtype=pick("out_dtype", st.sampled_from(out_dtypes)),
        weighted=pick("weighted", st.booleans()) if logs else False,
        keepdims=pick("keepdims", st.booleans()) if logs else False,
        return_sign=pick("return_sign", st.booleans()) if logs else False,
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """1 to 6 axes, 0 and 1 among their lengths, at most `MOST` elements."""
    shape: list[int] = []
    room = MOST
    for _ in range(draw(st.sampled_from([1, 2, 2, 2, 3, 3, 4, 5, 6]))):
        lengths = [n for n in LENGTHS if n <= room] or [1]
        short = st.integers(0 if draw(st.integers(0, 15)) == 0 else 1, min(room, 9))
        length = draw(short | st.sampled_from(lengths) | st.integers(1, min(room, 300)))
        shape.append(length)
        room //= max(1, length)
    return tuple(draw(st.permutations(shape)))


def materialise(problem: Problem) -> Call:
    """The arrays of a problem, in C order."""
    random = np.random.default_rng(problem.seed)
    dtype = DTYPES[problem.dtype]
    x = random.standard_normal(problem.shape)
    largest = 1e4 if problem.dtype == "float16" else 1e37 if problem.dtype != "float64" else 1e300
    if problem.values == "wide":
        x *= 30
    elif problem.values == "huge":
        x *= largest
    elif problem.values == "constant":
        x[...] = 7.5
    elif problem.values == "rising":
        x = np.linspace(-50, 50, x.size).reshape(x.shape)
    elif problem.values == "rows of -inf":
        x[random.random(x.shape[:-1]) < 0.5] = -np.inf
    elif problem.values in ("some -inf", "inf", "nan"):
        x[random.random(x.shape) < 0.3] = -np.inf
        special = {"some -inf": -np.inf, "inf": np.inf, "nan": np.nan}[problem.values]
        x[random.random(x.shape) < 0.01] = special
    b = None
    if problem.weighted:
        # Along some axes b is broadcast, and where it is 0 an element is gone, whatever it was.
        b = random.standard_normal([1 if random.random() < 0.2 else n for n in x.shape])
        b[random.random(b.shape) < 0.2] = 0
        b = b.astype(dtype)
    return Call(problem, x.astype(dtype), b)


def place(array: np.ndarray, layout: str, xp: ModuleType) -> Any:
    """`array` in memory of `xp` as the layout says, NaN in all gaps; also the whole buffer."""
    shape, ndim = array.shape, array.ndim
    order = (*range(1, ndim), 0)[:ndim]
    buffers = {
        "permuted": tuple(shape[i] for i in order),
        "gaps": tuple(n + 3 for n in shape),
        "unaligned": (math.prod(shape) + 1,),
        "steps": tuple(2 * n for n in shape),
    }
    host = nan_filled(buffers.get(layout, shape), array.dtype)

    def view(buffer: Any) -> Any:
        if layout == "permuted":
            return buffer.transpose(tuple(np.argsort(order)))
        if layout == "unaligned":
            return buffer[1:].reshape(shape)
        if layout == "gaps":
            cut = [slice(1, n + 1) for n in shape]
        elif layout == "steps":
            cut = [slice(0, 2 * n, 2) for n in shape]
        else:
            cut = [slice(None, None, -1 if layout == "negative" else 1)] * ndim
        return buffer[(..., *cut)]  # with ... an array without axes stays an array

    view(host)[...] = array
    buffer = xp.asarray(host)
    return view(buffer), buffer


def host(array: Any) -> np.ndarray:
    return array.get() if hasattr(array, "get") else np.asarray(array)


def answer(call: Call, xp: ModuleType) -> tuple[np.ndarray, np.ndarray | None]:
    """(answer, sign or None) of a call, in NumPy; checks what comes back and the guards."""
    p = call.problem
    x, buffer = place(call.x, p.layout, xp)
    options: dict[str, Any] = {"axis": p.axis}
    shape = call.x.shape
    if p.function == "logsumexp":
        b = None if call.b is None else xp.asarray(call.b)
        options.update(b=b, keepdims=p.keepdims, return_sign=p.return_sign)
        shape = call.reduced
        if not p.keepdims:
            shape = tuple(n for i, n in enumerate(shape) if i not in p.axes)
    dtype = DTYPES[p.out_dtype or p.dtype]
    frame = None
    if p.out == "x":
        options["out"] = x
    elif p.out is not None:
        options["out"], frame = place(nan_filled(shape, dtype), p.out, xp)
    before = host(buffer).copy()
    poison(xp)
    got = getattr(cuflash, p.function)(x, **options)
    got, sign = got if p.return_sign else (got, None)
    if "out" in options:
        assert got is options["out"]
    else:
        scalar = xp is np and shape == ()
        assert isinstance(got, np.generic if scalar else xp.ndarray)
        assert sign is None or type(sign) is type(got)
    assert got.shape == shape
    assert got.dtype == dtype
    assert sign is None or (sign.shape == shape and sign.dtype == dtype)
    if frame is not None:  # nothing but the answer was written
        assert np.isnan(host(frame).astype(float)).sum() >= frame.size - got.size
    if options.get("out") is not x:
        assert host(buffer).tobytes() == before.tobytes()
    return host(got), None if sign is None else host(sign)


def check(call: Call, got: np.ndarray, sign: np.ndarray | None = None) -> None:
    """Assert that an answer is good: the same infinities and NaNs, and all else within limits."""
    p = call.problem
    with np.errstate(all="ignore"):
        if p.function == "logsumexp":
            want, limit, want_sign, sure = log_truth(call)
            if not p.return_sign:
                want = np.where(want_sign < 0, np.nan, want)
        else:
            want, limit = truth(call)
            want_sign, sure = None, np.bool(True)
    want, limit, sure = (
        np.broadcast_to(y, want.shape).reshape(got.shape) for y in (want, limit, sure)
    )
    # What the answer's dtype cannot hold is infinite in it.
    with np.errstate(all="ignore"):
        want = np.where(np.isinf(want.astype(got.dtype)), np.sign(want) * np.inf, want)
    got = got.astype(want.dtype)
    special = ~np.isfinite(want) & sure
    np.testing.assert_array_equal(got[special], want[special])
    ordinary = np.isfinite(want) & sure
    assert np.isfinite(got[ordinary]).all()
    error, limit = np.abs(got[ordinary] - want[ordinary]), limit[ordinary]
    if error.size:
        worst = np.argmax(error / limit)
        assert error[worst] <= limit[worst], (p, error[worst], limit[worst])
    if sign is not None:
        want_sign = want_sign.reshape(sign.shape)
        np.testing.assert_array_equal(sign.astype(want.dtype)[sure], want_sign[sure])


def truth(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """softmax or log_softmax, and how far from it one may be."""
    p, axes = call.problem, call.problem.axes
    x = exact(call.x)
    if x.size == 0:
        return x, np.zeros_like(x)
    m = x.max(axis=axes, keepdims=True)
    shift = np.where(np.isfinite(m), m, 0)
    d = np.exp(x - shift).sum(axis=axes, keepdims=True)
    u = ROUNDOFF["float64" if p.dtype == "float64" else "float32"]
    u_out = ROUNDOFF[p.out_dtype or p.dtype]
    # The exponent is rounded where it is subtracted, a sum at each of its additions.
    roundings = 12 + np.abs(x - shift) + math.sqrt(x.size)
    if p.function == "log_softmax":
        want = (x - shift) - np.log(d)
        return want, u_out * np.abs(want) + u * (roundings + np.abs(np.log(d)))
    want = np.exp(x - shift) / np.where(m == np.inf, np.nan, d)
    relative = u_out + u * np.minimum(roundings, 1e4)  # finite where the answer is 0
    return want, want * relative + 2 * ABSOLUTE[p.out_dtype or p.dtype] + 1e-300 * u


def log_truth(call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """logsumexp's log and sign with keepdims, the limit, and where there is no cancellation."""
    p, axes = call.problem, call.problem.axes
    b = exact(np.ones((), call.x.dtype) if call.b is None else call.b)
    x, b = np.broadcast_arrays(exact(call.x), b)
    if 0 in x.shape:
        empty = np.full(call.reduced, -np.inf)
        return empty, np.zeros_like(empty), np.zeros_like(empty), np.ones_like(empty, bool)
    x = np.where(b == 0, -np.inf, x)
    m = x.max(axis=axes, keepdims=True)
    # 1 for the maximum itself, but inf for inf and 0 for -inf.
    at_top = np.exp(m - np.where(np.isfinite(m), m, 0))
    terms = b * np.where(x == m, at_top, np.exp(x - m))
    total = terms.sum(axis=axes, keepdims=True)
    mass = np.abs(terms).sum(axis=axes, keepdims=True)
    sign = np.sign(total)
    log = m + np.log(np.abs(total))
    u = ROUNDOFF["float64" if p.dtype == "float64" else "float32"]
    # Exponents below -750 (-110 in float32) add nothing; those above are rounded where subtracted.
    error = mass * u * (12 + math.sqrt(x.size) + (750 if p.dtype == "float64" else 110))
    sure = ~(np.abs(total) <= 100 * error) | (mass == 0)
    u_out = ROUNDOFF[p.out_dtype or p.dtype]
    limit = u_out * np.abs(log) + u * (12 + np.abs(m)) + error / np.abs(total)
    return log, limit + 2 * ABSOLUTE[p.out_dtype or p.dtype], sign, sure


def exact(array: np.ndarray) -> np.ndarray:
    """In a precision better than the accumulator's."""
    return array.astype(np.longdouble if array.dtype == np.float64 else np.float64)
