"""Packed batches: sequences of many lengths in one call, beside one call for each length."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from itertools import product
from typing import Any

import numpy as np

from . import attention, peers
from .contest import OURS, Entry, Piece, by_pieces
from .timing import Contestant, Stopwatch

UNIT, OVER = "TFLOP/s", "tokens"  # what is reported, and what it is drawn over
SECONDS = 20.0  # for the default sweep; least rounds and the start come on top
BY_LENGTH, PADDED = "by length", "padded"  # our own calls: one for each length, one for all
MEDIAN, OCTAVES, SHORTEST, LONGEST = 512, 1.5, 128, 8192  # tokens of a sequence
MOST = 1.1  # times the time of the calls by length: the project's target


@cache
def draw(tokens: int) -> tuple[slice, ...]:
    """Return where the sequences lie among so many tokens: many short ones, few long ones.

    Lengths are powers of two near log-normal numbers, so that many are equal; what does not fit
    any more is halved until it does.
    """
    random, found, start = np.random.default_rng(2), [], 0
    while start < tokens:
        length = int(MEDIAN * 2.0 ** np.rint(random.normal(0, OCTAVES)))
        length = min(max(length, SHORTEST), LONGEST)
        while length > tokens - start:
            length //= 2
        found.append(slice(start, start + length))
        start += length
    return tuple(found)


def length_of(sequence: slice) -> int:
    return sequence.stop - sequence.start


@dataclass(frozen=True)
class Case:
    """One packed batch, as wide as those of the room of attention."""

    dtype: str
    head_dim: int
    tokens: int
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return max(1, attention.WIDTH // self.head_dim), self.tokens, self.head_dim

    @property
    def lengths(self) -> list[int]:
        return [length_of(sequence) for sequence in draw(self.tokens)]

    @property
    def work(self) -> float:
        heads, _, d = self.shape
        return 4 * heads * d * sum(n * n for n in self.lengths) / (2 if self.causal else 1)

    @property
    def memory(self) -> int:
        """Bytes of device memory: packed, by length, for a peer, and padded."""
        heads, tokens, d = self.shape
        padded = len(self.lengths) * max(self.lengths)
        return (20 * tokens + 5 * padded) * heads * d * np.dtype(self.dtype).itemsize

    def labels(self) -> dict[str, str | int]:
        lengths = {"sequences": len(self.lengths), "longest": max(self.lengths)}
        shape = {"dtype": self.dtype, "d": self.head_dim, OVER: self.tokens}
        return shape | lengths | {"causal": "yes" if self.causal else "no"}

    def build(self, stopwatch: Stopwatch) -> Entry:
        qkv = [stopwatch.normal(self.shape, self.dtype) for _ in range(3)]
        sequences = draw(self.tokens)
        offsets = stopwatch.array(np.cumsum([0, *self.lengths], dtype=np.int32))
        contestants = [
            ours(qkv, offsets, self.causal),
            by_length(qkv, sequences, self.causal),
            padded(stopwatch, qkv, sequences, self.causal),
            *others(qkv, offsets, max(self.lengths), self.causal),
        ]
        judge = by_pieces(pieces(*qkv, sequences, self.causal))
        target = {"target": {"peer": BY_LENGTH, "most": MOST}}
        return Entry(contestants, judge, peers.matmul(stopwatch, self.dtype), notes=target)


def arguments(add: Callable[..., Any]) -> None:
    """Say which options the room takes besides everybody's."""
    add("--dtype", nargs="+", choices=peers.DTYPES)
    add("--tokens", nargs="+", type=int, help=f"in all; multiples of {SHORTEST}")
    add("--d", nargs="+", type=int, help="head dimensions")
    add("--causal", nargs="+", choices=("yes", "no"))


def cases(options: Namespace) -> list[Case]:
    """Return the cases asked for."""
    causals = [c == "yes" for c in options.causal or ("no", "yes")]
    dims = options.d or ((128,) if options.quick else (64, 128))
    tokens = options.tokens or ((16384,) if options.quick else (16384, 65536))
    dtypes = options.dtype or ("bfloat16",)
    return [Case(*case) for case in product(dtypes, dims, tokens, causals)]


