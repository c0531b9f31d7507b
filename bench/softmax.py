"""Softmax and its kin: each matrix read once, and where the answer is one, written once."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import peers, row_peers, rows
from .contest import OURS, Entry, Piece, by_pieces, host_times
from .rows import OVER, UNIT, Matrix
from .timing import Contestant, Stopwatch

__all__ = ["OVER", "SECONDS", "UNIT", "Case", "arguments", "cases", "host"]

SECONDS = 120.0  # for the default sweep; least rounds and the start come on top
# The matrices that a call reads and writes. One is bound by the speed of a read, more by a copy's.
MATRICES = {
    "softmax": 2,
    "logsumexp": 1,
    "softmax_backward": 3,
    "log_softmax": 2,
    "log_softmax_backward": 3,
}
SWEPT = ("softmax", "logsumexp", "softmax_backward")  # the others are sampled
MOST_BYTES = 16 << 30  # a matrix; on a card that has less free, what fits


@dataclass(frozen=True)
class Case:
    """One operation on one matrix along one axis."""

    operation: str
    matrix: Matrix

    @property
    def work(self) -> float:
        """Bytes moved at least."""
        results = self.matrix.bytes / self.matrix.length if self.operation == "logsumexp" else 0
        return MATRICES[self.operation] * self.matrix.bytes + results

    @property
    def memory(self) -> int:
        """Bytes of device memory that ours and PyTorch's answer take, with room to spare."""
        return (MATRICES[self.operation] + 2) * self.matrix.bytes

    def labels(self) -> dict[str, str | int]:
        return {"call": self.operation, **self.matrix.labels()}

    def build(self, stopwatch: Stopwatch) -> Entry:
        arrays, axis = self.draw(stopwatch), self.matrix.axis
        theirs = row_peers.softmax(self.operation, arrays, axis)
        judge = by_pieces(pieces(self.operation, arrays, self.matrix))
        ceiling = "read" if MATRICES[self.operation] == 1 else "copy"
        return Entry([ours(self.operation, arrays, axis), *theirs], judge, ceiling)

    def draw(self, stopwatch: Stopwatch) -> tuple[Any, ...]:
        """Return x, or dy and y for a backward pass."""
        x = self.matrix.draw(stopwatch)
        if not self.operation.endswith("_backward"):
            return (x,)
        forward = function(self.operation.removesuffix("_backward"))
        return self.matrix.draw(stopwatch), forward(x, axis=self.matrix.axis)


def arguments(add: Callable[..., Any]) -> None:
    rows.arguments(add, tuple(MATRICES))


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; by default float32 everywhere, and samples of the rest."""
    found = []
    for call in options.call or (SWEPT if options.quick else MATRICES):
        most = MOST_BYTES if MATRICES[call] < 3 else MOST_BYTES // 2
        if rows.is_narrowed(options):
            matrices = rows.matrices(options, most)
        elif call in SWEPT:
            matrices = rows.matrices(options, most) + rows.samples()
        else:
            matrices = rows.plain()
        found += [Case(call, matrix) for matrix in matrices]
    return found


def function(name: str) -> Callable[..., Any]:
    import cuflash

    return getattr(cuflash, name)


def ours(operation: str, arrays: tuple[Any, ...], axis: int) -> Contestant:
    return Contestant(OURS, partial(function(operation), *arrays, axis=axis))


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    """Time the host on an array so small that the GPU never holds it up."""
    x = stopwatch.normal((10, 1000), "float32")
    calls = ("softmax", "logsumexp")
    return {
        f: host_times([ours(f, (x,), 1), *row_peers.softmax(f, (x,), 1)], stopwatch) for f in calls
    }


def pieces(operation: str, arrays: tuple[Any, ...], matrix: Matrix) -> list[Piece]:
    """Return the first, the middle and the last row (or column, for axis 0)."""
    found: list[Piece] = []
    for number, place in matrix.places():
        on_host = [peers.to_host(array[place]) for array in arrays]
        right, allowed = reference(operation, on_host, matrix.dtype)
        found.append(((number,) if operation == "logsumexp" else place, right, allowed))
    return found


def reference(operation: str, arrays: list[np.ndarray], dtype: str) -> tuple[Any, Any]:
    """Return the answer for one row in float64 and the error allowed in each element."""
    relative = rows.relative_error(dtype)
    if operation == "softmax":
        return rows.probabilities(*arrays, dtype)
    if not operation.endswith("_backward"):
        right = rows.log_sum_exp(arrays[0])
        if operation == "log_softmax":
            right = arrays[0] - right
        return right, relative * np.maximum(1.0, np.abs(right))
    dy, y = arrays
    if operation == "softmax_backward":
        right, size = y * (dy - (dy * y).sum()), y * (np.abs(dy) + np.abs(dy * y).sum())
    else:
        right = dy - np.exp(y) * dy.sum()
        size = np.abs(dy) + np.exp(y) * np.abs(dy).sum()
    return right, relative * size + rows.tiny(dtype)
