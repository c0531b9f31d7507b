"""The host side of the kernel: complete operands in, one launch or two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ... import arrays
from ...gpu_arrays import kept
from ...jit import gpu, launch
from ...jit.launch import Plan
from ...jit.strides import address, fold, in_elements
from . import topk_plan
from .topk_api import Operands, Problem
from .topk_plan import Launches

MAX_AXES = 4

# The kernel's Params, field by field (topk.cu).
PARAMS = np.dtype(
    [
        ("x", np.uint64),
        ("values", np.uint64),
        ("indices", np.uint64),
        ("pairs", np.uint64),
        ("columns_of", np.uint64),
        ("rows", np.int64),
        ("columns", np.int64),
        ("slices", np.int64),
        ("k", np.int64),
        ("most", np.int64),
        ("outer", np.int64, MAX_AXES),
        ("x_strides", np.int64, MAX_AXES),
        ("values_strides", np.int64, MAX_AXES + 1),
        ("indices_strides", np.int64, MAX_AXES + 1),
    ],
    align=True,
)


def forward(problem: Problem, operands: Operands) -> None:
    """Fill ``operands.values`` and ``operands.indices`` on CuPy's current stream."""
    fitting, copies = fit(operands)
    _run(problem, fitting, copies)
    if fitting.values is not operands.values:
        operands.values[...] = fitting.values
        operands.indices[...] = fitting.indices


def plans(problem: Problem, operands: Operands) -> list[Plan]:
    """What `forward` would launch; nothing is copied for it."""
    sizes, _ = _folded(operands)
    copies = _copies(operands, sizes)
    axes = 1 if "out" in copies else len(sizes)
    return topk_plan.choose(problem, axes, gpu.current(), copies).plans


def top(x: Any, k: int, values: Any, indices: Any) -> None:
    """The k largest of each row of x, sorted, NaN first and ties by lowest index.

    Parameters
    ----------
    x : cupy.ndarray
        (rows, columns), at least one row, contiguous along columns.
    k : int
        From 1 to 1024, and to the number of columns.
    values, indices : cupy.ndarray
        (rows, k), of x's dtype and int64: the answers.
    """
    dtype = arrays.dtype_name(x.dtype)
    problem = Problem("topk", dtype, dtype, x.shape[:1], x.shape[1], k)
    _run(problem, Operands(x, values, indices), ())


def fit(operands: Operands) -> tuple[Operands, tuple[str, ...]]:
    """Operands as the kernel can use them, and the names of those copied for it."""
    sizes, _ = _folded(operands)
    copies = _copies(operands, sizes)
    if not copies:
        return operands, copies
    x, values, indices = operands.x, operands.values, operands.indices
    if "x" in copies:
        x = kept(x.copy(order="C"))
    if "out" in copies:
        values, indices = kept(values.copy(order="C")), kept(indices.copy(order="C"))
    return Operands(x, values, indices), copies


def pack(
    problem: Problem, operands: Operands, launches: Launches, memory: Any
) -> list[np.ndarray[Any, Any]]:
    """The arguments of the launches. `memory` is what the first leaves for the second."""
    sizes, (x, values, indices) = _folded(operands)
    first = np.zeros(1, PARAMS)
    first["x"], first["values"] = address(operands.x), address(operands.values)
    first["indices"] = address(operands.indices)
    first["rows"], first["columns"], first["slices"] = problem.rows, problem.columns, 1
    first["k"], first["most"] = problem.k, topk_plan.most(problem.k)
    first["outer"][0, : len(sizes)] = sizes
    first["x_strides"][0, : len(sizes)] = x[:-1]
    for name, strides in (("values", values), ("indices", indices)):
        first[f"{name}_strides"][0, : len(sizes)] = strides[:-1]
        first[f"{name}_strides"][0, MAX_AXES] = strides[-1]
    if launches.second is None:
        return [first]
    first["slices"] = launches.slices
    second = first.copy()
    columns = launches.slices * problem.k
    found = problem.rows * columns
    at = address(memory)
    first["indices"], first["pairs"] = at, at + 8 * found
    first["values"] = at + 8 * found + 16 * problem.rows * launches.slices
    second["x"], second["columns_of"] = first["values"], first["indices"]
    second["pairs"], second["columns"] = first["pairs"], columns
    steps = [columns * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    second["x_strides"][0, : len(sizes)] = steps
    return [first, second]


def _run(problem: Problem, operands: Operands, copies: tuple[str, ...]) -> None:
    sizes, _ = _folded(operands)
    launches = topk_plan.choose(problem, len(sizes), gpu.current(), copies)
    parts = problem.rows * launches.slices
    # Of each part: k elements with their columns, and the pair (m, d).
    left = parts * (problem.k * (operands.x.itemsize + 8) + 16)
    memory = launch.workspace(left if launches.second else 0)
    for plan, params in zip(launches.plans, pack(problem, operands, launches, memory)):
        launch.launch(plan, params)


def _folded(operands: Operands) -> tuple[tuple[int, ...], list[list[int]]]:
    """The sizes of the axes that tell rows apart, and for x, values and indices their strides.

    Strides are in elements; the last is the one along a row.
    """
    given = (operands.x, operands.values, operands.indices)
    strides = [[stride // array.itemsize for stride in array.strides] for array in given]
    sizes, folded = fold(operands.x.shape, strides, range(operands.x.ndim - 1))
    return sizes, [[*outer, along[-1]] for outer, along in zip(folded, strides)]


def _copies(operands: Operands, sizes: tuple[int, ...]) -> tuple[str, ...]:
    """Which arguments cannot be used in place."""
    x = operands.x
    if len(sizes) > MAX_AXES or not all(map(in_elements, (operands.values, operands.indices))):
        return ("x", "out")
    dense = x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    return () if dense and in_elements(x) else ("x",)
