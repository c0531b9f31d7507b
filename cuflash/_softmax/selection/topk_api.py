"""topk and softmax_topk: every argument is checked here, before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ... import arrays, tools
from ...jit import repeat
from ...jit.launch import Plan, Recording
from .. import check

MOST_ON_GPU = 1024  # k
MOST_COLUMNS = 2**32 - 1


class TopK(NamedTuple):
    """What :func:`topk` and :func:`softmax_topk` return."""

    values: Any
    indices: Any


@dataclass(frozen=True)
class Problem:
    """Everything about a call but the arrays. The axis that is searched is the last one here."""

    function: str  # "topk" "softmax_topk"
    dtype: str  # of x: "float16" "bfloat16" "float32" "float64"
    result: str  # of values: dtype, or "float32" for softmax_topk of the two halves
    batch: tuple[int, ...]  # the other axes
    columns: int
    k: int

    @property
    def rows(self) -> int:
        return math.prod(self.batch)


@dataclass
class Operands:
    """The arrays of a call, all of one library, with the axis that is searched last."""

    x: Any  # (*batch, columns)
    values: Any = None  # (*batch, k)
    indices: Any = None  # (*batch, k), int64


def topk(x: Any, k: int, *, axis: int = -1, out: Any = None) -> TopK:
    """The k largest elements along an axis, the largest first, and where they are.

    Parameters
    ----------
    x : array_like
        Input, of shape (..., n, ...) with n along `axis`. Lists and numbers are taken too; booleans
        and integers become float64.
    k : int
        How many, from 1 to n; on a GPU at most 1024.
    axis : int, default -1
        Along which axis to search. An array without axes counts as one of length 1.
    out : (array or None, array or None), optional
        Where the values and the indices go, and what comes back: of the answers' shapes and dtypes.
        No overlap with `x`.

    Returns
    -------
    values : array
        Of shape (..., k, ...), and of x's kind and floating dtype: elements of `x`, bit for bit.
    indices : array of int64
        Of the same shape: their places along `axis`.

    Raises
    ------
    TypeError
        For what is not an array, kinds or devices that are mixed, dtypes, and a `k` or an `axis`
        that is no integer.
    ValueError
        For a `k` out of range, an axis that `x` does not have
        (:exc:`numpy.exceptions.AxisError`), an `out` of the wrong shape or memory, and more than
        2**32 - 1 elements along `axis`.

    Notes
    -----
    A NaN counts as the largest, as :func:`numpy.sort` has it. Among equal elements, and among
    several NaNs, the lowest index comes first.

    On a GPU every element is read once, wherever a row begins. An array that is not contiguous
    along `axis` (whose step there is not 1), or needs more than four strides for the other axes, is
    copied first.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.array([[1, 0.5, 0.2, 3], [1, -1, 7, 3], [2, 12, 13, 2]])
    >>> values, indices = cuflash.topk(x, 2)
    >>> values
    array([[ 3.,  1.],
           [ 7.,  3.],
           [13., 12.]])
    >>> indices
    array([[3, 0],
           [2, 3],
           [2, 1]])
    >>> cuflash.topk(x, 1, axis=0).indices
    array([[2, 2, 2, 0]])
    """
    key, answers = repeat.again("topk", (x,), (k, axis)) if out is None else (None, None)
    if answers is not None:
        return TopK(*answers)
    return _call(*prepare("topk", x, k, axis, out), given=out, key=key)


def softmax_topk(x: Any, k: int, *, axis: int = -1, out: Any = None) -> TopK:
    """The k largest probabilities of a softmax, the largest first, and where they are.

    The softmax itself is never written, and `x` is read once.

    Parameters
    ----------
    x : array_like
        Input, of shape (..., n, ...) with n along `axis`. Lists and numbers are taken too; booleans
        and integers become float64.
    k : int
        How many, from 1 to n; on a GPU at most 1024.
    axis : int, default -1
        Along which axis the softmax sums to 1. An array without axes counts as one of length 1.
    out : (array or None, array or None), optional
        Where the values and the indices go, and what comes back: of the answers' shapes and dtypes,
        but the values may be float32 for float16 and bfloat16 input. No overlap with `x`.

    Returns
    -------
    values : array
        Of shape (..., k, ...), and of x's kind and floating dtype: probabilities.
    indices : array of int64
        Of the same shape: their places along `axis`.

    Raises
    ------
    TypeError, ValueError
        As :func:`topk`.

    Notes
    -----
    The order is that of `x`, as :func:`topk` has it, and so it tells probabilities apart that round
    to the same number. Rows with a NaN, with +inf or with nothing but -inf have NaN for
    probabilities, as in :func:`softmax`, and the same indices as from :func:`topk`.

    This is Algorithm 4 of Milakov and Gimelshein [1]_: the running maximum and sum of the softmax
    and the largest elements so far, from one pass. Instead of k + 1 sorted elements there are a
    threshold, and a buffer of what passed it. Sums, copies and the axes that can be used in place
    are as in :func:`softmax` and :func:`topk`.

    References
    ----------
    .. [1] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018,
       arXiv:1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.array([[1, 0.5, 0.2, 3], [1, -1, 7, 3], [2, 12, 13, 2]])
    >>> values, indices = cuflash.softmax_topk(x, 2)
    >>> values.round(3)
    array([[0.782, 0.106],
           [0.979, 0.018],
           [0.731, 0.269]])
    >>> indices
    array([[3, 0],
           [2, 3],
           [2, 1]])
    """
    key, answers = repeat.again("softmax_topk", (x,), (k, axis)) if out is None else (None, None)
    if answers is not None:
        return TopK(*answers)
    return _call(*prepare("softmax_topk", x, k, axis, out), given=out, key=key)


def _topk_plans(x: Any, k: Any, *, axis: Any = -1, out: Any = None) -> tuple[int, list[Plan]]:
    return _plans(*prepare("topk", x, k, axis, out))


def _softmax_topk_plans(
    x: Any, k: Any, *, axis: Any = -1, out: Any = None
) -> tuple[int, list[Plan]]:
    return _plans(*prepare("softmax_topk", x, k, axis, out))


tools.register(topk, _topk_plans)
tools.register(softmax_topk, _softmax_topk_plans)


def prepare(
    function: str, x: Any, k: Any, axis: Any, out: Any
) -> tuple[arrays.Caller, Problem, Operands, int]:
    """Check a call's arguments: caller, problem, operands and the axis, counted from the front.

    Nothing is converted, allocated or launched yet: `complete` does the first two.
    """
    into = _named_outputs(out)
    caller, native = arrays.take({"x": x, **into}, sequences=True, outputs=tuple(into))
    check.required("x", native)
    if not native["x"].ndim:
        native["x"] = native["x"].reshape(1)
    shape = native["x"].shape
    along = check.one_axis("`x`", axis, len(shape))
    k = _count(k, shape[along], axis, caller.on_gpu)
    if shape[along] > MOST_COLUMNS:
        raise ValueError(
            f"`x` must have at most 2**32 - 1 elements along `axis`, not {shape[along]}"
        )
    dtype = check.working_dtype(native["x"])
    answer = (*shape[:along], k, *shape[along + 1 :])
    result = check.outputs(("out[0]",), native, answer, dtype)
    if function == "topk" and result != dtype:
        raise TypeError(f"`out[0]` must be of dtype {dtype}, not {result}")
    check.outputs(("out[1]",), native, answer, "int64")
    batch = (*shape[:along], *shape[along + 1 :])
    problem = Problem(function, dtype, result, batch, shape[along], k)
    operands = Operands(*(_last(native[name], along) for name in ("x", "out[0]", "out[1]")))
    return caller, problem, operands, along


def complete(caller: arrays.Caller, problem: Problem, operands: Operands, axis: int) -> None:
    """Convert x, and make the outputs that the caller did not give, within ``with caller``."""
    operands.x = caller.converted(operands.x, problem.dtype)
    shape = (*problem.batch[:axis], problem.k, *problem.batch[axis:])
    if operands.values is None:
        operands.values = _last(caller.empty(shape, np.dtype(problem.result)), axis)
    if operands.indices is None:
        operands.indices = _last(caller.empty(shape, np.dtype(np.int64)), axis)


def _call(
    caller: arrays.Caller,
    problem: Problem,
    operands: Operands,
    axis: int,
    *,
    given: Any,
    key: repeat.Key | None,
) -> TopK:
    x = operands.x
    with caller, Recording() as made:
        complete(caller, problem, operands, axis)
        if problem.rows:
            _backend(caller).forward(problem, operands)
    found = (operands.values, operands.indices)
    answers = TopK(
        *(
            caller.give(np.moveaxis(array, -1, axis)) if theirs is None else theirs
            for array, theirs in zip(found, given or (None, None))
        )
    )
    repeat.remember(key, made, (x,), answers)
    return answers


def _plans(
    caller: arrays.Caller, problem: Problem, operands: Operands, axis: int
) -> tuple[int, list[Plan]]:
    """Where a call would run and what it would launch: nothing where there is nothing to do."""
    if not (caller.on_gpu and problem.rows):
        return caller.device, []
    from . import topk_gpu

    with caller:
        complete(caller, problem, operands, axis)
        return caller.device, topk_gpu.plans(problem, operands)


def _backend(caller: arrays.Caller) -> ModuleType:
    if caller.on_gpu:
        from . import topk_gpu

        return topk_gpu
    from . import topk_cpu

    return topk_cpu


def _named_outputs(out: Any) -> dict[str, Any]:
    if out is None:
        return {"out[0]": None, "out[1]": None}
    if not isinstance(out, tuple):
        raise TypeError(f"`out` must be a pair (values, indices), not {type(out).__name__}")
    if len(out) != 2:
        raise ValueError(f"`out` must be a pair (values, indices), not {len(out)} of them")
    return {"out[0]": out[0], "out[1]": out[1]}


def _count(k: Any, length: int, axis: Any, on_gpu: bool) -> int:
    count = check.integer(k)
    if count is None:
        raise TypeError(f"`k` must be an int, not {k!r}")
    if not 1 <= count <= length:
        raise ValueError(
            f"`k` must be from 1 to {length}, the length of `x` along axis {axis}, not {count}"
        )
    if on_gpu and count > MOST_ON_GPU:
        raise ValueError(f"`k` must be at most {MOST_ON_GPU} on a GPU, not {count}")
    return count


def _last(array: Any, axis: int) -> Any:
    """A view with `axis` last. NumPy's moveaxis hands a GPU array to its own library."""
    return None if array is None else np.moveaxis(array, axis, -1)
