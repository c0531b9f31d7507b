"""What a call of cross_entropy or of its backward pass asks for, and the arrays beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Everything about a call but the arrays.

    A *row* is what one loss is taken of: the logits along the axis of classes. Kernels and twin see
    that axis last.
    """

    dtype: str  # of the logits: "float16" "bfloat16" "float32" "float64"
    result: str  # of dlogits: dtype, or "float32" for the two halves
    target: str  # dtype of the targets: "int8" to "uint64"
    shape: tuple[int, ...]  # of the rows: the logits' without the axis of classes
    classes: int
    ignore_index: int | None  # as the 64 bits of an int64
    label_smoothing: float
    reduction: str  # "mean" "sum" "none"

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    @property
    def accumulator(self) -> str:
        """The dtype of losses, of lse and of all sums."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def loss_shape(self) -> tuple[int, ...]:
        return self.shape if self.reduction == "none" else ()


@dataclass
class Operands:
    """The arrays of cross_entropy, all of one library."""

    logits: Any  # [*shape, classes]
    targets: Any  # [*shape]
    lse: Any  # [*shape], written; None if nobody wants it
    loss: Any  # [*shape] or (), written


@dataclass
class BackwardOperands:
    """The arrays of cross_entropy_backward, all of one library."""

    dloss: Any  # [*shape] or (), or a Python float instead of the latter
    logits: Any  # [*shape, classes]
    targets: Any  # [*shape]
    lse: Any  # [*shape]
    out: Any  # [*shape, classes], written; may be the logits
