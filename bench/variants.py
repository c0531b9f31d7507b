"""Variants of attention: scores capped, biased or hidden, weights dropped, beside their peers."""

import math
import re
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from . import attention, dropout, first_call, peers, variant_peers
from .contest import OURS, Entry, Judge, Piece, by_pieces
from .timing import Contestant, Stopwatch
from .variant_peers import FLEX, Rule

UNIT, OVER = "TFLOP/s", "N"  # what is reported, and what it is drawn over
SECONDS = 190.0  # for the default sweep; least rounds and the start come on top
SECONDS_A_CASE = 4.0  # of a part of it: most of that is FlexAttention's compiler
PLAIN = "plain"  # our own call without the variant, which hides what causal and window hide
LENGTHS, SHAPE_OF_TARGETS = (1024, 4096, 16384), (128, 4096)
WINDOW, CAP, DOCUMENTS, SEEN = 512, 30.0, 8, 0.9
RATE, SEED = 0.1, 123  # of dropout
MASKING = ("cuDNN", "CUDNN_ATTENTION"), ("mem-efficient", "EFFICIENT_ATTENTION")
DROPPING = ("FA2", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION")
PLAIN_PEERS = ("FA2", "cuDNN", "JAX cuDNN")

# How many scores of a head are seen, of (batch, n): a causal half as in the room of attention.
Count = Callable[[int, int], float]


@dataclass(frozen=True)
class Variant:
    """What cuflash is asked for, and what that means.

    Parameters
    ----------
    rule : callable
        From a tanh and the arrays to the Rule, in any library.
    draw : callable
        From a stopwatch, q's shape and a dtype to the arrays.
    plain : dict
        Keywords of cuflash.attention that the plain call beside it has, too.
    more : callable
        From the arrays to further keywords.
    count : callable
    target : (str, float) or None
        A peer, or several with commas between, and how many times its speed the project wants.
    by_batch, capped, masks : bool
        Whether batch entries have masks of their own; whether tanh is used; whether the one array
        is what others take as a mask.
    dropout : float
        The probability with which a weight is dropped.
    """

    rule: Callable[..., Rule]
    draw: Callable[..., tuple[Any, ...]] = lambda stopwatch, shape, dtype: ()
    plain: tuple[tuple[str, Any], ...] = ()
    more: Callable[..., dict[str, Any]] | None = None
    count: Count = lambda batch, n: batch * n * n
    target: tuple[str, float] | None = None
    by_batch: bool = False
    capped: bool = False
    masks: bool = False
    dropout: float = 0.0


def half(batch: int, n: int) -> float:
    return batch * n * n / 2


def banded(batch: int, n: int) -> float:
    return batch * sum(min(i, WINDOW) + 1 for i in range(n))


def in_documents(batch: int, n: int) -> float:
    return float(sum((np.bincount(row) ** 2).sum() for row in documents(batch, n))) / 2


def documents(batch: int, n: int) -> np.ndarray:
    """Return the document of each token: 8 in a sequence on average, of any length."""
    starts = np.random.default_rng(0).random((batch, n)) < DOCUMENTS / n
    return starts.cumsum(-1, dtype=np.int32)


# What variants mean: once as the reference evaluates it, once as FlexAttention compiles it.


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j <= i) & (i - j <= WINDOW)


def softcap(tanh: Callable[[Any], Any], mask: Any = None) -> Rule:
    return Rule(lambda score, b, h, i, j: CAP * tanh(score / CAP), mask)


def alibi(tanh: Any, slopes: Any) -> Rule:
    return Rule(lambda score, b, h, i, j: score - slopes[h] * abs(i - j), causal)


def biased(tanh: Any, bias: Any) -> Rule:
    return Rule(lambda score, b, h, i, j: score + bias[h, i, j])


def masked(tanh: Any, mask: Any) -> Rule:
    return Rule(mask=lambda b, h, i, j: mask[0, i, j])


def sunk(tanh: Any, sinks: Any) -> Rule:
    return Rule(mask=causal, sinks=sinks)


def of_documents(tanh: Any, doc: Any) -> Rule:
    return Rule(mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (j <= i))


