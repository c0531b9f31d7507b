"""The public cross-entropy and its backward pass."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import arrays, tools
from ..jit import repeat
from ..jit.launch import Plan, Recording
from . import api, check, loss_check
from .loss_problem import BackwardOperands, Operands, Problem


class CrossEntropy(NamedTuple):
    """What :func:`cross_entropy` returns with ``return_lse=True``."""

    loss: Any
    lse: Any


def cross_entropy(
    logits: Any,
    targets: Any,
    *,
    axis: int = -1,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Any:
    r"""Minus the logarithm of what the logits' softmax gives to the targets, from one read of them.

    Parameters
    ----------
    logits : array_like
        Scores of the classes, not normalised: any shape with an axis of classes.
    targets : array_like of int
        The right class of each row: logits' shape without `axis`, any integer dtype.
    axis : int, default -1
        The logits' axis of classes.
    ignore_index : int, optional
        Rows with this target do not count: their loss is 0. By default no row is ignored.
    label_smoothing : float, default 0
        How much of a target, from 0 to 1, is spread evenly over all classes.
    reduction : {"mean", "sum", "none"}
        Of the rows' losses: their mean over the rows that are not ignored, their sum, or all.
    return_lse : bool, default False
        Also return the logits' logsumexp, which :func:`cross_entropy_backward` wants.

    Returns
    -------
    loss : array or scalar
        float32, or float64 for float64 logits (integers become float64): without axes, or of
        targets' shape with ``reduction="none"``. A NumPy answer without axes is a scalar.
    lse : array or scalar
        Only with ``return_lse=True``: the dtype of `loss`, targets' shape.

    Raises
    ------
    TypeError
        For what is not an array, kinds or devices that are mixed, and dtypes.
    ValueError
        For shapes that do not fit, no classes, numbers outside their range, and an axis that
        `logits` does not have (:exc:`numpy.exceptions.AxisError`). For targets out of range in
        NumPy arrays, and on a GPU with ``CUFLASH_CHECK=1``; otherwise their loss is NaN there.

    Notes
    -----
    With :math:`\varepsilon` the smoothing and C classes, as in PyTorch,

    .. math:: \mathrm{loss}_i = \mathrm{lse}_i - (1 - \varepsilon)\, x_{i, t_i}
              - \frac{\varepsilon}{C} \sum_c x_{ic}, \qquad
              \mathrm{lse}_i = \log \sum_c e^{x_{ic}}.

    lse comes from one pass, Algorithm 3 of Milakov and Gimelshein (:func:`softmax`). A loss is as
    exact as lse is: an offset of 10,000 that all logits share costs it three digits in float32.
    The mean of no rows is NaN, their sum 0. Logits of -inf are fine but for targets, whose loss is
    inf, and with smoothing, which gives inf. Losses are added up in one order, the same in every
    run. On a GPU, logits whose rows need more than four strides are copied.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    >>> targets = np.array([0, 2])
    >>> cuflash.cross_entropy(logits, targets).round(4)
    np.float64(0.4581)
    >>> np.exp(-cuflash.cross_entropy(logits, targets, reduction="none"))
    array([0.5, 0.8])
    """
    inputs = logits, targets
    options = (axis, ignore_index, label_smoothing, reduction, return_lse)
    key, answers = (
        (None, None) if arrays.checks_on_gpu() else repeat.again("cross_entropy", inputs, options)
    )
    if answers is not None:
        return CrossEntropy(*answers) if return_lse else answers[0]
    caller, problem, native, last = _prepare(
        logits, targets, axis, ignore_index, label_smoothing, reduction
    )
    with caller, Recording() as made:
        _check_values(caller, problem, native["targets"])
        operands, _ = _complete(caller, problem, native, last, bool(return_lse))
        if problem.rows:
            _backend(caller).forward(problem, operands)
        elif problem.reduction != "none":
            operands.loss.fill(np.nan if problem.reduction == "mean" else 0)
    loss = api.give(caller, None, operands.loss, problem.loss_shape)
    if not return_lse:
        repeat.remember(key, made, inputs, (loss,))
        return loss
    both = CrossEntropy(loss, api.give(caller, None, operands.lse, problem.shape))
    repeat.remember(key, made, inputs, both)
    return both


def cross_entropy_backward(
    dloss: Any,
    logits: Any,
    targets: Any,
    lse: Any,
    *,
    axis: int = -1,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out: Any = None,
) -> Any:
    r"""The gradient with respect to the logits, from that with respect to their cross-entropy.

    Parameters
    ----------
    dloss : array_like or float
        The gradient with respect to the loss, of the loss's shape. A number goes with any kind of
        array where the loss has no axes.
    logits, targets : array_like
        What :func:`cross_entropy` was given.
    lse : array_like
        What it returned: targets' shape, float32, or float64 for float64 logits.
    axis : int, default -1
        As in that call.
    ignore_index : int, optional
        As in that call. The gradient of such rows is 0.
    label_smoothing : float, default 0
        As in that call.
    reduction : {"mean", "sum", "none"}
        As in that call.
    out : array, optional
        Where the answer goes, and what comes back: logits' shape, and the dtype the answer would
        have, or float32 for float16 and bfloat16 logits. It may be `logits`, but not overlap any
        argument otherwise.

    Returns
    -------
    array
        Of logits' shape, kind and floating dtype.

    Raises
    ------
    TypeError, ValueError
        As :func:`cross_entropy`, and ValueError for an `out` of the wrong shape or memory. Where
        the loss of a target out of range is NaN, so is the gradient of its row.

    Notes
    -----
    .. math:: dx_{ic} = dl_i \Bigl( e^{x_{ic} - \mathrm{lse}_i} - (1 - \varepsilon)\,[c = t_i]
              - \frac{\varepsilon}{C} \Bigr),

    where :math:`dl_i` is `dloss`, divided by the number of rows that are not ignored if the loss is
    a mean. One read of the logits and one write. On a GPU, arrays that need more than four strides
    across rows are copied.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> logits, targets = np.log([[0.5, 0.25, 0.25]]), np.array([0])
    >>> loss, lse = cuflash.cross_entropy(logits, targets, return_lse=True)
    >>> cuflash.cross_entropy_backward(1.0, logits, targets, lse)
    array([[-0.5 ,  0.25,  0.25]])
    """
    number = check.is_number(dloss)
    inputs = (logits, targets, lse) if number else (logits, targets, lse, dloss)
    options = (dloss if number else None, axis, ignore_index, label_smoothing, reduction)
    long = out is not None or arrays.checks_on_gpu()
    key, answers = (None, None) if long else repeat.again("cross_entropy_backward", inputs, options)
    if answers is not None:
        return answers[0]
    caller, problem, native, last = _prepare_backward(
        dloss, logits, targets, lse, axis, ignore_index, label_smoothing, reduction, out
    )
    with caller, Recording() as made:
        _check_values(caller, problem, native["targets"])
        operands, _ = _complete_backward(caller, problem, native, last, dloss)
        if problem.rows:
            _backend(caller).backward(problem, operands)
    if out is not None:
        return out
    answer = caller.give(operands.out.transpose(np.argsort(last).tolist()))
    repeat.remember(key, made, inputs, (answer,))
    return answer


def _plans(
    logits: Any,
    targets: Any,
    *,
    axis: Any = -1,
    ignore_index: Any = None,
    label_smoothing: Any = 0.0,
    reduction: Any = "mean",
    return_lse: Any = False,
) -> tuple[int, list[Plan]]:
    caller, problem, native, last = _prepare(
        logits, targets, axis, ignore_index, label_smoothing, reduction
    )
    if not (caller.on_gpu and problem.rows):
        return caller.device, []
    from . import loss_gpu

    with caller:
        operands, converted = _complete(caller, problem, native, last, bool(return_lse))
        return caller.device, loss_gpu.plans(problem, operands, converted)


def _backward_plans(
    dloss: Any,
    logits: Any,
    targets: Any,
    lse: Any,
    *,
    axis: Any = -1,
    ignore_index: Any = None,
    label_smoothing: Any = 0.0,
    reduction: Any = "mean",
    out: Any = None,
) -> tuple[int, list[Plan]]:
    caller, problem, native, last = _prepare_backward(
        dloss, logits, targets, lse, axis, ignore_index, label_smoothing, reduction, out
    )
    if not (caller.on_gpu and problem.rows):
        return caller.device, []
    from . import loss_gpu

    with caller:
        operands, converted = _complete_backward(caller, problem, native, last, dloss)
        return caller.device, loss_gpu.backward_plans(problem, operands, converted)


tools.register(cross_entropy, _plans)
tools.register(cross_entropy_backward, _backward_plans)


# The arguments: the caller, what is asked for, the native arrays, and the order of axes that puts
# the classes last. Nothing is converted, allocated or launched yet.
_Prepared = tuple[arrays.Caller, Problem, dict[str, Any], tuple[int, ...]]


def _prepare(
    logits: Any, targets: Any, axis: Any, ignore_index: Any, label_smoothing: Any, reduction: Any
) -> _Prepared:
    caller, native = arrays.take({"logits": logits, "targets": targets}, sequences=True, outputs=())
    problem, last = _problem(native, axis, ignore_index, label_smoothing, reduction)
    return caller, problem, native, last


def _prepare_backward(
    dloss: Any,
    logits: Any,
    targets: Any,
    lse: Any,
    axis: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    out: Any,
) -> _Prepared:
    if isinstance(out, tuple):
        raise TypeError("`out` must be one array, not a tuple")
    number = check.is_number(dloss)
    caller, native = arrays.take(
        {
            "dloss": None if number else dloss,
            "logits": logits,
            "targets": targets,
            "lse": lse,
            "out": out,
        },
        sequences=True,
        outputs=("out",),
    )
    problem, last = _problem(native, axis, ignore_index, label_smoothing, reduction, out=True)
    if not number:
        check.required("dloss", native)
    loss_check.dloss(dloss, native["dloss"], problem.loss_shape)
    check.required("lse", native)
    loss_check.rows("lse", native["lse"], problem.shape)
    found = arrays.dtype_name(native["lse"].dtype)
    if found != problem.accumulator:
        raise TypeError(f"`lse` must be of dtype {problem.accumulator}, not {found}")
    return caller, problem, native, last


def _problem(
    native: dict[str, Any],
    axis: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    *,
    out: bool = False,
) -> tuple[Problem, tuple[int, ...]]:
    check.required("logits", native)
    check.required("targets", native)
    logits = native["logits"]
    dtype = check.working_dtype(logits)
    axis = loss_check.class_axis(axis, logits)
    kept = tuple(other for other in range(logits.ndim) if other != axis)
    shape = tuple(logits.shape[other] for other in kept)
    target = loss_check.targets(native["targets"], shape)
    problem = Problem(
        dtype=dtype,
        result=check.outputs(("out",), native, logits.shape, dtype, ("logits",)) if out else dtype,
        target=target,
        shape=shape,
        classes=logits.shape[axis],
        ignore_index=loss_check.ignore_index(ignore_index, target),
        label_smoothing=loss_check.label_smoothing(label_smoothing),
        reduction=loss_check.reduction(reduction),
    )
    return problem, (*kept, axis)


def _check_values(caller: arrays.Caller, problem: Problem, targets: Any) -> None:
    if arrays.checks_on_gpu() or not caller.on_gpu:
        loss_check.values(targets, problem.classes, problem.ignore_index)


def _complete(
    caller: arrays.Caller,
    problem: Problem,
    native: dict[str, Any],
    last: tuple[int, ...],
    return_lse: bool,
) -> tuple[Operands, tuple[str, ...]]:
    """Convert the logits if need be and allocate the results; also the names of what converted."""
    logits, converted = _as(caller, "logits", native["logits"].transpose(last), problem.dtype)
    accumulator = np.dtype(problem.accumulator)
    operands = Operands(
        logits=logits,
        targets=native["targets"],
        loss=caller.empty(problem.loss_shape, accumulator),
        lse=caller.empty(problem.shape, accumulator) if return_lse else None,
    )
    return operands, converted


def _complete_backward(
    caller: arrays.Caller,
    problem: Problem,
    native: dict[str, Any],
    last: tuple[int, ...],
    dloss: Any,
) -> tuple[BackwardOperands, tuple[str, ...]]:
    logits, converted = _as(caller, "logits", native["logits"].transpose(last), problem.dtype)
    if native["dloss"] is None:
        dloss = float(dloss)
    else:
        dloss, also = _as(caller, "dloss", native["dloss"], problem.accumulator)
        converted += also
    if native["out"] is not None:
        out = native["out"].transpose(last)
    else:
        out = api.empty_like(caller, logits, np.dtype(problem.result))
    operands = BackwardOperands(dloss, logits, native["targets"], native["lse"], out)
    return operands, converted


def _as(caller: arrays.Caller, name: str, array: Any, dtype: str) -> tuple[Any, tuple[str, ...]]:
    """The array in a dtype, and its name if that took a conversion."""
    converted = caller.converted(array, dtype)
    return converted, () if converted is array else (name,)


def _backend(caller: arrays.Caller) -> ModuleType:
    if caller.on_gpu:
        from . import loss_gpu

        return loss_gpu
    from . import loss_cpu

    return loss_cpu
