"""The host side of cross-entropy's kernels: complete operands in, two launches or a few."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..gpu_arrays import kept
from ..jit import gpu, launch
from ..jit.launch import Plan
from ..jit.strides import address, fold, in_elements
from . import gpu as engine
from . import loss_plan, problem
from .layout import MAX_AXES, Layout, Placement
from .loss_plan import Gradient
from .loss_problem import BackwardOperands, Operands, Problem

Arrays = dict[str, Any]

_SIZES = (np.int64, MAX_AXES)


@functools.cache
def loss_params(accumulator: str) -> np.dtype[Any]:
    """LossParams of loss.cu, field by field."""
    return np.dtype(
        [
            *((name, np.uint64) for name in ("logits", "targets", "lse", "sums", "loss", "parts")),
            ("rows", np.int64),
            ("classes", np.int64),
            ("outer", *_SIZES),
            ("logits_strides", *_SIZES),
            ("targets_strides", *_SIZES),
            ("lse_strides", *_SIZES),
            ("sums_strides", *_SIZES),
            ("loss_strides", *_SIZES),
            ("logits_step", np.int64),
            ("ignore_index", np.int64),
            ("hit", accumulator),
            ("share", accumulator),
        ],
        align=True,
    )


@functools.cache
def gradient_params(accumulator: str) -> np.dtype[Any]:
    """GradientParams of loss_backward.cu, field by field."""
    return np.dtype(
        [
            *((name, np.uint64) for name in ("logits", "targets", "lse", "dloss", "count", "out")),
            ("rows", np.int64),
            ("classes", np.int64),
            ("outer", *_SIZES),
            ("logits_strides", *_SIZES),
            ("targets_strides", *_SIZES),
            ("lse_strides", *_SIZES),
            ("dloss_strides", *_SIZES),
            ("out_strides", *_SIZES),
            ("logits_step", np.int64),
            ("out_step", np.int64),
            ("chunk", np.int64),
            ("chunks", np.int64),
            ("ignore_index", np.int64),
            ("number", accumulator),
            ("divisor", accumulator),
            ("at_target", accumulator),
            ("elsewhere", accumulator),
        ],
        align=True,
    )


@dataclasses.dataclass(frozen=True)
class Folded:
    """The arrays of a call as the kernels walk them: the rows' axes, as few as all arrays allow."""

    arrays: Arrays
    outer: tuple[int, ...]
    strides: dict[str, tuple[int, ...]]  # of each array along them, in elements
    copies: tuple[str, ...] = ()  # the arrays that had to be copied for that


def forward(asked: Problem, operands: Operands) -> None:
    """Fill ``operands.loss``, and ``operands.lse`` unless it is None, on CuPy's current stream."""
    folded = fit(asked, _forward_arrays(asked, operands), ("logits", "targets"))
    engine.forward(*_row_engine(asked, folded.arrays))
    planned = loss_plan.losses(asked, len(folded.outer), gpu.current(), folded.copies)
    params = _packed(loss_params, asked, folded)
    params["hit"] = 1 - asked.label_smoothing
    params["share"] = asked.label_smoothing / asked.classes
    _launch_sums(planned, params)


def plans(asked: Problem, operands: Operands, converted: tuple[str, ...]) -> list[Plan]:
    """The launches of `forward`, without launching."""
    folded = fit(asked, _forward_arrays(asked, operands), ("logits", "targets"))
    copies = converted + folded.copies
    first = engine.plans(*_row_engine(asked, folded.arrays))
    own = loss_plan.losses(asked, len(folded.outer), gpu.current(), copies)
    return [*(dataclasses.replace(plan, copies=copies) for plan in first), *own]


def backward(asked: Problem, operands: BackwardOperands) -> None:
    """Fill ``operands.out`` on CuPy's current stream."""
    folded, counting, planned = _plan_backward(asked, operands, ())
    params = _packed(gradient_params, asked, folded)
    divisor: float = asked.rows if asked.reduction == "mean" else 1
    if counting:
        count = _workspace((), asked.accumulator)
        of_count = _packed(loss_params, asked, folded)
        of_count["loss"] = address(count)
        _launch_sums(counting, of_count)
        params["count"] = address(count)
    if "dloss" not in folded.arrays:
        params["number"] = operands.dloss
    params["divisor"] = divisor
    params["chunk"], params["chunks"] = planned.chunk, planned.chunks
    share = asked.label_smoothing / asked.classes
    params["at_target"], params["elsewhere"] = 1 - asked.label_smoothing + share, share
    launch.launch(planned.plan, params)
    if folded.arrays["out"] is not operands.out:
        operands.out[...] = folded.arrays["out"]