def relative(tanh: Any, table: Any) -> Rule:
    n = table.shape[-1] // 2
    return Rule(lambda score, b, h, i, j: score + table[h, j - i + n])


# The arrays.


def draw_slopes(stopwatch: Stopwatch, shape: tuple[int, ...], dtype: str) -> tuple[Any]:
    heads = shape[1]
    slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
    return (stopwatch.array(slopes.astype(np.float32)),)


def draw_bias(stopwatch: Stopwatch, shape: tuple[int, ...], dtype: str) -> tuple[Any]:
    return (stopwatch.normal((shape[1], shape[2], shape[2]), dtype),)


def draw_mask(stopwatch: Stopwatch, shape: tuple[int, ...], dtype: str) -> tuple[Any]:
    below = 1.2815515655446004  # of so many normal numbers, 9 in 10
    return (stopwatch.normal((1, shape[2], shape[2]), "float32") < below,)


def draw_sinks(stopwatch: Stopwatch, shape: tuple[int, ...], dtype: str) -> tuple[Any]:
    return (stopwatch.normal((shape[1],), "float32"),)


def draw_documents(stopwatch: Stopwatch, shape: tuple[int, ...], dtype: str) -> tuple[Any]:
    return (stopwatch.array(documents(shape[0], shape[2])),)


def draw_table(stopwatch: Stopwatch, shape: tuple[int, ...], dtype: str) -> tuple[Any]:
    return (stopwatch.normal((shape[1], 2 * shape[2]), dtype),)


def own(expressions: dict[str, str], **arrays: Any) -> dict[str, Any]:
    """Return the keyword for a score or a mask of the user's."""
    import cuflash

    return {"variant": cuflash.Variant(**expressions)(**arrays)}


CAUSAL = (("causal", True),)
SAME_DOCUMENT = {"mask": "doc[b, i] == doc[b, j]"}
RELATIVE = {"score": "score + table[h, j - i + len_k]"}
VARIANTS = {
    "none": Variant(lambda tanh: Rule(), target=(FLEX, 1.3)),
    "causal": Variant(lambda tanh: Rule(mask=causal), plain=CAUSAL, count=half, target=(FLEX, 1.3)),
    "window": Variant(
        lambda tanh: Rule(mask=window),
        plain=(*CAUSAL, ("window", WINDOW)),
        count=banded,
        target=(FLEX, 1.3),
    ),
    "softcap": Variant(softcap, more=lambda: {"softcap": CAP}, target=(FLEX, 2.0), capped=True),
    "softcap causal": Variant(
        partial(softcap, mask=causal),
        plain=CAUSAL,
        more=lambda: {"softcap": CAP},
        count=half,
        target=(FLEX, 2.0),
        capped=True,
    ),
    "ALiBi causal": Variant(
        alibi,
        draw_slopes,
        CAUSAL,
        lambda slopes: {"alibi": slopes},
        count=half,
        target=(FLEX, 1.3),
    ),
    "bias": Variant(
        biased,
        draw_bias,
        more=lambda bias: {"bias": bias},
        target=("cuDNN", 1.5),
        masks=True,
    ),
    "mask": Variant(
        masked,
        draw_mask,
        more=lambda mask: {"mask": mask},
        count=lambda batch, n: SEEN * batch * n * n,
        masks=True,
    ),
    "sinks causal": Variant(sunk, draw_sinks, CAUSAL, lambda sinks: {"sinks": sinks}, count=half),
    "documents causal": Variant(
        of_documents,
        draw_documents,
        CAUSAL,
        lambda doc: own(SAME_DOCUMENT, doc=doc),
        count=in_documents,
        by_batch=True,
    ),
    "relative bias": Variant(relative, draw_table, more=lambda table: own(RELATIVE, table=table)),
    f"dropout {RATE:g}": Variant(
        lambda tanh: Rule(),
        more=lambda: {"dropout": RATE, "seed": SEED},
        target=("FA2, cuDNN", 1.3),
        dropout=RATE,
    ),
}


