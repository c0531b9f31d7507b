"""The public calls of this room: every argument is checked here, before anything runs."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np

from .. import arrays, tools
from ..jit import repeat
from ..jit.launch import Plan, Recording
from . import check
from .problem import Operands, Problem


def softmax(x: Any, axis: int | tuple[int, ...] | None = None, *, out: Any = None) -> Any:
    r"""Exponentials along an axis, divided by their sum.

    A drop-in for :func:`scipy.special.softmax` that also takes GPU arrays.

    Parameters
    ----------
    x : array_like
        Input. Lists and numbers are taken too; booleans and integers become float64.
    axis : int or tuple of ints, optional
        Along which axes the answer sums to 1; None, the default, means all of them.
    out : array, optional
        Where the answer goes, and what comes back: x's shape, and the dtype the answer would have,
        or float32 for float16 and bfloat16 input. It may be `x`, but not overlap it otherwise.

    Returns
    -------
    array or scalar
        Of x's shape, kind and floating dtype. A NumPy answer without axes is a scalar.

    Raises
    ------
    TypeError
        For what is not an array, kinds or devices that are mixed, and dtypes.
    ValueError
        For an axis that `x` does not have (:exc:`numpy.exceptions.AxisError`), and for an `out`
        of the wrong shape or memory.

    Notes
    -----
    .. math:: \sigma(x)_j = \frac{e^{x_j - m}}{\sum_k e^{x_k - m}}, \qquad m = \max_k x_k

    The maximum and the sum come from one pass, Algorithm 3 of Milakov and Gimelshein [1]_. Sums are
    float32, or float64 for float64 input. Rows with a NaN, with +inf or with nothing but -inf are
    NaN throughout, as in SciPy; an axis of length 0 gives an empty answer.

    On a GPU, rows that fit in registers are read once and longer ones twice; any axis and any
    strides are used in place, but for an array that needs more than four strides along, or
    across, `axis`: that costs a copy.

    References
    ----------
    .. [1] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018,
       arXiv:1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.array([[1, 0.5, 0.2, 3], [1, -1, 7, 3], [2, 12, 13, 3]])
    >>> cuflash.softmax(x, axis=0).sum(axis=0)
    array([1., 1., 1., 1.])
    >>> cuflash.softmax(x, axis=1).round(3)
    array([[0.106, 0.064, 0.048, 0.782],
           [0.002, 0.   , 0.979, 0.018],
           [0.   , 0.269, 0.731, 0.   ]])
    >>> bool(np.isclose(cuflash.softmax(x).sum(), 1))
    True
    >>> cuflash.softmax([1000, 0])
    array([1., 0.])
    """
    key, answers = repeat.again("softmax", (x,), (axis,)) if out is None else (None, None)
    if answers is not None:
        return answers[0]
    return call(*prepare("softmax", x, axis, out), given=(out,), key=key)


def log_softmax(x: Any, axis: int | tuple[int, ...] | None = None, *, out: Any = None) -> Any:
    r"""The logarithm of :func:`softmax`, without its underflow.

    A drop-in for :func:`scipy.special.log_softmax` that also takes GPU arrays.

    Parameters
    ----------
    x : array_like
        Input. Lists and numbers are taken too; booleans and integers become float64.
    axis : int or tuple of ints, optional
        Along which axes the answer's exponentials sum to 1; None, the default, means all of them.
    out : array, optional
        Where the answer goes, and what comes back: x's shape, and the dtype the answer would have,
        or float32 for float16 and bfloat16 input. It may be `x`, but not overlap it otherwise.

    Returns
    -------
    array or scalar
        Of x's shape, kind and floating dtype. A NumPy answer without axes is a scalar.

    Raises
    ------
    TypeError, ValueError
        As :func:`softmax`.

    Notes
    -----
    .. math:: \log \sigma(x)_j = (x_j - m) - \log \sum_k e^{x_k - m}, \qquad m = \max_k x_k

    Computed and stored as :func:`softmax` is. Rows with a NaN or with nothing but -inf are NaN; in
    a row with +inf that element is NaN and the finite ones are -inf, as in SciPy.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> cuflash.log_softmax(np.array([1000.0, 1.0]))
    array([   0., -999.])
    >>> cuflash.log_softmax(np.zeros((2, 4)), axis=(0, 1))[0, 0] == -np.log(8)
    np.True_
    """
    key, answers = repeat.again("log_softmax", (x,), (axis,)) if out is None else (None, None)
    if answers is not None:
        return answers[0]
    return call(*prepare("log_softmax", x, axis, out), given=(out,), key=key)


def logsumexp(
    a: Any,
    axis: int | tuple[int, ...] | None = None,
    b: Any = None,
    keepdims: bool = False,
    return_sign: bool = False,
    *,
    out: Any = None,
) -> Any:
    r"""The logarithm of a sum of exponentials, ``log(sum(b * exp(a)))``, without its overflow.

    A drop-in for :func:`scipy.special.logsumexp` that also takes GPU arrays.

    Parameters
    ----------
    a : array_like
        Exponents. Lists and numbers are taken too; booleans and integers become float64.
    axis : int or tuple of ints, optional
        Along which axes to sum; None, the default, means all of them.
    b : array_like, optional
        Weights, negative ones included. `a` and `b` broadcast against each other and are brought to
        one dtype, as NumPy would. A Python number goes with any kind of array. ``b == 0`` removes
        an element, be it infinite or NaN.
    keepdims : bool, default False
        Keep the reduced axes, with length 1.
    return_sign : bool, default False
        Also return the sign of the sum; the logarithm is then that of its absolute value.
    out : array, or (array or None, array or None) with ``return_sign``, optional
        Where the answers go, and what comes back: of the answer's shape and dtype, or float32 for
        float16 and bfloat16 input. No overlap with `a` or `b`.

    Returns
    -------
    res : array or scalar
        The logarithm, NaN where the sum is negative unless ``return_sign=True``, -inf where it is 0
        or has no terms. A NumPy answer without axes is a scalar.
    sgn : array or scalar
        Only with ``return_sign=True``: 1, 0, -1 or NaN, of the dtype of `res`.

    Raises
    ------
    TypeError, ValueError
        As :func:`softmax`, and ValueError for shapes that do not broadcast.

    Notes
    -----
    The largest element's weight and the sum of all else are kept apart, so that
    ``logsumexp([0, -40])`` is ``exp(-40)`` and not 0. Every element is read once.

    Two answers differ from SciPy 1.17: sums that cancel exactly, or that ``b`` leaves no terms of,
    are -inf (SciPy may give NaN), and the sign of a sum over an empty axis is 0 (SciPy gives -1).

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> a = np.arange(10.0)
    >>> cuflash.logsumexp(a).round(6)
    np.float64(9.45863)
    >>> cuflash.logsumexp(a, b=np.arange(10, 0, -1)).round(6)
    np.float64(9.917018)
    >>> cuflash.logsumexp([[1000, 1000], [0, -np.inf]], axis=1).round(3)
    array([1000.693,    0.   ])

    The logarithm of e - e**2, which is negative:

    >>> log, sign = cuflash.logsumexp([1, 2], b=[1, -1], return_sign=True)
    >>> log.round(6), sign
    (np.float64(1.541325), np.float64(-1.0))
    """
    inputs = (a,) if b is None else (a, b)
    options = (axis, keepdims, return_sign)
    key, answers = repeat.again("logsumexp", inputs, options) if out is None else (None, None)
    if answers is not None:
        return tuple(answers) if return_sign else answers[0]
    prepared = prepare_log(a, axis, b, keepdims, return_sign, out)
    given = out if isinstance(out, tuple) else (out, None)
    return call(*prepared, given=given, key=key)


def _softmax_plans(x: Any, axis: Any = None, *, out: Any = None) -> tuple[int, list[Plan]]:
    return plans(*prepare("softmax", x, axis, out))


def _log_softmax_plans(x: Any, axis: Any = None, *, out: Any = None) -> tuple[int, list[Plan]]:
    return plans(*prepare("log_softmax", x, axis, out))


def _logsumexp_plans(
    a: Any,
    axis: Any = None,
    b: Any = None,
    keepdims: Any = False,
    return_sign: Any = False,
    *,
    out: Any = None,
) -> tuple[int, list[Plan]]:
    return plans(*prepare_log(a, axis, b, keepdims, return_sign, out))


tools.register(softmax, _softmax_plans)
tools.register(log_softmax, _log_softmax_plans)
tools.register(logsumexp, _logsumexp_plans)


def prepare(
    function: str, x: Any, axis: Any, out: Any
) -> tuple[arrays.Caller, Problem, Operands, tuple[int, ...]]:
    """Check softmax's or log_softmax's arguments: caller, problem, operands, the answer's shape.

    Nothing is converted, allocated or launched yet: `complete` does the first two.
    """
    if isinstance(out, tuple):
        raise TypeError("`out` must be one array, not a tuple")
    caller, native = arrays.take({"x": x, "out": out}, sequences=True, outputs=("out",))
    check.required("x", native)
    shape = native["x"].shape
    dtype = check.working_dtype(native["x"])
    axes = check.axes("`x`", axis, len(shape))
    result = check.outputs(("out",), native, shape, dtype, may_be=("x",))
    problem = Problem(function, dtype, result, shape or (1,), axes)
    return caller, problem, Operands(x=native["x"], out=with_axes(native["out"], ())), shape


def prepare_log(
    a: Any, axis: Any, b: Any, keepdims: Any, return_sign: Any, out: Any
) -> tuple[arrays.Caller, Problem, Operands, tuple[int, ...]]:
    """Check logsumexp's arguments, as `prepare` does."""
    names = check.named_outputs(out, both=bool(return_sign))
    # A Python number goes with any kind of array, and does not raise its dtype.
    number = b if type(b) in (bool, int, float) else None
    caller, native = arrays.take(
        {"a": a, "b": None if number is not None else b, **names},
        sequences=True,
        outputs=tuple(names),
    )
    check.required("a", native)
    weights = native["b"] if number is None else number
    dtype = check.working_dtype(native["a"], native["b"])
    shape = check.broadcast(native["a"], native["b"])
    axes = check.axes("`a`" if native["b"] is None else "`b` * exp(`a`)", axis, len(shape))
    shape = shape or (1,)
    problem_shape = shape
    if keepdims:
        shape = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    else:
        shape = tuple(n for axis, n in enumerate(shape) if axis not in axes)
    result = check.outputs(tuple(names), native, shape, dtype)
    problem = Problem(
        "logsumexp", dtype, result, problem_shape, axes, weights is not None, bool(return_sign)
    )
    missing = () if keepdims else axes
    into = [with_axes(native[name], missing) for name in names] + [None]
    return caller, problem, Operands(native["a"], into[0], weights, into[1]), shape


