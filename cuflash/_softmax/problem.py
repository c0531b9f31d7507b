"""What one call asks for: a frozen Problem to plan by, and the arrays beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Everything about a call but the arrays.

    A *row* is what one maximum and one sum are taken over: the elements along `axes` with all other
    indices fixed.
    """

    function: str  # a name of plan.OPERATIONS
    dtype: str  # of x and weights: "float16" "bfloat16" "float32" "float64"
    result: str  # of out and sign: dtype, or "float32" for the two halves
    shape: tuple[int, ...]  # of x, at least one axis
    axes: tuple[int, ...]  # reduced; ascending, not negative
    weighted: bool = False  # a second operand: logsumexp's b, y of the backward passes
    signed: bool = False  # a second result: logsumexp's sign, cross-entropy's sum of the logits

    @property
    def reduces(self) -> bool:
        """Whether a row gives one number (logsumexp) or as many as it has elements."""
        return self.function in ("logsumexp", "cross_entropy")

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that are not reduced."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[axis] for axis in self.kept)

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return math.prod(self.shape[axis] for axis in self.axes)


@dataclass
class Operands:
    """The arrays of a call, all of one library and all with as many axes as `Problem.shape`.

    x and weights have that shape (broadcast ones with strides of 0), and so has out, except that
    logsumexp's out and sign have length 1 along the reduced axes.
    """

    x: Any
    out: Any = None
    weights: Any = None
    sign: Any = None
