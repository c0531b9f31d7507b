"""The NumPy twin of cross-entropy's kernels: logsumexp's recurrence over tiles of classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import cpu
from .loss_problem import BackwardOperands, Operands, Problem

Array = np.ndarray[Any, Any]


def forward(problem: Problem, operands: Operands) -> None:
    """Fill ``operands.lse`` and ``operands.loss``."""
    x, targets = operands.logits, operands.targets
    m, top, rest = cpu.empty(x), cpu.zero(x), cpu.zero(x)
    total = cpu.zero(x)  # of the logits, for label smoothing
    with np.errstate(all="ignore"):
        for tile in cpu.tiles(x):
            scores = cpu.wide(x[..., tile])
            m, top, rest = cpu.update_log(m, top, rest, scores, scores.dtype.type(1))
            if problem.label_smoothing:
                total = total + cpu.add_up(scores)
        lse = cpu.finish_log(m, top, rest)[0][..., 0]
        if operands.lse is not None:
            operands.lse[...] = lse
        counted = _counted(problem, targets)
        index = np.where(counted, targets, 0).astype(np.int64)[..., None]
        at_target = cpu.wide(np.take_along_axis(x, index, axis=-1)[..., 0])
        losses = lse - _number(problem, 1 - problem.label_smoothing) * at_target
        if problem.label_smoothing:
            losses = losses - _number(problem, _share(problem)) * total[..., 0]
        losses = np.where(counted, losses, losses.dtype.type(0))
        if problem.reduction == "none":
            operands.loss[...] = losses
        elif problem.reduction == "sum":
            operands.loss[...] = losses.sum()
        else:  # no rows have no mean
            operands.loss[...] = losses.sum() / counted.sum(dtype=losses.dtype)


def backward(problem: Problem, operands: BackwardOperands) -> None:
    """Fill ``operands.out``."""
    x, lse, targets = (
        operands.logits,
        operands.lse[..., None],
        operands.targets[..., None].astype(np.int64),
    )
    counted = _counted(problem, targets)
    with np.errstate(all="ignore"):
        scale = np.asarray(operands.dloss, lse.dtype)
        if problem.reduction == "none":
            scale = scale[..., None]
        elif problem.reduction == "mean":
            scale = scale / counted.sum(dtype=lse.dtype)
        hit, share = (
            _number(problem, 1 - problem.label_smoothing),
            _number(problem, _share(problem)),
        )
        zero = lse.dtype.type(0)
        for tile in cpu.tiles(x):  # each is read before it is written: out may be the logits
            classes = np.arange(tile.start, min(tile.stop, problem.classes))
            wanted = np.where(classes == targets, hit, zero) + share
            gradient = scale * (np.exp(cpu.wide(x[..., tile]) - lse) - wanted)
            operands.out[..., tile] = np.where(counted, gradient, zero)


def _counted(problem: Problem, targets: Array) -> Array:
    """Which rows are not ignored."""
    if problem.ignore_index is None:
        return np.ones(targets.shape, bool)
    return np.asarray(targets.astype(np.int64) != problem.ignore_index)


def _share(problem: Problem) -> float:
    """What every class gets of the smoothed target."""
    return problem.label_smoothing / problem.classes


def _number(problem: Problem, value: float) -> Any:
    return np.dtype(problem.accumulator).type(value)
