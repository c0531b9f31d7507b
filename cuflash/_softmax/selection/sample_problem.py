"""What one call of `sample` asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """Everything about a call but the logits.

    Filters that keep everything are None here: a ``top_k`` of all columns, a ``top_p`` of 1, a
    ``min_p`` of 0.
    """

    dtype: str  # of the logits: "float16" "bfloat16" "float32" "float64"
    shape: tuple[int, ...]  # of the logits, at least one axis
    axis: int  # not negative
    seed: int
    offset: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The answer's axes."""
        return tuple(axis for axis in range(len(self.shape)) if axis != self.axis)

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer's shape."""
        return tuple(self.shape[axis] for axis in self.kept)

    @property
    def rows(self) -> int:
        return math.prod(self.answer)

    @property
    def columns(self) -> int:
        return self.shape[self.axis]

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether a token that was drawn may be turned down."""
        return self.top_p is not None or self.min_p is not None

    @property
    def scale(self) -> float:
        """log2(e) / temperature: a token's weight is 2 ** ((logit - largest) * scale).

        Kept finite and normal in the accumulator: 0 * inf and -inf * 0 are NaN.
        """
        limits = np.finfo(np.float64 if self.dtype == "float64" else np.float32)
        scale = math.log2(math.e) / self.temperature if self.temperature > 1e-300 else math.inf
        return min(max(scale, float(limits.tiny)), float(limits.max))

    @property
    def least(self) -> float:
        """The exponent of the least weight that ``min_p`` keeps."""
        return -math.inf if self.min_p is None else math.log2(self.min_p)