def backward_plans(
    asked: Problem, operands: BackwardOperands, converted: tuple[str, ...]
) -> list[Plan]:
    """The launches of `backward`, without launching."""
    _, counting, planned = _plan_backward(asked, operands, converted)
    return [*counting, planned.plan]


def _plan_backward(
    asked: Problem, operands: BackwardOperands, converted: tuple[str, ...]
) -> tuple[Folded, tuple[Plan, ...], Gradient]:
    arrays = {name: array for name, array in vars(operands).items() if not _is_number(array)}
    # The logits first: their order in memory is that of the folded axes.
    arrays = {"logits": arrays.pop("logits"), **arrays}
    folded = fit(asked, arrays, tuple(arrays))
    device = gpu.current()
    counting: tuple[Plan, ...] = ()
    if asked.reduction == "mean" and asked.ignore_index is not None:
        counting = loss_plan.counts(asked, len(folded.outer), device)
    layout = Layout(
        folded.outer, (asked.classes,), _placement("logits", folded), _placement("out", folded)
    )
    planned = loss_plan.gradient(asked, layout, device, converted + folded.copies)
    return folded, counting, planned


def fit(asked: Problem, arrays: Arrays, replaceable: tuple[str, ...]) -> Folded:
    """Fold the rows' axes; where that leaves too many, once `replaceable` arrays are copied."""
    folded = _fold(asked, arrays)
    if len(folded.outer) <= MAX_AXES and all(map(in_elements, arrays.values())):
        return folded
    copied = {
        name: kept(array.copy(order="C")) if name in replaceable else array
        for name, array in arrays.items()
    }
    return dataclasses.replace(_fold(asked, copied), copies=replaceable)


def _fold(asked: Problem, arrays: Arrays) -> Folded:
    ndim = len(asked.shape)
    strides = [
        # A loss without axes stands still.
        [stride // array.itemsize for stride in array.strides[:ndim]] or [0] * ndim
        for array in arrays.values()
    ]
    outer, folded = fold(asked.shape, strides, range(ndim))
    return Folded(arrays, outer, dict(zip(arrays, map(tuple, folded))))


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


def _forward_arrays(asked: Problem, operands: Operands) -> Arrays:
    """The operands and what the launches leave for one another, the logits first."""
    arrays = {"logits": operands.logits, "targets": operands.targets}
    lse = operands.lse
    arrays["lse"] = _workspace(asked.shape, asked.accumulator) if lse is None else lse
    if asked.label_smoothing:
        arrays["sums"] = _workspace(asked.shape, asked.accumulator)
    return arrays | {"loss": operands.loss}


def _row_engine(asked: Problem, arrays: Arrays) -> tuple[problem.Problem, problem.Operands]:
    """The pass over the logits: every row's logsumexp, and with smoothing its sum."""
    shape = (*asked.shape, asked.classes)
    sums = arrays.get("sums")
    rows = problem.Problem(
        "cross_entropy",
        asked.dtype,
        asked.accumulator,
        shape,
        (len(asked.shape),),
        signed=sums is not None,
    )
    return rows, problem.Operands(
        x=arrays["logits"],
        out=arrays["lse"][..., None],
        sign=None if sums is None else sums[..., None],
    )


def _placement(name: str, folded: Folded) -> Placement:
    array = folded.arrays[name]
    step = array.strides[-1] // array.itemsize
    return Placement(folded.strides[name], (step,), array.itemsize, address(array) % 16)


def _packed(
    of: Callable[[str], np.dtype[Any]], asked: Problem, folded: Folded
) -> np.ndarray[Any, Any]:
    """The argument of a kernel, as far as the arrays and their layout go."""
    params = np.zeros(1, of(asked.accumulator))
    fields = params.dtype.names or ()
    for name, array in folded.arrays.items():
        if name in fields:
            params[name] = address(array)
            params[f"{name}_strides"] = engine.padded(folded.strides[name])
            if f"{name}_step" in fields:
                params[f"{name}_step"] = array.strides[-1] // array.itemsize
    params["rows"], params["classes"] = asked.rows, asked.classes
    params["outer"] = engine.padded(folded.outer)
    params["ignore_index"] = asked.ignore_index or 0
    return params


def _launch_sums(planned: tuple[Plan, ...], params: np.ndarray[Any, Any]) -> None:
    """Launch the one plan, or two of which the second adds up the parts that the first leaves."""
    *first, last = planned
    for plan in first:
        blocks = plan.grid[0]
        parts = _workspace((blocks, 2), "float64")
        params["parts"] = address(parts)
        launch.launch(plan, params)
        params["rows"] = blocks
    launch.launch(last, params)


def _workspace(shape: tuple[int, ...], dtype: str) -> Any:
    memory: Any = launch.workspace(np.dtype(dtype).itemsize * math.prod(shape))
    return memory.view(dtype).reshape(shape)
