"""What the rooms of softmax, selection and loss share: matrices of rows of many lengths."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from . import peers
from .timing import Stopwatch

UNIT, OVER = "TB/s", "columns"  # what is reported, and what it is drawn over
ROWS, COLUMNS = (1, 10, 128, 4000, 65536), (63, 1000, 4000, 32000, 128000, 1_000_000)
SAMPLES = ((4000, 1000), (4000, 32000), (10, 128000))  # where not everything is swept
ACROSS = ((1000, 4000), (4000, 1000), (32000, 4000), (128000, 10))  # and reduced along axis 0
SMALL = 1 << 27  # elements up to which slow peers take part


@dataclass(frozen=True)
class Matrix:
    """The input of a case. Its rows lie along axis 1 or, for axis 0, are its columns."""

    dtype: str
    rows: int
    columns: int
    axis: int = 1
    order: str = "random"  # or "ascending", or "constant"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def length(self) -> int:
        return self.shape[self.axis]

    @property
    def count(self) -> int:
        """The number of rows in the sense of softmax."""
        return self.shape[1 - self.axis]

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * np.dtype(self.dtype).itemsize

    def labels(self) -> dict[str, str | int]:
        return {
            "dtype": self.dtype,
            "rows": self.rows,
            "columns": self.columns,
            "axis": self.axis,
        }

    def draw(self, stopwatch: Stopwatch) -> Any:
        x = stopwatch.normal(self.shape, self.dtype)
        if self.order == "ascending":
            x.sort(axis=self.axis)
        elif self.order == "constant":
            x[...] = 0.5
        return x

    def places(self) -> list[tuple[int, tuple]]:
        """Return number and index of the first, the middle and the last row."""
        numbers = sorted({0, self.count // 2, self.count - 1})
        return [(n, (n,) if self.axis == 1 else (slice(None), n)) for n in numbers]


def arguments(add: Callable[..., Any], calls: tuple[str, ...]) -> None:
    """Say which options a room of rows takes besides everybody's."""
    add("--dtype", nargs="+", choices=peers.DTYPES)
    add("--n", nargs="+", type=int, help="columns")
    add("--rows", nargs="+", type=int)
    add("--call", nargs="+", choices=calls)


def is_narrowed(options: Namespace) -> bool:
    """Whether shapes or dtypes were asked for, so that no samples of others are wanted."""
    return bool(options.rows or options.n or options.dtype or options.quick)


def matrices(options: Namespace, most_bytes: int) -> list[Matrix]:
    """Return the matrices asked for; by default float32 everywhere."""
    rows = options.rows or ((10, 4000) if options.quick else ROWS)
    columns = options.n or ((1000, 32000) if options.quick else COLUMNS)
    found = [Matrix(*m) for m in product(options.dtype or ("float32",), rows, columns)]
    return [matrix for matrix in found if matrix.bytes <= most_bytes]


def samples() -> list[Matrix]:
    """Return the samples of other dtypes and of axis 0."""
    dtypes = ("float16", "bfloat16", "float64")
    return [Matrix(t, *s) for t in dtypes for s in SAMPLES] + [
        Matrix("float32", *s, axis=0) for s in ACROSS
    ]


def plain() -> list[Matrix]:
    """Return float32 along the last axis, as samples of what is not swept."""
    return [Matrix("float32", *shape) for shape in SAMPLES]


def ordered(order: str) -> list[Matrix]:
    return [replace(matrix, order=order) for matrix in plain()]


def relative_error(dtype: str) -> float:
    """Return what rounding the result and the float32 (float64) arithmetic before it may cost."""
    inside = np.finfo(np.float64 if dtype == "float64" else np.float32).eps
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2 + 32 * float(inside)


def tiny(dtype: str) -> float:
    """Return what may flush to 0."""
    info = ml_dtypes.finfo(np.dtype(dtype))
    return float(info.smallest_subnormal if dtype == "float16" else info.smallest_normal)


def log_sum_exp(row: np.ndarray) -> float:
    return float(row.max() + np.log(np.exp(row - row.max()).sum()))


def probabilities(row: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a row's softmax in float64 and the error allowed in each element."""
    right = np.exp(row - log_sum_exp(row))
    return right, relative_error(dtype) * right + tiny(dtype)
