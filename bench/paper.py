"""The figures of "Online normalizer calculation for softmax", and cuflash beside its algorithms.

M. Milakov and N. Gimelshein, arXiv:1805.02867. Their kernels are in paper.cu.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from . import peers, rows, selection
from .contest import OURS, Entry, by_pieces
from .rows import Matrix
from .timing import Contestant, Stopwatch

UNIT, OVER = "TB/s", "V"  # what is reported, and what it is drawn over
SECONDS = 30.0  # for the default sweep; least rounds and the start come on top
SOURCE = Path(__file__).with_suffix(".cu")
SOFTMAX, TOPK = "softmax", "softmax + top-k"
BATCHES = (4000, 10)  # that fill a GPU, and that do not
LENGTHS = (63, 250, 1000, 2500, 4000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000)
LONGER = (3_000_000, 10_000_000)  # of the smaller batch
K, KS, LENGTH_FOR_KS = 5, (1, 2, 3, 5, 8, 10, 15, 20, 25, 30), 25_000


@dataclass(frozen=True)
class Case:
    """One point of a figure: `batch` vectors of V scores, and of those K selected, or none."""

    batch: int
    length: int
    k: int | None = None

    @property
    def matrix(self) -> Matrix:
        return Matrix("float32", self.batch, self.length)

    @property
    def memory(self) -> int:
        """Bytes of device memory: x, and the softmax of the paper's kernels and of ours."""
        return (4 if self.k is None else 3) * self.matrix.bytes

    @property
    def work(self) -> float:
        """Bytes moved at least, as in the other rooms."""
        if self.k is None:
            return 2 * self.matrix.bytes
        return selection.Case("softmax_topk", self.matrix, self.k).work

    def labels(self) -> dict[str, str | int]:
        call = SOFTMAX if self.k is None else TOPK
        return {"call": call, "K": self.k or "", "batch": self.batch, OVER: self.length}

    def build(self, stopwatch: Stopwatch) -> Entry:
        x = self.matrix.draw(stopwatch)
        if self.k is None:
            pieces = [
                (place, *rows.probabilities(peers.to_host(x[place]), self.matrix.dtype))
                for _, place in self.matrix.places()
            ]
            return Entry([ours(self, x), *softmaxes(x)], by_pieces(pieces), "copy")
        judge = selection.judge_top(selection.Case("softmax_topk", self.matrix, self.k), x)
        return Entry([ours(self, x), *selections(x, self.k)], judge, "read")


def arguments(add: Callable[..., Any]) -> None:
    add("--batch", nargs="+", type=int)
    add("--n", nargs="+", type=int, help="lengths V of the vectors")


def cases(options: Namespace) -> list[Case]:
    """Return the points of the figures asked for; by default of all."""
    lengths = options.n or ((1000, 25_000) if options.quick else LENGTHS)
    shapes = list(product(options.batch or BATCHES, lengths))
    if not (options.batch or options.n or options.quick):
        shapes += [(min(BATCHES), length) for length in LONGER]
    found = [Case(*shape, k) for k in (None, K) for shape in shapes]
    if not (options.batch or options.n or options.quick):
        found += [Case(max(BATCHES), LENGTH_FOR_KS, k) for k in KS if k != K]
    return found


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    return {}  # the paper measured none


def ours(case: Case, x: Any) -> Contestant:
    import cuflash

    if case.k is None:
        return Contestant(OURS, lambda: cuflash.softmax(x, axis=-1))
    return Contestant(OURS, lambda: cuflash.softmax_topk(x, case.k))


@cache
def kernels(k: int) -> Any:
    """Compile the paper's kernels for one K."""
    import cupy

    return cupy.RawModule(code=f"constexpr int kTop = {k};\n{SOURCE.read_text()}")


def launcher(x: Any, k: int) -> Callable[..., None]:
    """Return what launches a kernel on the rows of a matrix: a block each, as in the paper."""
    batch, length = x.shape
    # The authors' own benchmark leaves each thread eight elements at least.
    threads = next((t for t in (256, 128, 64) if t <= length // 8), 32)
    find = kernels(k).get_function

    def launch(name: str, matrix: Any, *results: Any) -> None:
        find(name)((batch,), (threads,), (matrix, *results, np.int32(length)))

    return launch


def softmaxes(x: Any) -> list[Contestant]:
    """Return Algorithms 1 to 3."""
    launch = launcher(x, K)
    y = peers.find("cupy").empty_like(x)

    def contestant(name: str) -> Contestant:
        def call() -> Any:
            launch(f"softmax_{name}", x, y)
            return y

        return Contestant(name, call)

    return [contestant(name) for name in ("naive", "safe", "online")]


def selections(x: Any, k: int) -> list[Contestant]:
    """Return softmax and then top-k, and both in one kernel (online: Algorithm 4)."""
    cupy, launch = peers.find("cupy"), launcher(x, k)
    y = cupy.empty_like(x)
    result = cupy.empty((len(x), k), np.float32), cupy.empty((len(x), k), np.int32)

    def unfused(name: str) -> Contestant:
        def call() -> Any:
            launch(f"softmax_{name}", x, y)
            launch("topk", y, *result)
            return result

        return Contestant(f"{name} unfused", call)

    def fused(name: str) -> Contestant:
        def call() -> Any:
            launch(f"{name}_topk", x, *result)
            return result

        return Contestant(f"{name} fused", call)

    return [make(name) for name in ("safe", "online") for make in (unfused, fused)]
