"""Sampling on a GPU, from the host: one or two launches, behind those of top_k if there is one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import cupy as cp
import numpy as np

from ...gpu_arrays import kept
from ...jit import gpu, launch
from ...jit.strides import address, fold
from . import sample_plan, topk_api, topk_gpu
from .sample_problem import Problem

# The kernels' Params, field by field (sample.cuh).
PARAMS = np.dtype(
    [
        ("x", np.uint64),
        ("slices", np.uint64),
        ("indices", np.uint64),
        ("out", np.uint64),
        ("rows", np.int64),
        ("columns", np.int64),
        ("row_stride", np.int64),
        ("slices_of_row", np.int64),
        ("seed", np.uint64),
        ("offset", np.uint64),
        ("scale", np.float64),
        ("top_p", np.float64),
        ("least", np.float64),
    ],
    align=True,
)


def sample(problem: Problem, logits: Any, out: Any) -> None:
    """Fill `out`, (rows,) of int64, with tokens from the logits, on CuPy's current stream.

    Rows that have no distribution get -1.
    """
    x = matrix(problem, logits)
    k = 1 if problem.greedy else problem.top_k
    if k is None:
        _draw(problem, x, None, out)
        return
    values = _temporary((problem.rows, k), x.dtype)
    if problem.greedy:
        topk_gpu.top(x, k, values, out.reshape(problem.rows, k))
        return
    indices = _temporary((problem.rows, k), out.dtype)
    topk_gpu.top(x, k, values, indices)
    _draw(problem, values, indices, out)


def plans(problem: Problem, logits: Any) -> list[launch.Plan]:
    """The launches of `sample`, without launching; `logits` are as they came."""
    dtype = np.dtype(problem.dtype)
    if logits.dtype == dtype and in_place(problem, logits):
        x = matrix(problem, logits)
        copies: tuple[str, ...] = ()
    else:
        x = cp.ndarray((problem.rows, problem.columns), dtype)
        copies = ("logits",)
    k = 1 if problem.greedy else problem.top_k
    if k is None:
        return list(_choose(problem, x, copies))
    values, indices = (cp.ndarray((problem.rows, k), each) for each in (dtype, np.int64))
    top = topk_api.Problem("topk", problem.dtype, problem.dtype, x.shape[:1], x.shape[1], k)
    selection = topk_gpu.plans(top, topk_api.Operands(x, values, indices))
    drawing = () if problem.greedy else _choose(problem, values, ())
    return [*(dataclasses.replace(plan, copies=copies) for plan in selection), *drawing]


def in_place(problem: Problem, logits: Any) -> bool:
    """Whether the rows are dense and evenly spaced, so that nothing is copied."""
    return _row_stride(problem, logits) is not None


def matrix(problem: Problem, logits: Any) -> Any:
    """The logits as (rows, columns), rows dense and in C order: a view, or else a copy."""
    stride = _row_stride(problem, logits)
    if stride is not None:
        shape, strides = (problem.rows, problem.columns), (stride, logits.itemsize)
        return cp.ndarray(shape, logits.dtype, logits.data, strides)
    rows = logits.transpose(*problem.kept, problem.axis)
    return kept(cp.ascontiguousarray(rows)).reshape(problem.rows, problem.columns)


def _row_stride(problem: Problem, logits: Any) -> int | None:
    """Bytes from a row to the next, where the kernels can walk the rows as they lie."""
    itemsize = logits.itemsize
    dense = problem.columns == 1 or logits.strides[problem.axis] == itemsize
    if not dense or any(stride % itemsize for stride in logits.strides):
        return None
    # The answer's strides come first: they say in which order the rows are numbered.
    shape, kept = problem.shape, problem.kept
    numbers = [0] * len(shape)
    step = 1
    for axis in reversed(kept):
        numbers[axis] = step
        step *= shape[axis]
    sizes, (_, strides) = fold(shape, [numbers, logits.strides], kept)
    return strides[0] if len(sizes) == 1 else None


def _draw(problem: Problem, x: Any, indices: Any, out: Any) -> None:
    """Draw from (rows, columns) logits; a token is its column, or what `indices` has for it."""
    chosen = _choose(problem, x, ())
    params = np.zeros(1, PARAMS)
    params["x"], params["out"] = address(x), address(out)
    params["indices"] = 0 if indices is None else address(indices)
    params["rows"], params["columns"] = x.shape
    params["row_stride"] = x.strides[0] // x.itemsize
    params["seed"], params["offset"] = problem.seed, problem.offset
    params["scale"], params["least"] = problem.scale, problem.least
    params["top_p"] = np.inf if problem.top_p is None else problem.top_p
    if len(chosen) > 1:
        slices = sample_plan.slices_of(problem.dtype, x.shape[1], _aligned(x))
        pairs = _temporary((len(x), slices, 2), "float64" if x.dtype == np.float64 else "float32")
        params["slices"], params["slices_of_row"] = address(pairs), slices
    for plan in chosen:
        launch.launch(plan, params)


def _choose(problem: Problem, x: Any, copies: tuple[str, ...]) -> tuple[launch.Plan, ...]:
    return sample_plan.choose(
        problem.dtype, *x.shape, _aligned(x), problem.filtered, gpu.current(), copies
    )


def _aligned(x: Any) -> bool:
    return address(x) % 16 == 0 and (len(x) == 1 or x.strides[0] % 16 == 0)


def _temporary(shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory of this call, or of the graph that captures it."""
    memory = launch.workspace(math.prod(shape) * np.dtype(dtype).itemsize)
    return cp.ndarray(shape, dtype, None if memory is None else memory.data)
