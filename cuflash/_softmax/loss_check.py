"""The checks of cross-entropy's own arguments: what came, and what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from . import check

REDUCTIONS = ("mean", "sum", "none")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def class_axis(axis: Any, logits: Any) -> int:
    found = check.one_axis("`logits`", axis, logits.ndim)
    if logits.ndim == 0:
        raise ValueError("`logits` must have an axis of classes, but has no axes")
    if logits.shape[found] == 0:
        raise ValueError(f"`logits` must have at least one class, but its shape is {logits.shape}")
    return found


def targets(native: Any, shape: tuple[int, ...]) -> str:
    """Check the array, not its values; its dtype."""
    dtype = arrays.dtype_name(native.dtype)
    if dtype not in INTEGERS:
        raise TypeError(f"`targets` must be of an integer dtype, not {dtype}")
    rows("targets", native, shape)
    return dtype


def rows(name: str, native: Any, shape: tuple[int, ...]) -> None:
    if native.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of logits without `axis`, {shape}, not {native.shape}"
        )


def ignore_index(value: Any, dtype: str) -> int | None:
    """The target to ignore as an int64 has its bits; None if no target of this dtype can be it."""
    if value is None:
        return None
    index = check.integer(value)
    if index is None:
        raise TypeError(f"`ignore_index` must be an int or None, not {value!r}")
    limits = np.iinfo(dtype)
    if not limits.min <= index <= limits.max:
        return None
    return index if index < 2**63 else index - 2**64


def label_smoothing(value: Any) -> float:
    if not check.is_number(value):
        raise TypeError(f"`label_smoothing` must be a number from 0 to 1, not {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"`label_smoothing` must be from 0 to 1, not {value!r}")
    return float(value)


def reduction(value: Any) -> str:
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none', not {value!r}")
    return value


def dloss(given: Any, native: Any, shape: tuple[int, ...]) -> None:
    """Check the gradient of the loss: an array of the loss's shape, or a number for one without."""
    if native is None:
        if shape != ():
            raise TypeError(f"`dloss` must be an array of shape {shape}, not {given!r}")
    elif native.shape != shape:
        raise ValueError(f"`dloss` must have the loss's shape {shape}, not {native.shape}")


def values(native: Any, classes: int, ignored: int | None) -> None:
    """Look at the targets, which waits for a GPU."""
    as_indices = native.astype(np.int64)
    wrong = (as_indices < 0) | (as_indices >= classes)
    if ignored is not None:
        wrong &= as_indices != ignored
    if wrong.any():
        unless = "" if ignored is None else f" or `ignore_index`, {ignored}"
        raise ValueError(
            f"`targets` must be from 0 to {classes - 1}{unless}, but has {native[wrong][0]}"
        )
