"""Axes as kernels walk them: as few as the strides of all arrays allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def fold(
    shape: Sequence[int], strides: Sequence[Sequence[int]], axes: Sequence[int]
) -> tuple[tuple[int, ...], list[list[int]]]:
    """Join those of `axes` that all arrays walk as one.

    Returns sizes and, for each array, strides; at least one of each. The axes' order must mean
    nothing to the caller: they are put in the order in which the first array lies in memory.
    """

    def density(axis: int) -> int:
        return next((abs(array[axis]) for array in strides if array[axis]), 0)

    sizes: list[int] = []
    folded: list[list[int]] = [[] for _ in strides]
    for axis in sorted((a for a in axes if shape[a] != 1), key=density, reverse=True):
        size, steps = shape[axis], [array[axis] for array in strides]
        if sizes and all(array[-1] == size * step for array, step in zip(folded, steps)):
            sizes[-1] *= size
            for array, step in zip(folded, steps):
                array[-1] = step
        else:
            sizes.append(size)
            for array, step in zip(folded, steps):
                array.append(step)
    if not sizes:
        return (1,), [[0] for _ in strides]
    return tuple(sizes), folded


def address(array: Any) -> int:
    """Where the first element of a NumPy or CuPy array lies."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def in_elements(array: Any) -> bool:
    """Whether address and strides are whole numbers of elements; fields of records may not be."""
    return all(distance % array.itemsize == 0 for distance in (address(array), *array.strides))
