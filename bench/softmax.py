"""Softmax (one read, one write) and logsumexp (one read) of rows of many lengths."""

from argparse import Namespace
from dataclasses import dataclass
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from . import peers
from .contest import OURS, Entry, Piece, host_times
from .timing import Contestant, Stopwatch

UNIT, OVER = "TB/s", "columns"  # what is reported, and what it is drawn over
SECONDS = 40.0  # for the default sweep; least rounds and the start come on top
ROWS, COLUMNS = (1, 10, 128, 4000, 65536), (63, 1000, 4000, 32000, 128000, 1_000_000)
CEILINGS = {"softmax": "copy", "logsumexp": "read"}  # the operations, and what bounds them
MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    """One operation on one matrix along one axis."""

    operation: str
    dtype: str
    rows: int
    columns: int
    axis: int = 1

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * np.dtype(self.dtype).itemsize

    @property
    def work(self) -> float:
        shared = 1 if self.operation == "softmax" else (self.rows, self.columns)[self.axis]
        return self.bytes + self.bytes / shared

    def labels(self) -> dict[str, str | int]:
        kind: dict[str, str | int] = {"call": self.operation, "dtype": self.dtype}
        return kind | {"rows": self.rows, "columns": self.columns, "axis": self.axis}

    def build(self, stopwatch: Stopwatch) -> Entry:
        x = stopwatch.normal((self.rows, self.columns), self.dtype)
        contestants = all_contestants(self.operation, x, self.axis)
        return Entry(contestants, pieces(self.operation, x, self.axis), CEILINGS[self.operation])


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; by default float32 everywhere, and samples of the rest."""
    rows = options.rows or ((10, 4000) if options.quick else ROWS)
    columns = options.n or ((1000, 32000) if options.quick else COLUMNS)
    shapes: list[tuple] = [*product(options.dtype or ("float32",), rows, columns)]
    if not (options.rows or options.n or options.dtype or options.quick):
        samples = ((4000, 1000), (4000, 32000), (10, 128000))
        shapes += [(t, *s) for t in ("float16", "bfloat16", "float64") for s in samples]
        shapes += [("float32", *s, 0) for s in ((4000, 1000), (32000, 4000), (128000, 10))]
    found = [Case(call, *shape) for call in options.call or CEILINGS for shape in shapes]
    return [case for case in found if case.bytes <= MOST_BYTES]


def all_contestants(operation: str, x: Any, axis: int) -> list[Contestant]:
    import cuflash

    function = getattr(cuflash, operation)
    ours = Contestant(OURS, lambda: function(x, axis=axis))
    return [ours, *peers.softmax(operation, x, axis)]


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    """Time the host on an array so small that the GPU never holds it up."""
    x = stopwatch.normal((10, 1000), "float32")
    return {f: host_times(all_contestants(f, x, 1), stopwatch) for f in CEILINGS}


def pieces(operation: str, x: Any, axis: int) -> list[Piece]:
    """Return the first, the middle and the last row (or column, for axis 0)."""
    count, found = x.shape[1 - axis], []
    for number in sorted({0, count // 2, count - 1}):
        place = (number,) if axis == 1 else (slice(None), number)
        right, allowed = reference(operation, peers.to_host(x[place]), str(x.dtype))
        found.append(((number,) if operation == "logsumexp" else place, right, allowed))
    return found


def reference(operation: str, row: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the answer for one row in float64 and the error allowed in each element."""
    # Rounding the result, and the float32 (float64) arithmetic before; tiny results flush to 0.
    info = ml_dtypes.finfo(np.dtype(dtype))
    inside = np.finfo(np.float64 if dtype == "float64" else np.float32).eps
    relative = float(info.eps) / 2 + 32 * inside
    lse = row.max() + np.log(np.exp(row - row.max()).sum())
    if operation == "logsumexp":
        return lse, relative * max(1.0, abs(lse))
    right = np.exp(row - lse)
    tiny = info.smallest_subnormal if dtype == "float16" else info.smallest_normal
    return right, relative * right + float(tiny)
