"""Drawn calls of topk and softmax_topk, and the judge of their answers.

Which elements are the largest is exact: a stable sort in NumPy tells. Probabilities are judged as
those of softmax are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st
from poison import poison
from softmax_problems import exact, host, place
from strategies import DTYPES, nan_filled
from tolerance import ABSOLUTE, ROUNDOFF

import cuflash

FUNCTIONS = ("topk", "softmax_topk")
VALUES = (
    "normal",
    "ties",
    "constant",
    "ascending",
    "descending",
    "periodic",
    "some -inf",
    "all -inf",
    "inf",
    "nan",
    "only nan",
    "huge",
    "zeros",
    "tiny",
)
LAYOUTS = ("contiguous", "permuted", "gaps", "unaligned", "negative", "steps", "rows apart")
MOST = 1 << 16  # elements
# Around the lengths of vectors, warps, chunks and blocks.
LENGTHS = (
    31,
    33,
    63,
    64,
    65,
    127,
    129,
    255,
    257,
    511,
    512,
    513,
    1000,
    1023,
    1024,
    1025,
    2047,
    2048,
)
LENGTHS += (2049, 4095, 4096, 4097, 4104, 8191, 8193, 16384, 20000, 40001)
COUNTS = (1, 2, 5, 8, 9, 16, 17, 32, 33, 50, 64, 65, 128, 129, 256, 257, 512, 513, 1024)


@dataclass(frozen=True)
class Problem:
    """One call, small enough to print."""

    seed: int = 0
    function: str = "softmax_topk"
    dtype: str = "float32"
    shape: tuple[int, ...] = (1,)
    axis: int = -1
    k: int = 1
    values: str = "normal"
    layout: str = "contiguous"
    out: str | None = None  # the layout of given outputs
    out_dtype: str | None = None  # of the values: float32 for half input


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    """Problems of every kind; `fixed` fields are taken as given."""

    def pick(name: str, strategy: st.SearchStrategy) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    function = pick("function", st.sampled_from(FUNCTIONS))
    dtype = pick("dtype", st.sampled_from(list(DTYPES)))
    length = draw(st.sampled_from(LENGTHS) | st.integers(1, 300))
    shape, room = [length], MOST // length
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        shape.insert(0, draw(st.integers(0 if draw(st.integers(0, 15)) == 0 else 1, min(room, 9))))
        room //= max(1, shape[0])
    axis = draw(st.just(len(shape) - 1) | st.integers(0, len(shape) - 1))
    shape.insert(axis, shape.pop())
    most = min(length, 1024)
    counts = st.sampled_from([k for k in COUNTS if k <= most]) | st.integers(1, most)
    out = pick("out", st.none() | st.sampled_from(LAYOUTS))
    wide = dtype in ("float16", "bfloat16") and function == "softmax_topk" and out is not None
    return Problem(
        seed=pick("seed", st.integers(0, 2**32 - 1)),
        function=function,
        dtype=dtype,
        shape=tuple(shape),
        axis=axis - draw(st.sampled_from([0, len(shape)])),
        k=draw(counts),
        values=pick("values", st.just("normal") | st.sampled_from(VALUES)),
        layout=pick("layout", st.just("contiguous") | st.sampled_from(LAYOUTS)),
        out=out,
        out_dtype=draw(st.sampled_from([None, "float32"])) if wide else None,
    )


def materialise(problem: Problem) -> np.ndarray:
    """x, in C order."""
    random = np.random.default_rng(problem.seed)
    dtype, shape = DTYPES[problem.dtype], problem.shape
    # Values that follow the axis are made with it last.
    last = (*shape[: problem.axis % len(shape)], *shape[problem.axis % len(shape) + 1 :])
    along = np.arange(shape[problem.axis], dtype=np.float64)
    x = random.standard_normal((*last, along.size))
    largest = 1e4 if problem.dtype == "float16" else 1e37 if problem.dtype != "float64" else 1e300
    if problem.values == "ties":
        x = np.floor(2 * x)
    elif problem.values == "constant":
        x[...] = 7.5
    elif problem.values == "ascending":
        x = np.linspace(-50, 50, along.size) + 0 * x
    elif problem.values == "descending":
        x = np.linspace(50, -50, along.size) + 0 * x
    elif problem.values == "periodic":  # all that is large in one thread's share
        period = random.choice([32, 128, 256, 512, 1024]) * random.choice([1, 2, 4, 8])
        x += 100 * (along % period < 4)
    elif problem.values == "all -inf":
        x[...] = -np.inf
    elif problem.values == "only nan":
        x[...] = np.nan
    elif problem.values == "huge":
        x *= largest
    elif problem.values == "zeros":
        x = random.choice([0.0, -0.0, 1.0, -1.0], x.shape, p=[0.45, 0.45, 0.05, 0.05])
    elif problem.values == "tiny":  # below the smallest normal number: never flushed to zero
        x *= {"float16": 1e-6, "float64": 1e-310}.get(problem.dtype, 1e-40)
    elif problem.values in ("some -inf", "inf", "nan"):
        x[random.random(x.shape) < 0.5] = -np.inf
        special = {"some -inf": -np.inf, "inf": np.inf, "nan": np.nan}[problem.values]
        x[random.random(x.shape) < random.choice([0.001, 0.1])] = special
    x = np.moveaxis(x, -1, problem.axis).astype(dtype, order="C")
    if "nan" in problem.values:  # NaNs of both signs and of several payloads
        bits = x.view(f"u{x.itemsize}")
        marks = random.integers(1, 16, x.shape).astype(bits.dtype)
        marks |= random.integers(0, 2, x.shape).astype(bits.dtype) << (8 * x.itemsize - 1)
        bits[np.isnan(x)] |= marks[np.isnan(x)]
    return x


def placed(array: np.ndarray, layout: str, xp: ModuleType) -> Any:
    """`array` in memory of `xp` as the layout says, NaN in all gaps; also the whole buffer."""
    if layout != "rows apart":
        return place(array, layout, xp)
    buffer = np.full((*array.shape[:-1], array.shape[-1] + 3), 0, array.dtype)
    buffer.view(np.uint8)[...] = 0xFF
    buffer[..., 2:-1] = array
    buffer = xp.asarray(buffer)
    return buffer[..., 2:-1], buffer


def answer(problem: Problem, x: np.ndarray, xp: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    """(values, indices) of a call, in NumPy; checks what comes back and the guards."""
    here, buffer = placed(x, problem.layout, xp)
    axis = problem.axis % x.ndim
    shape = (*x.shape[:axis], problem.k, *x.shape[axis + 1 :])
    dtype = DTYPES[problem.out_dtype or problem.dtype]
    options: dict[str, Any] = {"axis": problem.axis}
    frames = []
    if problem.out is not None:
        values, frame = placed(nan_filled(shape, dtype), problem.out, xp)
        indices, other = placed(np.full(shape, -1), "contiguous", xp)
        options["out"], frames = (values, indices), [frame, other]
    before = host(buffer).copy()
    poison(xp)
    got = getattr(cuflash, problem.function)(here, problem.k, **options)
    if problem.out is not None:
        assert got.values is options["out"][0]
        assert got.indices is options["out"][1]
    for array, wanted in zip(got, (dtype, np.dtype(np.int64))):
        assert isinstance(array, xp.ndarray)
        assert array.shape == shape
        assert array.dtype == wanted
    np.testing.assert_array_equal(host(buffer).view(np.uint8), before.view(np.uint8))
    values, indices = map(host, got)
    if frames:  # as many elements were written as the answer has
        assert (
            np.isnan(host(frames[0])).sum() == np.isnan(values).sum() + frames[0].size - values.size
        )
    return values, indices


def check(problem: Problem, x: np.ndarray, values: np.ndarray, indices: np.ndarray) -> None:
    """Assert that an answer is right."""
    x, values, indices = (np.moveaxis(array, problem.axis, -1) for array in (x, values, indices))
    want = largest(x, problem.k)
    np.testing.assert_array_equal(indices, want, str(problem))
    found = np.take_along_axis(x, want, -1)
    if problem.function == "topk":  # bit for bit
        unsigned = f"u{found.itemsize}"
        same = np.ascontiguousarray(values).view(unsigned) == found.view(unsigned)
        assert same.all(), problem
        return
    limit, truth = probabilities(problem, x, found)
    got = exact(values)
    ordinary = np.isfinite(truth)
    np.testing.assert_array_equal(np.isnan(got), ~ordinary, str(problem))
    error = np.abs(got - truth)[ordinary]
    assert (error <= limit[ordinary]).all(), (problem, (error / limit[ordinary]).max())


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """By a stable sort, in which NaN counts as more than infinity."""
    wide = np.ascontiguousarray(x.astype(np.float64))
    by_value = np.argsort(-wide, axis=-1, kind="stable")
    nan = np.isnan(np.take_along_axis(wide, by_value, -1))
    nan_first = np.argsort(~nan, axis=-1, kind="stable")  # NumPy sorts NaN to the end
    return np.take_along_axis(by_value, nan_first, -1)[..., :k]


def probabilities(
    problem: Problem, x: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far from the truth one may be, and the truth."""
    with np.errstate(all="ignore"):
        m = exact(x).max(axis=-1, keepdims=True, initial=-np.inf)
        shift = np.where(np.isfinite(m), m, 0)
        d = np.exp(exact(x) - shift).sum(axis=-1, keepdims=True)
        truth = np.exp(exact(found) - shift) / np.where(m == np.inf, np.nan, d)
        u = ROUNDOFF["float64" if problem.dtype == "float64" else "float32"]
        out = problem.out_dtype or problem.dtype
        # Equal terms are rounded alike, which random signs would not be: 4 standard deviations.
        roundings = 12 + np.abs(exact(found) - shift) + 4 * math.sqrt(x.shape[-1])
        relative = ROUNDOFF[out] + u * np.minimum(roundings, 1e4)
    return truth * relative + 2 * ABSOLUTE[out] + 1e-300 * u, truth