@dataclass(frozen=True)
class Case:
    """One variant of one shape of the room of attention."""

    dtype: str
    head_dim: int
    length: int
    variant: str
    engine: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return attention.Case(self.dtype, self.head_dim, self.length, False).shape

    @property
    def work(self) -> float:
        batch, heads, n, d = self.shape
        return 4 * heads * d * VARIANTS[self.variant].count(batch, n)

    @property
    def memory(self) -> int:
        """Bytes of device memory: q, k, v, everybody's answers, and what is len_q x len_k."""
        _, heads, n, _ = self.shape
        size = np.dtype(self.dtype).itemsize
        # Block masks are made of indices of 8 bytes and their comparisons.
        dense = size * heads if self.variant == "bias" else 32
        return 10 * math.prod(self.shape) * size + dense * n * n

    def labels(self) -> dict[str, str | int]:
        engine = {} if self.engine is None else {"engine": self.engine}
        shape = {"dtype": self.dtype, "d": self.head_dim, "N": self.length}
        return engine | shape | {"variant": self.variant}

    def build(self, stopwatch: Stopwatch) -> Entry:
        compile_ahead(stopwatch, self.dtype, self.head_dim, self.engine)
        variant = VARIANTS[self.variant]
        qkv = [stopwatch.normal(self.shape, self.dtype) for _ in range(3)]
        arrays = variant.draw(stopwatch, self.shape, self.dtype)
        asked = keywords(variant, arrays)
        us, kernel = ours(qkv, asked, self.engine)
        on_host = [Rows(x) if x.ndim == 3 else peers.to_host(x) for x in arrays]
        rule = variant.rule(np.tanh, *on_host)
        judge = by_pieces(pieces(*qkv, rule))
        if variant.dropout:
            judge = self.judge_dropout(stopwatch, qkv, rule, asked)
        contestants = [us, *others(variant, qkv, arrays)]
        if not variant.more:
            contestants += plain_peers(qkv, **dict(variant.plain))
        return Entry(
            contestants,
            judge,
            peers.matmul(stopwatch, self.dtype),
            unlike=self.without(qkv) if variant.more else None,
            notes={"kernel": kernel} | self.target(),
        )

    def judge_dropout(
        self, stopwatch: Stopwatch, qkv: list[Any], rule: Rule, asked: dict[str, Any]
    ) -> Judge:
        """Judge ourselves by what our seed drops, and peers by chance."""
        *qk, v = qkv
        rows, rate = scored(*qkv, rule), VARIANTS[self.variant].dropout

        def with_values(values: Any) -> Contestant:
            return ours([*qk, values], asked, self.engine)[0]

        exactly = dropout.by_kept_weights(rows, v, rate, with_values, stopwatch)
        by_chance = dropout.by_chance(rows, self.dtype, rate)
        return lambda result, strictly: (exactly if strictly else by_chance)(result, strictly)

    def without(self, qkv: list[Any]) -> tuple[Contestant, Judge]:
        """Return our own plain call, and its judge."""
        plain = dict(VARIANTS[self.variant].plain)
        us, _ = ours(qkv, plain, self.engine)
        return replace(us, name=PLAIN), by_pieces(attention.pieces(*qkv, "causal" in plain))

    def target(self) -> dict[str, Any]:
        """Return what the project wants at this shape, for the JSON file."""
        target = VARIANTS[self.variant].target
        if target is None or (self.head_dim, self.length) != SHAPE_OF_TARGETS:
            return {}
        return {"target": {"peer": target[0], "least": target[1]}}


