"""Top-k, softmax + top-k, and sampling: each row of logits read once."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import peers, row_peers, rows
from .contest import OURS, Entry, Judge, host_times
from .rows import OVER, UNIT, Matrix
from .timing import Contestant, Stopwatch

__all__ = ["OVER", "SECONDS", "UNIT", "Case", "arguments", "cases", "host"]

SECONDS = 120.0  # for the default sweep; least rounds and the start come on top
CALLS = ("softmax_topk", "topk", "sample")
KS, FEW_KS, ORDERED_KS = (1, 5, 10, 15, 30, 50, 256), (5, 50), (5, 50, 256)
LARGE = 2 << 30  # bytes of a matrix from which on a few k will do
ALL_KS = (10, 4000)  # rows where every k is tried: the batches of the paper
MOST_BYTES = {"softmax_topk": 16 << 30, "topk": 16 << 30, "sample": 8 << 30}
NEVER = 1e9  # the error of what is wrong in kind
SEED = 1


@dataclass(frozen=True)
class Case:
    """One operation on one matrix; of `sample`, k is top_k."""

    operation: str
    matrix: Matrix
    k: int | None = None
    top_p: float | None = None

    @property
    def work(self) -> float:
        """Bytes moved at least: the matrix, and what is selected with its int64 indices."""
        indices = self.matrix.count * 8
        if self.operation == "sample":
            return self.matrix.bytes + indices
        values = self.matrix.bytes / self.matrix.length
        return self.matrix.bytes + (self.k or 0) * (values + indices)

    @property
    def memory(self) -> int:
        """Bytes of device memory: x and PyTorch's intermediate results, sorted ones for top_p."""
        return (16 if self.top_p else 4) * self.matrix.bytes

    @property
    def is_possible(self) -> bool:
        return self.matrix.bytes <= MOST_BYTES[self.operation] and (
            self.k is None or self.k <= self.matrix.length
        )

    def labels(self) -> dict[str, str | int]:
        name = "top_k" if self.operation == "sample" else "k"
        options = [f"{name}={self.k}"] * (self.k is not None)
        options += [f"top_p={self.top_p}"] * (self.top_p is not None)
        options += [self.matrix.order] * (self.matrix.order != "random")
        return {"call": self.operation, "options": ", ".join(options), **self.matrix.labels()}

    def build(self, stopwatch: Stopwatch) -> Entry:
        x, axis = self.matrix.draw(stopwatch), self.matrix.axis
        mine = ours(self, x)
        if self.operation == "sample":
            theirs = row_peers.sample(x, axis, self.k, self.top_p)
            return Entry([mine, *theirs], judge_sample(self, x, mine.call), "read")
        theirs = row_peers.topk(self.operation, x, self.k or 0, axis)
        return Entry([mine, *theirs], judge_top(self, x), "read")


