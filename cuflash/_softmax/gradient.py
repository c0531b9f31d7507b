"""The public backward passes of softmax and log_softmax."""

from __future__ import annotations

from typing import Any

from .. import arrays, tools
from ..jit import repeat
from ..jit.launch import Plan
from . import api, check
from .problem import Operands, Problem


def softmax_backward(
    dy: Any, y: Any, axis: int | tuple[int, ...] | None = None, *, out: Any = None
) -> Any:
    r"""The gradient of a loss with respect to x, from that with respect to ``y = softmax(x)``.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to `y`.
    y : array_like
        What :func:`softmax` returned: of dy's shape and dtype.
    axis : int or tuple of ints, optional
        The axes that :func:`softmax` was given; None, the default, means all of them.
    out : array, optional
        Where the answer goes, and what comes back: y's shape, and the dtype the answer would have,
        or float32 for float16 and bfloat16 input. It may be `dy` or `y`, but not overlap them
        otherwise.

    Returns
    -------
    array or scalar
        Of y's shape, kind and floating dtype. A NumPy answer without axes is a scalar.

    Raises
    ------
    TypeError
        For what is not an array, kinds or devices that are mixed, and dtypes.
    ValueError
        For shapes that differ, for an axis that `y` does not have
        (:exc:`numpy.exceptions.AxisError`), and for an `out` of the wrong shape or memory.

    Notes
    -----
    .. math:: dx_j = y_j \Bigl( dy_j - \sum_k dy_k\, y_k \Bigr)

    The sum is float32, or float64 for float64 input. What is not finite goes through the formula.

    Examples
    --------
    The gradient of the first probability:

    >>> import numpy as np
    >>> import cuflash
    >>> y = cuflash.softmax(np.array([0.0, 0.0, np.log(2)]))
    >>> cuflash.softmax_backward(np.array([1.0, 0.0, 0.0]), y)
    array([ 0.1875, -0.0625, -0.125 ])
    """
    return _backward("softmax_backward", dy, y, axis, out)


def log_softmax_backward(
    dy: Any, y: Any, axis: int | tuple[int, ...] | None = None, *, out: Any = None
) -> Any:
    r"""The gradient of a loss with respect to x, from that with respect to ``y = log_softmax(x)``.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to `y`.
    y : array_like
        What :func:`log_softmax` returned: of dy's shape and dtype.
    axis : int or tuple of ints, optional
        The axes that :func:`log_softmax` was given; None, the default, means all of them.
    out : array, optional
        Where the answer goes, and what comes back: y's shape, and the dtype the answer would have,
        or float32 for float16 and bfloat16 input. It may be `dy` or `y`, but not overlap them
        otherwise.

    Returns
    -------
    array or scalar
        Of y's shape, kind and floating dtype. A NumPy answer without axes is a scalar.

    Raises
    ------
    TypeError, ValueError
        As :func:`softmax_backward`.

    Notes
    -----
    .. math:: dx_j = dy_j - e^{y_j} \sum_k dy_k

    Computed as :func:`softmax_backward` is.

    Examples
    --------
    The gradient of the first logarithm:

    >>> import numpy as np
    >>> import cuflash
    >>> y = cuflash.log_softmax(np.zeros(4))
    >>> cuflash.log_softmax_backward(np.array([1.0, 0.0, 0.0, 0.0]), y)
    array([ 0.75, -0.25, -0.25, -0.25])
    """
    return _backward("log_softmax_backward", dy, y, axis, out)


def _backward(function: str, dy: Any, y: Any, axis: Any, out: Any) -> Any:
    key, answers = repeat.again(function, (dy, y), (axis,)) if out is None else (None, None)
    if answers is not None:
        return answers[0]
    return api.call(*prepare(function, dy, y, axis, out), given=(out,), key=key)


def _softmax_plans(dy: Any, y: Any, axis: Any = None, *, out: Any = None) -> tuple[int, list[Plan]]:
    return api.plans(*prepare("softmax_backward", dy, y, axis, out))


def _log_softmax_plans(
    dy: Any, y: Any, axis: Any = None, *, out: Any = None
) -> tuple[int, list[Plan]]:
    return api.plans(*prepare("log_softmax_backward", dy, y, axis, out))


tools.register(softmax_backward, _softmax_plans)
tools.register(log_softmax_backward, _log_softmax_plans)


def prepare(
    function: str, dy: Any, y: Any, axis: Any, out: Any
) -> tuple[arrays.Caller, Problem, Operands, tuple[int, ...]]:
    """Check the arguments: caller, problem, operands, the answer's shape, as `api.prepare` does."""
    if isinstance(out, tuple):
        raise TypeError("`out` must be one array, not a tuple")
    caller, native = arrays.take({"dy": dy, "y": y, "out": out}, sequences=True, outputs=("out",))
    check.required("dy", native)
    check.required("y", native)
    shape = native["y"].shape
    if native["dy"].shape != shape:
        raise ValueError(f"`dy` must have y's shape {shape}, not {native['dy'].shape}")
    dtype = check.working_dtype(native["y"])
    if check.working_dtype(native["dy"]) != dtype:
        raise TypeError(
            f"`dy` must have y's dtype {dtype}, not {arrays.dtype_name(native['dy'].dtype)}"
        )
    axes = check.axes("`y`", axis, len(shape))
    result = check.outputs(("out",), native, shape, dtype, may_be=("dy", "y"))
    problem = Problem(function, dtype, result, shape or (1,), axes, weighted=True)
    operands = Operands(x=native["dy"], weights=native["y"], out=api.with_axes(native["out"], ()))
    return caller, problem, operands, shape
