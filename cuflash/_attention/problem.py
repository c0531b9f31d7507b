"""What one call of attention asks for: a frozen Problem to plan by, and the arrays beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .dropout import Dropout
from .variants.program import Program, program

PLAIN = program(())


def sum_dtype(dtype: str) -> str:
    """Return what scores and sums are kept in for inputs of this dtype; lse shows them as is."""
    return "float64" if dtype == "float64" else "float32"


@dataclass(frozen=True)
class Problem:
    """Everything about a call but the arrays: hashable, so that plans can be cached by it.

    Row ``i`` of batch entry ``b`` sees the keys ``j`` in
    ``[max(0, i + start - left), min(length, i + start + right + 1))``, where ``length`` is
    ``kv_lengths[b]`` (``len_k`` without) and ``start`` is ``q_start`` or else ``length - len_q``.
    ``causal`` is folded into ``right``; a side that bounds nothing is None.

    With ``varlen`` the one batch axis is that of sequences, which lie behind one another in packed
    arrays of ``len_q`` rows and ``len_k`` keys in all: where each begins is in arrays.
    """

    dtype: str  # "float16" "bfloat16" "float32" "float64"
    batch: tuple[int, ...]  # the batch axes of q, k and v, broadcast
    heads: int  # a multiple of kv_heads
    kv_heads: int
    len_q: int
    len_k: int
    head_dim: int
    head_dim_v: int
    scale: float
    left: int | None
    right: int | None
    q_start: int | None  # None: the queries are the last rows, or see q_start_array
    q_start_array: bool
    kv_lengths_array: bool
    precision: str | None  # None, or "tf32" for float32
    return_lse: bool
    variant: Program = PLAIN
    varlen: bool = False
    dropout: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.lse_shape, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (*(() if self.varlen else self.batch), self.heads, self.len_q)

    @property
    def lse_dtype(self) -> str:
        return sum_dtype(self.dtype)


@dataclass(frozen=True)
class BlockProblem:
    """Which blocks of a mask are asked about, as kinds: 0 empty, 1 partial, 2 whole."""

    dtype: str  # of the inputs, for which real numbers are computed
    batch: int  # entries and heads that have blocks of their own
    heads: int
    len_q: int
    len_k: int
    q_start: int
    size: tuple[int, int]  # queries and keys of a block
    variant: Program  # masks alone

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the kinds: batch, heads, and blocks of queries and of keys."""
        n_q, n_k = (-(-n // size) for n, size in zip((self.len_q, self.len_k), self.size))
        return self.batch, self.heads, n_q, n_k


@dataclass
class Operands:
    """The arrays of a call, all of one library, with every axis the Problem names.

    Batch axes are broadcast by strides of 0; nothing has been copied, so strides are the caller's.
    ``out`` and ``lse`` stand ready once api.allocate has been called. Packed outputs have no batch
    axes.
    """

    q: Any  # [*batch, heads, len_q, head_dim]
    k: Any  # [*batch, kv_heads, len_k, head_dim]
    v: Any  # [*batch, kv_heads, len_k, head_dim_v]
    out: Any = None  # [*batch, heads, len_q, head_dim_v], the inputs' dtype or float32
    lse: Any = None  # [*batch, heads, len_q], or None when not wanted
    q_start: Any = None  # [*batch], any integer dtype, or None
    kv_lengths: Any = None  # [*batch], any integer dtype, or None
    q_offsets: Any = (
        None  # [batch + 1], any integer dtype: where sequences begin; None but for varlen
    )
    k_offsets: Any = None
    # Of the slots of Problem.variant: numbers, and arrays of the indexed axes, maybe after [*batch]
    values: tuple[Any, ...] = ()
    dropout: Dropout | None = None  # where Problem.dropout
    one_head: bool = False  # the caller's arrays are 2-D, without the axis of heads
    given: tuple[Any, Any] = (None, None)  # the outputs that the caller passed, with their axes