def arguments(add: Callable[..., Any]) -> None:
    rows.arguments(add, CALLS)
    add("--k", nargs="+", type=int, help="elements selected, by softmax_topk and topk")


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; by default every k for float32, and samples of the rest."""
    found = []
    for call in options.call or (("softmax_topk", "sample") if options.quick else CALLS):
        ks: Sequence[int | None] = options.k or (FEW_KS if options.quick else KS)
        if call == "sample":
            ks = (None,)
        if rows.is_narrowed(options) or options.k:
            found += [
                Case(call, m, k) for m in rows.matrices(options, MOST_BYTES[call]) for k in ks
            ]
        elif call == "topk":
            found += [Case(call, m, k) for m in rows.plain() for k in FEW_KS]
        else:
            found += _sweep(call, rows.matrices(options, MOST_BYTES[call]), ks)
    return [case for case in found if case.is_possible]


def _sweep(call: str, matrices: list[Matrix], ks: Sequence[int | None]) -> list[Case]:
    few = ks if call == "sample" else FEW_KS
    found = []
    for m in matrices:
        every = m.rows in ALL_KS and m.bytes <= LARGE
        found += [Case(call, m, k) for k in (ks if every else few)]
    found += [Case(call, m, k) for m in rows.samples() for k in few]
    if call == "sample":
        found += [Case(call, m, k=50) for m in rows.plain()]
        return found + [Case(call, m, top_p=0.9) for m in rows.plain()]
    orders = ("ascending", "constant")
    return found + [Case(call, m, k) for o in orders for m in rows.ordered(o) for k in ORDERED_KS]


def ours(case: Case, x: Any) -> Contestant:
    import cuflash

    axis, k, top_p = case.matrix.axis, case.k, case.top_p
    if case.operation == "sample":
        sample = cuflash.sample
        return Contestant(OURS, lambda: sample(x, seed=SEED, axis=axis, top_k=k, top_p=top_p))
    function = getattr(cuflash, case.operation)
    return Contestant(OURS, lambda: function(x, k, axis=axis))


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    """Time the host on an array so small that the GPU never holds it up."""
    matrix = Matrix("float32", 10, 1000)
    chosen = [Case("softmax_topk", matrix, k=5), Case("sample", matrix)]
    return {c.operation: host_times(c.build(stopwatch).contestants, stopwatch) for c in chosen}


def judge_top(case: Case, x: Any) -> Judge:
    """Judge values and indices in a few rows.

    Our indices are those of a stable sort. A peer may take equals in any order, also those that
    its rounding made equal: what its indices point at must be as large as it should be.
    """
    k = case.k or 0
    known = []
    for _, place in case.matrix.places():
        row = peers.to_host(x[place])
        scores, allowed = row, np.full(row.shape, rows.tiny(case.matrix.dtype))
        if case.operation == "softmax_topk":
            scores, allowed = rows.probabilities(row, case.matrix.dtype)
        known.append((place, scores, allowed, largest(row, k)))

    def judge(result: Any, strictly: bool) -> float:
        values, indices = result
        worst = 0.0
        for place, scores, allowed, best in known:
            at = peers.to_host(indices[place]).astype(np.int64)
            if at.min() < 0 or at.max() >= scores.size or np.unique(at).size < k:
                return NEVER
            if strictly and not np.array_equal(at, best):
                return NEVER
            for found in (peers.to_host(values[place]), scores[at]):
                worst = max(worst, float(np.max(np.abs(found - scores[best]) / allowed[best])))
        return worst if worst < NEVER else NEVER

    return judge


def largest(row: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k largest, descending, equals by ascending index."""
    candidates = np.flatnonzero(row >= np.partition(row, row.size - k)[row.size - k])
    return candidates[np.argsort(-row[candidates], kind="stable")[:k]]


def judge_sample(case: Case, x: Any, again: Callable[[], Any]) -> Judge:
    """Judge that every token exists, that it is not excluded, and that ours comes again."""
    matrix = case.matrix
    known = [
        (number, admitted(peers.to_host(x[place]), case.k, case.top_p))
        for number, place in matrix.places()
    ]

    def judge(result: Any, strictly: bool) -> float:
        tokens = peers.to_host(result).astype(np.int64)
        right = tokens.shape == (matrix.count,)
        right = right and bool(((tokens >= 0) & (tokens < matrix.length)).all())
        right = right and all(mask[tokens[number]] for number, mask in known)
        if strictly:
            right = right and np.array_equal(tokens, peers.to_host(again()))
        return 0.0 if right else NEVER

    return judge


def admitted(row: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Return which tokens may be drawn, with a rounding's grace at the edge of top_p."""
    p = np.exp(row - rows.log_sum_exp(row))
    mask = p > 0
    if top_k is not None:
        mask &= row >= np.partition(row, row.size - top_k)[row.size - top_k]
    if top_p is not None:
        descending = np.sort(p)[::-1]
        last = int(np.searchsorted(descending.cumsum(), top_p))
        mask &= p >= descending[min(last, row.size - 1)] * (1 - 1e-3)
    return mask