def arguments(add: Callable[..., Any]) -> None:
    """Say which options the room takes besides everybody's."""
    add("--dtype", nargs="+", choices=peers.DTYPES)
    add("--n", nargs="+", type=int, help="lengths of the sequences")
    add("--d", nargs="+", type=int, help="head dimensions")
    add("--variant", nargs="+", choices=VARIANTS)
    add("--engine", choices=("sm90", "portable"), help="half types only; by default the GPU's own")


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for; by default a head dimension of 64 at one length only."""
    dims = options.d or ((128,) if options.quick else (128, 64))
    lengths = options.n or ((4096,) if options.quick else LENGTHS)
    shapes = list(product(dims, lengths))
    if not (options.d or options.n):
        shapes = [(d, n) for d, n in shapes if d != 64 or n == 4096]
    names, dtypes = options.variant or VARIANTS, options.dtype or ("bfloat16",)
    return [
        Case(dtype, *shape, name, options.engine)
        for dtype, shape, name in product(dtypes, shapes, names)
    ]


def keywords(variant: Variant, arrays: tuple[Any, ...]) -> dict[str, Any]:
    """Return what cuflash.attention is asked for."""
    return dict(variant.plain) | (variant.more(*arrays) if variant.more else {})


@cache
def compile_ahead(stopwatch: Stopwatch, dtype: str, head_dim: int, engine: str | None) -> None:
    """Compile our kernels of all variants side by side; they are the same at every length."""
    shape, jobs = (1, 2, 128, head_dim), []
    for variant in VARIANTS.values():
        qkv = [stopwatch.normal(shape, dtype) for _ in range(3)]
        arrays = variant.draw(stopwatch, shape, dtype)
        jobs.append(partial(explained, qkv, keywords(variant, arrays)))
    with attention.only(engine), ThreadPoolExecutor() as pool:
        for job in jobs:
            pool.submit(job)  # what fails here fails again, and is told, in its own case


def ours(qkv: list[Any], asked: dict[str, Any], engine: str | None) -> tuple[Contestant, str]:
    """Return cuflash's call, and the kernel that it runs."""
    import cuflash

    us = Contestant(OURS, lambda: cuflash.attention(*qkv, **asked))
    with attention.only(engine):
        explanation = explained(qkv, asked)
    kernels = re.findall(r"kernel +(\S+)", explanation)  # the last one is attention's own
    us = attention.with_engine(us, engine, lambda: explanation)
    return us, kernels[-1] if kernels else "NumPy"


def explained(qkv: list[Any], asked: dict[str, Any]) -> str:
    import cuflash

    return cuflash.explain(cuflash.attention, *qkv, **asked)


def plain_peers(
    qkv: list[Any], causal: bool = False, window: int | None = None
) -> list[Contestant]:
    """Return some peers of the room of attention, which know no window."""
    found = peers.attention(*qkv, causal=causal) if window is None else []
    return [peer for peer in found if peer.name in PLAIN_PEERS]


def others(variant: Variant, qkv: list[Any], arrays: tuple[Any, ...]) -> list[Contestant]:
    """Return FlexAttention, and whoever takes the array as a mask; it has no dropout, others do."""
    if not peers.torch_with_gpu():
        return []
    if variant.dropout:
        return [peers.sdpa(*backend, *qkv, dropout=variant.dropout) for backend in DROPPING]
    found = variant_peers.flex(
        qkv, variant.rule, arrays, by_batch=variant.by_batch, capped=variant.capped
    )
    if variant.masks:
        found += [peers.sdpa(*backend, *qkv, False, mask=arrays[0][None]) for backend in MASKING]
    return found


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    return {"the first with a new expression": first_call.seconds()}


class Rows:
    """An array (heads, len_q, len_k) on the device: of what is looked up, rows go to the host."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __getitem__(self, place: tuple[int, np.ndarray, np.ndarray]) -> np.ndarray:
        h, rows, keys = place
        first, last = int(rows.min()), int(rows.max())
        return peers.to_host(self.array[h, first : last + 1])[rows - first, keys]


def pieces(q: Any, k: Any, v: Any, rule: Rule) -> list[Piece]:
    """Return a few rows of the first and of the last head."""
    found = []
    for place, scores, values in scored(q, k, v, rule):
        sink = -math.inf if rule.sinks is None else rule.sinks[place[1]]
        found.append((place, *attention.weighed(scores, values, str(q.dtype), sink)))
    return found


def scored(q: Any, k: Any, v: Any, rule: Rule) -> list[dropout.Row]:
    """Return where these rows are, their scores, and the values of their keys."""
    found = []
    for b, h, rows in attention.places(q.shape):
        queries, keys, values = (peers.to_host(x) for x in (q[b, h, rows], k[b, h], v[b, h]))
        i, j = np.arange(rows.start, rows.stop)[:, None], np.arange(len(keys))
        scores = queries @ keys.T / math.sqrt(q.shape[-1])
        if rule.score:
            scores = rule.score(scores, b, h, i, j)
        if rule.mask:
            scores = np.where(rule.mask(b, h, i, j), scores, -np.inf)
        found.append(((b, h, rows), scores, values))
    return found