def complete(caller: arrays.Caller, problem: Problem, operands: Operands) -> tuple[str, ...]:
    """Bring the inputs to one dtype and shape, and make the outputs that the caller did not give.

    Call it inside ``with caller``. Returns the names of the operands that were converted.
    """
    dtype, result = np.dtype(problem.dtype), np.dtype(problem.result)
    arriving = {"x": operands.x, "weights": operands.weights}
    converted = [
        name for name, array in arriving.items() if getattr(array, "dtype", dtype) != dtype
    ]
    operands.x = _as(caller, operands.x, problem.dtype, problem.shape)
    if isinstance(operands.weights, (bool, int, float)):
        number, operands.weights = operands.weights, caller.keep(caller.empty((), dtype))
        with np.errstate(over="ignore"):  # 1e5 is inf in float16
            operands.weights.fill(float(number))
    if operands.weights is not None:
        operands.weights = _as(caller, operands.weights, problem.dtype, problem.shape)
    if problem.reduces:
        reduced = tuple(1 if axis in problem.axes else n for axis, n in enumerate(problem.shape))
        if operands.out is None:
            operands.out = caller.empty(reduced, result)
        if operands.sign is None and problem.signed:
            operands.sign = caller.empty(reduced, result)
    elif operands.out is None:
        operands.out = empty_like(caller, operands.x, result)
    return tuple(converted)