def host(stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    return {}  # the room of attention measures it


def ours(qkv: Sequence[Any], offsets: Any, causal: bool) -> Contestant:
    import cuflash

    return Contestant(OURS, lambda: cuflash.attention_varlen(*qkv, offsets, causal=causal))


def by_length(qkv: Sequence[Any], sequences: Sequence[slice], causal: bool) -> Contestant:
    """Return a dense call for the sequences of each length, one after another."""
    import cuflash

    q = qkv[0]
    groups: dict[int, list[slice]] = {}
    for sequence in sequences:
        groups.setdefault(length_of(sequence), []).append(sequence)
    batches = [[batch(x, group, length) for x in qkv] for length, group in groups.items()]

    def view(results: list[Any]) -> Any:
        together = q.copy()
        for group, result in zip(groups.values(), results):
            unbatch(result, group, together)
        return together

    def call() -> list[Any]:
        return [cuflash.attention(*each, causal=causal) for each in batches]

    return Contestant(BY_LENGTH, call, view=view)


def padded(
    stopwatch: Stopwatch, qkv: Sequence[Any], sequences: Sequence[slice], causal: bool
) -> Contestant:
    """Return one dense call, every sequence as long as the longest."""
    import cuflash

    lengths = [length_of(sequence) for sequence in sequences]
    arrays = [batch(x, sequences, max(lengths)) for x in qkv]
    asked = {"kv_lengths": stopwatch.array(np.array(lengths, np.int32)), "causal": causal}
    return Contestant(
        PADDED,
        lambda: cuflash.attention(*arrays, q_start=0, **asked),
        view=lambda result: unbatch(result, sequences, qkv[0].copy()),
    )


def batch(x: Any, sequences: Sequence[slice], length: int) -> Any:
    """Copy sequences of (heads, tokens, d) into a batch; padding repeats the first token."""
    y = x[None, :, :1].repeat(len(sequences), 0).repeat(length, 2)
    for row, sequence in zip(y, sequences):
        row[:, : length_of(sequence)] = x[:, sequence]
    return y


def unbatch(y: Any, sequences: Sequence[slice], x: Any) -> Any:
    """Copy a batch into (heads, tokens, d), and return that."""
    for row, sequence in zip(y, sequences):
        x[:, sequence] = row[:, : length_of(sequence)]
    return x


def others(qkv: Sequence[Any], offsets: Any, longest: int, causal: bool) -> list[Contestant]:
    """Return FlashAttention-2 as PyTorch has it, and FlashAttention-4."""
    if not peers.torch_with_gpu():
        return []
    found = []
    if second := getattr(peers.find("torch.nn.attention.varlen"), "varlen_attn", None):
        asked = {"window_size": (-1, 0 if causal else -1)}
        if "is_causal" in signature(second).parameters:  # as it was called at first
            asked = {"is_causal": causal}
        call = partial(_by_position, second, longest, asked)
        found.append(_packed_by_torch("FA2", call, qkv, offsets))
    if fourth := getattr(peers.find("flash_attn.cute.interface"), "flash_attn_varlen_func", None):
        call = partial(_by_name, fourth, longest, causal)
        found.append(_packed_by_torch("FA4", call, qkv, offsets))
    return found


def _by_position(
    function: Callable[..., Any], n: int, asked: dict[str, Any], qkv: list[Any], offsets: Any
) -> Any:
    return function(*qkv, offsets, offsets, n, n, **asked)


def _by_name(
    function: Callable[..., Any], n: int, causal: bool, qkv: list[Any], offsets: Any
) -> Any:
    ends = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    return function(*qkv, **ends, max_seqlen_q=n, max_seqlen_k=n, causal=causal)


def _packed_by_torch(
    name: str, function: Callable[[list[Any], Any], Any], qkv: Sequence[Any], offsets: Any
) -> Contestant:
    # Their layout is (tokens, heads, d): they get that, not a transpose in their time.
    tensors = cache(lambda: [peers.as_torch(x).transpose(0, 1).contiguous() for x in qkv])
    ends = cache(lambda: peers.as_torch(offsets))

    def output(result: Any) -> Any:
        return (result[0] if isinstance(result, tuple) else result).transpose(0, 1)

    return Contestant(name, lambda: function(tensors(), ends()), view=output)


def pieces(q: Any, k: Any, v: Any, sequences: Sequence[slice], causal: bool) -> list[Piece]:
    """Return rows of the shortest, of the longest and of the last sequence: the first, the last."""
    found = []
    chosen = min(sequences, key=length_of), max(sequences, key=length_of), sequences[-1]
    for sequence in chosen:
        length = length_of(sequence)
        for h in (0, len(q) - 1):
            keys, values = peers.to_host(k[h, sequence]), peers.to_host(v[h, sequence])
            for first in (0, length - 8):
                place = h, slice(sequence.start + first, sequence.start + first + 8)
                queries = peers.to_host(q[place])
                right = attention.reference(
                    queries, keys, values, first if causal else None, str(q.dtype)
                )
                found.append((place, *right))
    return found
