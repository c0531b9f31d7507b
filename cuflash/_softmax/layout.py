"""Where the elements of a call lie: its axes, folded to the few that need a stride of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..jit.strides import address, fold
from .problem import Operands, Problem

MAX_AXES = 4  # as in layout.cuh


@dataclass(frozen=True)
class Placement:
    """How one array is walked. Strides are in elements, those of the last axes last."""

    outer: tuple[int, ...]
    reduced: tuple[int, ...]
    itemsize: int
    phase: int  # its address modulo 16

    @property
    def alignment(self) -> int:
        """The power of two that divides the address, in bytes, at most 16."""
        return math.gcd(self.phase, 16)


@dataclass(frozen=True)
class Layout:
    """The folded axes: `outer` ones tell rows apart, `reduced` ones the elements of a row.

    Both have from 1 to `MAX_AXES` axes unless the layout does not fold that far (`fits`). The last
    axis of each is the one along which x lies densest.
    """

    outer: tuple[int, ...]
    reduced: tuple[int, ...]
    x: Placement
    out: Placement
    weights: Placement | None = None
    sign: Placement | None = None

    @property
    def rows(self) -> int:
        return math.prod(self.outer)

    @property
    def columns(self) -> int:
        return math.prod(self.reduced)

    @property
    def fits(self) -> bool:
        return len(self.outer) <= MAX_AXES and len(self.reduced) <= MAX_AXES

    @property
    def placements(self) -> tuple[Placement, ...]:
        return tuple(p for p in (self.x, self.out, self.weights, self.sign) if p is not None)


def of(problem: Problem, operands: Operands) -> Layout:
    """Fold the axes of a call whose operands are complete."""
    arrays = {name: array for name, array in vars(operands).items() if array is not None}
    strides = []
    for name, array in arrays.items():
        strides.append([stride // array.itemsize for stride in array.strides])
        if problem.reduces and name in ("out", "sign"):  # they stand still along a row
            strides[-1] = [0 if axis in problem.axes else s for axis, s in enumerate(strides[-1])]
    outer, outer_strides = fold(problem.shape, strides, problem.kept)
    reduced, reduced_strides = fold(problem.shape, strides, problem.axes)
    placements = {
        name: Placement(tuple(across), tuple(along), array.itemsize, address(array) % 16)
        for (name, array), across, along in zip(arrays.items(), outer_strides, reduced_strides)
    }
    return Layout(outer, reduced, **placements)