def call(
    caller: arrays.Caller,
    problem: Problem,
    operands: Operands,
    shape: tuple[int, ...],
    *,
    given: tuple[Any, ...],
    key: repeat.Key | None,
) -> Any:
    inputs = (operands.x, operands.weights) if problem.weighted else (operands.x,)
    with caller, Recording() as made:
        complete(caller, problem, operands)
        if problem.rows and problem.columns:
            _backend(caller).forward(problem, operands)
        elif problem.reduces:  # the sum of no terms is 0
            operands.out.fill(-np.inf)
            if operands.sign is not None:
                operands.sign.fill(0)
    results = (operands.out, operands.sign) if problem.signed else (operands.out,)
    answers = tuple(give(caller, *each, shape) for each in zip(given, results))
    repeat.remember(key, made, inputs, answers)
    return answers if problem.signed else answers[0]


# What callers call the operands, where it is not the operands' own name.
_CALLED = {
    "logsumexp": {"x": "a", "weights": "b", "sign": "out[1]"},
    "softmax_backward": {"x": "dy", "weights": "y"},
    "log_softmax_backward": {"x": "dy", "weights": "y"},
}


def plans(
    caller: arrays.Caller, problem: Problem, operands: Operands, shape: tuple[int, ...]
) -> tuple[int, list[Plan]]:
    """Where a call would run and what it would launch: nothing where there is nothing to do."""
    if not (caller.on_gpu and problem.rows and problem.columns):
        return caller.device, []
    from . import gpu

    with caller:
        converted = complete(caller, problem, operands)
        plans = gpu.plans(problem, operands)
    called = _CALLED.get(problem.function, {})
    return caller.device, [
        dataclasses.replace(
            plan, copies=tuple(called.get(name, name) for name in converted + plan.copies)
        )
        for plan in plans
    ]


