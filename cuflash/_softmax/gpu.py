"""The host side of the kernels: complete operands in, one launch or two."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..gpu_arrays import kept
from ..jit import gpu, launch
from ..jit.strides import address, in_elements
from . import layout, plan
from .layout import MAX_AXES, Layout, Placement
from .problem import Operands, Problem

# The kernels' Params, field by field (layout.cuh).
_SIZES = (np.int64, MAX_AXES)
_STRIDES = np.dtype([("outer", *_SIZES), ("reduced", *_SIZES)])
PARAMS = np.dtype(
    [
        ("x", np.uint64),
        ("weights", np.uint64),
        ("out", np.uint64),
        ("sign", np.uint64),
        ("states", np.uint64),
        ("splits", np.int64),
        ("slice", np.int64),
        ("rows", np.int64),
        ("columns", np.int64),
        ("outer", *_SIZES),
        ("reduced", *_SIZES),
        ("x_strides", _STRIDES),
        ("weights_strides", _STRIDES),
        ("out_strides", _STRIDES),
        ("sign_strides", _STRIDES),
    ],
    align=True,
)


def forward(problem: Problem, operands: Operands) -> None:
    """Fill ``operands.out``, and ``operands.sign`` if there is one, on CuPy's current stream."""
    fitting, placed, copies = fit(problem, operands)
    chosen = plan.choose(problem, placed, gpu.current(), copies)
    params = pack(placed, fitting, chosen)
    workspace = launch.workspace(chosen.workspace)
    if workspace is not None:
        params["states"] = address(workspace)
    for each in chosen.plans:
        launch.launch(each, params)
    if fitting.out is not operands.out:
        operands.out[...] = fitting.out
    if fitting.sign is not operands.sign:
        operands.sign[...] = fitting.sign


def plans(problem: Problem, operands: Operands) -> list[launch.Plan]:
    """The launches of `forward`, without launching."""
    _, placed, copies = fit(problem, operands)
    return list(plan.choose(problem, placed, gpu.current(), copies).plans)


def fit(problem: Problem, operands: Operands) -> tuple[Operands, Layout, tuple[str, ...]]:
    """Operands whose layout fits the kernels, that layout, and the names of those copied for it.

    Almost always the operands as they are. Otherwise all of them are laid out afresh, rows last.
    """
    placed = layout.of(problem, operands)
    if placed.fits and all(map(in_elements, _named(operands).values())):
        return operands, placed, ()
    order = problem.kept + problem.axes
    copied = Operands(**{name: _laid_out(array, order) for name, array in _named(operands).items()})
    return copied, layout.of(problem, copied), tuple(_named(copied))


def pack(placed: Layout, operands: Operands, chosen: plan.Launches) -> np.ndarray[Any, Any]:
    """The argument of the kernels, but for the workspace."""
    values: dict[str, Any] = {name: address(array) for name, array in _named(operands).items()}
    values |= {
        "rows": placed.rows,
        "columns": placed.columns,
        "splits": chosen.splits,
        "slice": chosen.slice,
        "outer": padded(placed.outer),
        "reduced": padded(placed.reduced),
        "x_strides": _strides(placed.x),
        "weights_strides": _strides(placed.weights),
        "out_strides": _strides(placed.out),
        "sign_strides": _strides(placed.sign),
    }
    # One conversion: each assignment to a field would cost as much.
    return np.array([tuple(values.get(name, 0) for name in PARAMS.names or ())], PARAMS)


def _named(operands: Operands) -> dict[str, Any]:
    return {name: array for name, array in vars(operands).items() if array is not None}


def _laid_out(array: Any, order: tuple[int, ...]) -> Any:
    """A copy in C order once its axes are put in `order`, seen with its axes as they were."""
    return kept(array.transpose(order).copy(order="C")).transpose(np.argsort(order).tolist())


def _strides(placement: Placement | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if placement is None:
        return padded(()), padded(())
    return padded(placement.outer), padded(placement.reduced)


def padded(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes + (0,) * (MAX_AXES - len(sizes))
