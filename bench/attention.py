"""Attention forward: 4 B H N^2 d operations (half of them when causal), 16,384 tokens a batch."""

import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from . import peers
from .contest import OURS, Entry, Piece, by_pieces, host_times
from .timing import Contestant, Stopwatch

UNIT, OVER = "TFLOP/s", "N"  # what is reported, and what it is drawn over
SECONDS = 75.0  # for the default sweep; least rounds and the start come on top
TOKENS, WIDTH = 16384, 2048
DIMS, LENGTHS = (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384)
PORTABLE_ARCH = "89"  # the newest whose kernels know nothing of Hopper's instructions


@dataclass(frozen=True)
class Case:
    """One shape: the same tokens and the same width whatever the length and the head_dim."""

    dtype: str
    head_dim: int
    length: int
    causal: bool
    engine: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads = max(1, TOKENS // self.length), max(1, WIDTH // self.head_dim)
        return batch, heads, self.length, self.head_dim

    @property
    def work(self) -> float:
        batch, heads, n, d = self.shape
        return 4 * batch * heads * n * n * d / (2 if self.causal else 1)

    @property
    def memory(self) -> int:
        """Bytes of device memory: q, k, v, and everybody's answers."""
        return 8 * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def labels(self) -> dict[str, str | int]:
        causal = "yes" if self.causal else "no"
        engine = {} if self.engine is None else {"engine": self.engine}
        shape = {"dtype": self.dtype, "d": self.head_dim, "N": self.length, "causal": causal}
        return engine | shape

    def build(self, stopwatch: Stopwatch) -> Entry:
        q, k, v = (stopwatch.normal(self.shape, self.dtype) for _ in range(3))
        explain = partial(explained, q, k, v, self.causal)
        us = with_engine(ours(q, k, v, self.causal), self.engine, explain)
        judge = by_pieces(pieces(q, k, v, self.causal))
        contestants = [us, *peers.attention(q, k, v, causal=self.causal)]
        return Entry(contestants, judge, peers.matmul(stopwatch, self.dtype))


def arguments(add: Callable[..., Any]) -> None:
    """Say which options the room takes besides everybody's."""
    add("--dtype", nargs="+", choices=peers.DTYPES)
    add("--n", nargs="+", type=int, help="lengths of the sequences")
    add("--d", nargs="+", type=int, help="head dimensions")
    add("--causal", nargs="+", choices=("yes", "no"))
    add("--engine", choices=("sm90", "portable"), help="half types only; by default the GPU's own")


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; by default half types everywhere, wide ones at one length."""
    causals = [c == "yes" for c in options.causal or ("no", "yes")]
    dims, lengths = options.d or DIMS, options.n or ((4096,) if options.quick else LENGTHS)
    dtypes = options.dtype or (("bfloat16",) if options.quick else ("bfloat16", "float16"))
    found = [Case(*c, options.engine) for c in product(dtypes, dims, lengths, causals)]
    if not (options.dtype or options.d or options.n or options.causal or options.quick):
        wide = (("float32", 64), ("float32", 128), ("float64", 128))
        found += [Case(*c, 4096, causal) for c in wide if not options.engine for causal in causals]
    return found


@contextmanager
def only(engine: str | None) -> Iterator[None]:
    """Have cuflash use one of its engines, whatever the environment says; None: as it says."""
    before = os.environ.get("CUFLASH_ARCH")
    if engine is not None:
        os.environ.pop("CUFLASH_ARCH", None)
    if engine == "portable":
        os.environ["CUFLASH_ARCH"] = PORTABLE_ARCH
    try:
        yield
    finally:
        os.environ.pop("CUFLASH_ARCH", None)
        if before is not None:
            os.environ["CUFLASH_ARCH"] = before


def with_engine(us: Contestant, engine: str | None, explain: Callable[[], str]) -> Contestant:
    """Return the contestant with one engine; RuntimeError where cuflash would take another."""
    if engine is None:
        return us
    with only(engine):
        if ("forward_sm90" in explain()) != (engine == "sm90"):
            raise RuntimeError(f"the {engine} engine is not for this case here:\n{explain()}")
    return replace(us, scope=partial(only, engine))


def ours(q: Any, k: Any, v: Any, causal: bool) -> Contestant:
    import cuflash

    return Contestant(OURS, lambda: cuflash.attention(q, k, v, causal=causal))


def explained(q: Any, k: Any, v: Any, causal: bool) -> str:
    import cuflash

    return cuflash.explain(cuflash.attention, q, k, v, causal=causal)


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    """Time the host on a problem so small that the GPU never holds it up."""
    q, k, v = (stopwatch.normal((1, 4, 64, 64), "float16") for _ in range(3))
    contestants = [ours(q, k, v, True), *peers.attention(q, k, v, causal=True)]
    return {"attention": host_times(contestants, stopwatch)}


def pieces(q: Any, k: Any, v: Any, causal: bool) -> list[Piece]:
    """Return a few rows of the first and of the last head."""
    found = []
    for b, h, rows in places(q.shape):
        keys, values = peers.to_host(k[b, h]), peers.to_host(v[b, h])
        queries, first = peers.to_host(q[b, h, rows]), rows.start if causal else None
        right = reference(queries, keys, values, first, str(q.dtype))
        found.append(((b, h, rows), *right))
    return found


def places(shape: tuple[int, ...]) -> Iterator[tuple[int, int, slice]]:
    """Yield the batch entry, the head and the rows that are looked at."""
    batch, heads, n, _ = shape
    for b, h in ((0, 0), (batch - 1, heads - 1)):
        for start in (0, n // 2, max(0, n - 8)):
            yield b, h, slice(start, min(start + 8, n))


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `weighed` does; `first` is the number of the first row if causal."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if first is not None:
        rows = first + np.arange(len(q))[:, None]
        scores = np.where(np.arange(len(k)) <= rows, scores, -np.inf)
    return weighed(scores, v, dtype)


def weighed(
    scores: np.ndarray,
    v: np.ndarray,
    dtype: str,
    sink: float = -math.inf,
    kept: np.ndarray | float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of attention in float64 from their scores, and the error allowed in each row.

    Allowed is twice the error of arithmetic that keeps scores and sums in float32 and rounds
    the weights and the result to the dtype, and a floor for rows where that happens to be exact.
    `sink` is a score without a key. Weights are multiplied by `kept` once their sum is taken.
    """
    highest = np.maximum(scores.max(-1, keepdims=True), sink)
    weights, unseen = np.exp(scores - highest), np.exp(sink - highest)
    total = weights.sum(-1, keepdims=True) + unseen
    right = weights * kept @ v / total

    kind, wide = np.dtype(dtype), np.float64 if dtype == "float64" else np.float32
    plain = np.exp((scores - highest).astype(wide))
    sums = plain.sum(-1, keepdims=True) + unseen.astype(wide)
    base = (plain.astype(kind) * kept).astype(wide) @ v.astype(wide) / sums
    error = np.abs(base.astype(kind).astype(np.float64) - right).max(-1, keepdims=True)
    # In half types the rounded weights dominate; in wide ones the scores' own rounding does.
    floor = (0.125 if kind.itemsize == 2 else 8) * float(ml_dtypes.finfo(kind).eps)
    return right, 2 * error + floor * (weights * kept @ np.abs(v) / total).max(-1, keepdims=True)