def _backend(caller: arrays.Caller) -> ModuleType:
    if caller.on_gpu:
        from . import gpu

        return gpu
    from . import cpu

    return cpu


def give(caller: arrays.Caller, given: Any, native: Any, shape: tuple[int, ...]) -> Any:
    if given is not None:
        return given
    answer = caller.give(native.reshape(shape))
    return answer[()] if caller.kind == "numpy" and shape == () else answer


# Views and conversions; NumPy's broadcast_to hands a GPU array to its own library.


def with_axes(array: Any, axes: tuple[int, ...]) -> Any:
    """A view with axes of length 1 inserted at `axes`, and at least one axis."""
    if array is None or (array.ndim and not axes):
        return array
    ndim = max(array.ndim + len(axes), 1)
    inserted = axes or (0,)
    return array[tuple(None if axis in inserted else slice(None) for axis in range(ndim))]


def _as(caller: arrays.Caller, array: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    array = caller.converted(array, dtype)
    return array if array.shape == shape else np.broadcast_to(array, shape)


def empty_like(caller: arrays.Caller, x: Any, dtype: np.dtype[Any]) -> Any:
    """An array with x's shape and order of axes in memory, so that both are walked alike."""
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    if order == list(range(x.ndim)):
        return caller.empty(x.shape, dtype)
    empty = caller.empty(tuple(x.shape[axis] for axis in order), dtype)
    return empty.transpose(np.argsort(order).tolist())
