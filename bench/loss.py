"""Cross-entropy, the mean over the rows: logits read once, and backward written once."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import peers, row_peers, rows
from .contest import OURS, Entry, Judge, Piece, by_pieces, host_times
from .rows import OVER, UNIT, Matrix
from .timing import Contestant, Stopwatch

__all__ = ["OVER", "SECONDS", "UNIT", "Case", "arguments", "cases", "host"]

SECONDS = 40.0  # for the default sweep; least rounds and the start come on top
CALLS = ("cross_entropy", "cross_entropy_backward")
MOST_BYTES = 8 << 30  # a matrix; on a card that has less free, what fits
CHUNK = 1 << 26  # elements that the reference widens at a time


@dataclass(frozen=True)
class Case:
    """One pass over one matrix of logits."""

    operation: str
    matrix: Matrix
    smoothing: float = 0.0

    @property
    def is_backward(self) -> bool:
        return self.operation == "cross_entropy_backward"

    @property
    def work(self) -> float:
        """Bytes moved at least: logits and targets, and the gradient and lse for backward."""
        targets = 8 * self.matrix.count
        return self.matrix.bytes * (2 if self.is_backward else 1) + targets

    @property
    def memory(self) -> int:
        """Bytes of device memory: PyTorch keeps a log-softmax, and has two gradients at a time."""
        return (6 if self.is_backward else 4) * self.matrix.bytes

    def labels(self) -> dict[str, str | int]:
        options = f"label_smoothing={self.smoothing}" if self.smoothing else ""
        return {"call": self.operation, "options": options, **self.matrix.labels()}

    def build(self, stopwatch: Stopwatch) -> Entry:
        x = self.matrix.draw(stopwatch)
        targets = stopwatch.integers(self.matrix.length, self.matrix.count)
        if self.is_backward:
            theirs = row_peers.cross_entropy_backward(x, targets, self.smoothing)
            judge, ceiling = by_pieces(pieces(self, x, targets)), "copy"
        else:
            theirs = row_peers.cross_entropy(x, targets, self.smoothing)
            judge, ceiling = judge_mean(self, x, targets), "read"
        return Entry([ours(self, x, targets), *theirs], judge, ceiling)


def arguments(add: Callable[..., Any]) -> None:
    rows.arguments(add, CALLS)


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; by default float32 everywhere, and samples of the rest."""
    found = []
    for call in options.call or CALLS:
        found += [Case(call, matrix) for matrix in rows.matrices(options, MOST_BYTES)]
        if not rows.is_narrowed(options):
            found += [Case(call, matrix) for matrix in rows.samples() if matrix.axis == 1]
            found += [Case(call, matrix, 0.1) for matrix in rows.plain()]
    return found


def ours(case: Case, x: Any, targets: Any) -> Contestant:
    import cuflash

    smoothing = case.smoothing
    if not case.is_backward:
        loss = cuflash.cross_entropy
        return Contestant(OURS, lambda: loss(x, targets, label_smoothing=smoothing))
    backward = cuflash.cross_entropy_backward
    found = cuflash.cross_entropy(x, targets, label_smoothing=smoothing, return_lse=True)
    lse, dloss = found.lse, found.loss * 0 + 1
    return Contestant(OURS, lambda: backward(dloss, x, targets, lse, label_smoothing=smoothing))


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    """Time the host on an array so small that the GPU never holds it up."""
    chosen = [Case(call, Matrix("float32", 10, 1000)) for call in CALLS]
    return {c.operation: host_times(c.build(stopwatch).contestants, stopwatch) for c in chosen}


def judge_mean(case: Case, x: Any, targets: Any) -> Judge:
    """Judge the mean by float64 arithmetic in the arrays' own library."""
    right = mean_loss(x, targets, case.smoothing)
    ours = "float64" if case.matrix.dtype == "float64" else "float32"  # the loss of half logits

    def judge(result: Any, strictly: bool) -> float:
        relative = rows.relative_error(ours if strictly else case.matrix.dtype)
        error = abs(float(peers.to_host(result)) - right) / (relative * max(1.0, abs(right)))
        return float(np.nan_to_num(error, nan=1e9, posinf=1e9))

    return judge


def mean_loss(x: Any, targets: Any, smoothing: float) -> float:
    """Return the mean cross-entropy, widened to float64 some rows at a time."""
    xp = np if isinstance(x, np.ndarray) else peers.find("cupy")
    total, step = 0.0, max(1, CHUNK // x.shape[1])
    for start in range(0, len(x), step):
        part = x[start : start + step].astype(np.float64)
        lse = xp.log(xp.exp(part - part.max(1, keepdims=True)).sum(1)) + part.max(1)
        picked = xp.take_along_axis(part, targets[start : start + step, None], 1)[:, 0]
        score = (1 - smoothing) * picked + smoothing * part.mean(1)
        total += float((lse - score).sum())
    return total / len(x)


def pieces(case: Case, x: Any, targets: Any) -> list[Piece]:
    """Return the gradient in the first, the middle and the last row."""
    matrix, smoothing, found = case.matrix, case.smoothing, []
    for number, place in matrix.places():
        right, allowed = rows.probabilities(peers.to_host(x[place]), matrix.dtype)
        right -= smoothing / matrix.length
        right[int(targets[number])] -= 1 - smoothing
        # What cancels beside the target was rounded at its own size.
        allowed += rows.relative_error(matrix.dtype) * np.abs(right)
        allowed += rows.relative_error("float32") * smoothing / matrix.length
        found.append(
            (place, right / matrix.count, allowed / matrix.count + rows.tiny(matrix.dtype))
        )
    return found
