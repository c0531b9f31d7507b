"""The runtime tables of FlashAttention, and cuflash among what PyTorch has today.

T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re, arXiv:2205.14135, Appendix E: forward, float16, a batch
of 16, 8 heads of 64, with and without dropout of 0.1 and a padding mask.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from . import blocks, dropout, peers, variants
from .contest import OURS, Entry, Judge, by_pieces
from .timing import Contestant, Stopwatch
from .variant_peers import Rule

UNIT, OVER = "ms", "N"  # what is reported, and what it is drawn over
SECONDS = 45.0  # for the default sweep; least rounds and the start come on top
DTYPE, BATCH, HEADS, HEAD_DIM = "float16", 16, 8, 64
LENGTHS = tuple(128 << i for i in range(10))  # to 64k
RATE, SEED, PADDING = 0.1, 123, 20  # of dropout; at most so many keys of a sequence are padding
STANDARD, SPARSE = "PyTorch standard", f"{OURS} block-sparse"
BACKENDS = {
    "FA2": "FLASH_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "mem-efficient": "EFFICIENT_ATTENTION",
}


@dataclass(frozen=True)
class Case:
    """One column of one of the paper's tables."""

    length: int
    rate: float
    padded: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return BATCH, HEADS, self.length, HEAD_DIM

    @property
    def work(self) -> float:
        return 4 * math.prod(self.shape) * self.length

    @property
    def memory(self) -> int:
        """Bytes of device memory: q, k, v, everybody's answers. Who holds scores asks for them."""
        return 10 * math.prod(self.shape) * np.dtype(DTYPE).itemsize

    @property
    def lengths(self) -> np.ndarray | None:
        """How many keys of each sequence are no padding, if any is."""
        if not self.padded:
            return None
        padding = np.random.default_rng(0).integers(PADDING, size=BATCH, endpoint=True)
        return (self.length - padding).astype(np.int32)

    @property
    def blocks(self) -> np.ndarray:
        """The block-sparse pattern of all heads."""
        import cuflash

        count = -(-self.length // blocks.SIZE)
        return cuflash.BlockMask.butterfly(count, count)[None]

    def labels(self) -> dict[str, str | int]:
        kinds = [name for name, there in (("dropout", self.rate), ("mask", self.padded)) if there]
        return {"call": " and ".join(kinds) or "neither dropout nor mask", OVER: self.length}

    def build(self, stopwatch: Stopwatch) -> Entry:
        import cuflash

        qkv = [stopwatch.normal(self.shape, DTYPE) for _ in range(3)]
        asked: dict[str, Any] = {"dropout": self.rate, "seed": SEED} if self.rate else {}
        if self.padded:
            asked["kv_lengths"] = stopwatch.array(self.lengths)
        us, kernel = variants.ours(qkv, asked, None)
        here = cuflash.BlockMask(stopwatch.array(self.blocks), blocks.SIZE)
        sparse = replace(variants.ours(qkv, asked | {"variant": here}, None)[0], name=SPARSE)
        return Entry(
            [us, *self.others(stopwatch, qkv)],
            self.judge(qkv),
            peers.matmul(stopwatch, DTYPE),
            unlike=(sparse, self.judge(qkv, self.blocks)),
            notes={"kernel": kernel, "density": float(self.blocks.mean())},
        )

    def judge(self, qkv: list[Any], there: np.ndarray | None = None) -> Judge:
        """Judge by rows in float64; where weights are dropped, by chance."""
        lengths = np.full(BATCH, self.length) if self.lengths is None else self.lengths

        def mask(b: int, h: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
            shown = j < lengths[b]
            return shown if there is None else shown & seen(b, h, i, j)

        seen = None if there is None else blocks.seen(there, blocks.SIZE).mask
        rule = Rule(mask=mask)
        if self.rate:
            return dropout.by_chance(variants.scored(*qkv, rule), DTYPE, self.rate)
        return by_pieces(variants.pieces(*qkv, rule))

    def others(self, stopwatch: Stopwatch, qkv: list[Any]) -> list[Contestant]:
        """Return standard attention, and the fused kernels that take this."""
        if not peers.torch_with_gpu():
            return []
        mask = None
        if self.lengths is not None:
            seen = np.arange(self.length) < self.lengths[:, None, None, None]
            mask = stopwatch.array(seen)
        fused = [
            peers.sdpa(name, backend, *qkv, mask=mask, dropout=self.rate)
            for name, backend in BACKENDS.items()
            if not (self.padded and name == "FA2")  # which takes no mask
        ]
        return [standard(qkv, mask, self.rate, stopwatch.free_memory()), *fused]


def standard(qkv: list[Any], mask: Any, rate: float, free: int) -> Contestant:
    """Return attention as PyTorch's users write it: product, softmax, dropout, product.

    It is not tried where the scores, the weights and what dropout keeps would leave no memory.
    """
    torch = peers.torch_with_gpu()
    softmax, drop = torch.nn.functional.softmax, torch.nn.functional.dropout
    tensors = cache(lambda: [peers.as_torch(x) for x in qkv])
    hidden = cache(lambda: ~peers.as_torch(mask))
    batch, heads, n, d = qkv[0].shape
    scores_bytes = batch * heads * n * n * qkv[0].itemsize

    def call() -> Any:
        if 2.5 * scores_bytes > 0.9 * free:
            raise MemoryError(f"the scores alone are {scores_bytes / 2**30:.3g} GiB")
        q, k, v = tensors()
        scores = (q / math.sqrt(d)) @ k.transpose(-1, -2)
        if mask is not None:
            scores.masked_fill_(hidden(), -math.inf)
        weights = softmax(scores, dim=-1)
        del scores
        return (drop(weights, rate) if rate else weights) @ v

    return Contestant(STANDARD, call)


def arguments(add: Callable[..., Any]) -> None:
    """Say which options the room takes besides everybody's."""
    add("--n", nargs="+", type=int, help="lengths of the sequences")


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; the long ones last, which need more time than their share."""
    lengths = options.n or ((1024, 4096) if options.quick else LENGTHS)
    kinds = product((RATE, 0.0), (True, False))
    return [Case(n, *kind) for n, kind in product(lengths, list(kinds))]


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    return {}  # the paper measured none
