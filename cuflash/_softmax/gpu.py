"""The host side of the kernels: complete operands in, one launch or two."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..jit import gpu, launch
from ..jit.strides import address
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
    if placed.fits and all(map(_in_elements, _named(operands).values())):
        return operands, placed, ()
    order = problem.kept + problem.axes
    copied = Operands(**{name: _laid_out(array, order) for name, array in _named(operands).items()})
    return copied, layout.of(problem, copied), tuple(_named(copied))


def pack(placed: Layout, operands: Operands, chosen: plan.Launches) -> np.ndarray[Any, Any]:
    """The argument of the kernels, but for the workspace."""
    params = np.zeros(1, PARAMS)
    for name, array in _named(operands).items():
        params[name] = address(array)
    params["rows"], params["columns"] = placed.rows, placed.columns
    params["splits"], params["slice"] = chosen.splits, chosen.slice
    params["outer"], params["reduced"] = _padded(placed.outer), _padded(placed.reduced)
    placements: dict[str, Placement | None] = {
        "x": placed.x,
        "weights": placed.weights,
        "out": placed.out,
        "sign": placed.sign,
    }
    for name, placement in placements.items():
        if placement is not None:
            params[f"{name}_strides"]["outer"] = _padded(placement.outer)
            params[f"{name}_strides"]["reduced"] = _padded(placement.reduced)
    return params


def _named(operands: Operands) -> dict[str, Any]:
    return {name: array for name, array in vars(operands).items() if array is not None}


def _in_elements(array: Any) -> bool:
    """Whether the strides are whole numbers of elements; fields of records may not be."""
    return all(stride % array.itemsize == 0 for stride in array.strides)


def _laid_out(array: Any, order: tuple[int, ...]) -> Any:
    """A copy in C order once its axes are put in `order`, seen with its axes as they were."""
    return array.transpose(order).copy(order="C").transpose(np.argsort(order).tolist())


def _padded(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes + (0,) * (MAX_AXES - len(sizes))
