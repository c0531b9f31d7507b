"""The checks of this room's arguments: errors name the argument, what came and what is allowed."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from .. import arrays
from ..jit.strides import address

HALVES = ("float16", "bfloat16")


def required(name: str, native: dict[str, Any]) -> None:
    if native[name] is None:
        raise TypeError(f"`{name}` must be an array, a list or a number, not None")


def axes(name: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes to reduce, ascending. As in NumPy, an array without axes has an axis 0."""
    ndim = max(ndim, 1)
    if axis is None:
        return tuple(range(ndim))
    found = []
    for one in axis if isinstance(axis, tuple) else (axis,):
        index = integer(one)
        if index is None:
            raise TypeError(f"`axis` must be an int, a tuple of ints or None, not {axis!r}")
        if not -ndim <= index < ndim:
            raise np.exceptions.AxisError(
                f"`axis` must be from {-ndim} to {ndim - 1}, because {name} has {ndim} axes, "
                f"not {axis!r}"
            )
        found.append(index % ndim)
    if len(set(found)) < len(found):
        raise ValueError(f"`axis` must not name an axis of {name} twice, but is {axis!r}")
    return tuple(sorted(found))


def one_axis(name: str, axis: Any, ndim: int) -> int:
    """The one axis of functions that take no more, not negative."""
    if axis is None or isinstance(axis, tuple):
        raise TypeError(f"`axis` must be an int, not {axis!r}")
    return axes(name, axis, ndim)[0]


def integer(value: Any) -> int | None:
    """What stands for an int as one, or None: booleans do not."""
    if isinstance(value, (bool, np.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def working_dtype(*operands: Any) -> str:
    """The floating dtype that the operands are brought to, as NumPy promotes them.

    A bfloat16 promotes as a float16 would, where ml_dtypes has no rule; the two give float32.
    """
    names = [arrays.dtype_name(array.dtype) for array in operands if array is not None]
    stand_ins = ["float16" if name == "bfloat16" else name for name in names]
    common: str = np.result_type(*map(np.dtype, stand_ins), 1.0).name
    if common == "float16" and "bfloat16" in names:
        return "float32" if "float16" in names else "bfloat16"
    return common


def broadcast(a: Any, b: Any) -> tuple[int, ...]:
    if b is None:
        return tuple(a.shape)
    try:
        return np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            f"`b` must have a shape that broadcasts with `a`'s {a.shape}, not {b.shape}"
        ) from None


def named_outputs(out: Any, *, both: bool) -> dict[str, Any]:
    """Name out's arrays as messages do: "out", or "out[0]" and "out[1]" for (res, sgn)."""
    if not isinstance(out, tuple):
        return {"out": out}
    if not both:
        raise TypeError("`out` must be one array, not a tuple, unless return_sign=True")
    if len(out) != 2:
        raise ValueError(f"`out` must be one array or a pair (res, sgn), not {len(out)} of them")
    return {"out[0]": out[0], "out[1]": out[1]}


def outputs(
    names: tuple[str, ...],
    native: dict[str, Any],
    shape: tuple[int, ...],
    dtype: str,
    may_be: tuple[str, ...] = (),
) -> str:
    """Check the outputs that were given; return the dtype of all outputs.

    Parameters
    ----------
    names : tuple of str
        The outputs among `native`.
    native : dict of str to array or None
        All arrays of the call.
    shape, dtype
        Of the answer. A half may be stored as float32.
    may_be : tuple of str
        The inputs that an output may be in every respect: each row of them is read before that row
        is written, by the threads that read it.
    """
    allowed = (dtype, "float32") if dtype in HALVES else (dtype,)
    for name in names:
        out = native[name]
        if out is None:
            continue
        if out.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, not {out.shape}")
        if arrays.dtype_name(out.dtype) not in allowed:
            raise TypeError(
                f"`{name}` must be of dtype {' or '.join(allowed)}, "
                f"not {arrays.dtype_name(out.dtype)}"
            )
        allowed = (arrays.dtype_name(out.dtype),)  # the next one must agree
        _separate(name, native, may_be)
    return allowed[0]


def _separate(name: str, native: dict[str, Any], may_be: tuple[str, ...]) -> None:
    out = native[name]
    for other, array in native.items():
        if other == name or array is None or (other in may_be and _is_same(out, array)):
            continue
        if arrays.may_share_memory(out, array):
            unless = " unless it is the same array" if other in may_be else ""
            raise ValueError(f"`{name}` must not overlap `{other}` in memory{unless}")


def _is_same(a: Any, b: Any) -> bool:
    same = a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype
    return bool(same and address(a) == address(b))
