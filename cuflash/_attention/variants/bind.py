"""The variants that one call asks for: checked, bound to its arrays, and put in their order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import arrays
from ...jit.strides import address, in_elements
from ..check import broadcast, in_range
from ..problem import Operands, sum_dtype
from . import blocks, registry
from .kinds import ARRAYS, IN_PAIRS, Kind
from .program import Program, Step, program
from .variant import Part, Variant

Facts = dict[str, int | str | None]  # of a call, by name


@dataclass(frozen=True)
class Asked:
    """What a call says of variants, before its arrays are looked at."""

    softcap: float | None
    arrays: dict[str, Any]  # by the names of their keywords
    variant: Variant | None

    @property
    def named_arrays(self) -> dict[str, Any]:
        """All arrays, named as in messages."""
        parts = () if self.variant is None else self.variant.parts
        own = {
            _label(number, name): value
            for number, part in enumerate(parts)
            for (name, axes), value in zip(part.axes, part.values or ())
            if axes
        }
        return {**self.arrays, **own}


def asked(softcap: Any, variant: Any, **of_keywords: Any) -> Asked:
    """Check what is no array."""
    if variant is not None and not isinstance(variant, Variant):
        raise TypeError(f"`variant` must be a cuflash.Variant, not {type(variant).__name__}")
    if variant is not None and variant.missing:
        missing = ", ".join(f"{name}=..." for name in variant.missing)
        raise ValueError(f"`variant` lacks values: call it with ({missing})")
    cap = None if softcap is None else registry.softcap(softcap)
    return Asked(cap, {name: x for name, x in of_keywords.items() if x is not None}, variant)


def bind(
    call: Asked,
    native: dict[str, Any],
    operands: Operands,
    dtype: str,
    start: int | None = None,
    length: int | None = None,
) -> tuple[Program, tuple[Any, ...]]:
    """Return the program of a call for inputs of this dtype, and the values of its slots.

    `start` and `length` are q_start and kv_lengths where these are no arrays.
    """
    if call.softcap is not None:
        # A cap, and one over it, are normal numbers of the dtype that scores have.
        least = 2 * float(np.finfo(sum_dtype(dtype)).tiny)
        in_range("softcap", call.softcap, least, 1 / least)
    steps: list[Step] = []
    values: list[Any] = []

    def add(step: Step, bound: list[Any]) -> None:
        steps.append(step)
        values.extend(bound)

    facts = _facts(operands, dtype, start, length)
    for entry in registry.BEFORE:
        _add_keyword(entry, call, native, operands, add)
    for number, part in enumerate(() if call.variant is None else call.variant.parts):
        bound = [
            native[_label(number, name)] if axes else value
            for (name, axes), value in zip(part.axes, part.values or ())
        ]
        add(_step(number, part, bound, operands, facts), bound)
    for entry in registry.AFTER:
        _add_keyword(entry, call, native, operands, add)
    try:
        return program(tuple(steps)), tuple(values)
    except ValueError as refusal:
        raise ValueError(f"`variant` has an expression that is refused:\n{refusal}") from None


def _label(number: int, name: str) -> str:
    return f"variant's {name}" if number == 0 else f"variant's {name} ({number + 1})"


def _add_keyword(
    entry: registry.Entry, call: Asked, native: dict[str, Any], operands: Operands, add: Any
) -> None:
    name = entry.keyword
    if name == "softcap" and call.softcap is not None:
        kind, value = Kind("float"), call.softcap
    elif name in call.arrays:
        value = _broadcast(entry, native[name], operands)
        kind = _kind(name, value, len(entry.axes), operands, entry.dtypes)
    else:
        return
    add(Step(name, entry.score, entry.mask, entry.sink, ((name, kind),)), [value])


def _broadcast(entry: registry.Entry, value: Any, operands: Operands) -> Any:
    *batch, heads, len_q, _ = operands.q.shape
    lengths = {"h": heads, "i": len_q, "j": operands.k.shape[-2]}
    shape = (*batch, *(lengths[axis] for axis in entry.axes))
    try:
        return broadcast(value, shape)
    except ValueError:
        letters = {"h": "heads", "i": "len_q", "j": "len_k"}
        axes = ", ".join(["...", *(letters[axis] for axis in entry.axes)])
        raise ValueError(
            f"`{entry.keyword}` must have a shape that broadcasts to ({axes}), {shape}, not "
            f"{value.shape}"
        ) from None


def _step(number: int, part: Part, bound: list[Any], operands: Operands, facts: Facts) -> Step:
    kinds = []
    for (name, axes), value in zip(part.axes, bound):
        if not axes:
            kinds.append((name, Kind(type(value).__name__)))
            continue
        label = _label(number, name)
        if value is None:
            raise TypeError(f"`{label}` must be an array, not None")
        if value.ndim != axes:
            raise ValueError(
                f"`{label}` must have as many axes as subscripts, {axes}, not shape {value.shape}"
            )
        if value.size == 0 and operands.q.size and operands.k.size:
            raise ValueError(f"`{label}` must have elements, but its shape is {value.shape}")
        dtypes = tuple(ARRAYS)
        if part.blocks and name == part.blocks.name:
            blocks.check(label, part.blocks, value.shape, facts)
            dtypes = (part.blocks.dtype,)
        kinds.append((name, _kind(label, value, axes, operands, dtypes)))
    step = Step("variant", part.score, part.mask, kinds=tuple(kinds))
    if part.blocks:
        step = replace(step, blocks=part.blocks.size, places=part.blocks.places)
    return step


def _facts(operands: Operands, dtype: str, start: int | None, length: int | None) -> Facts:
    """What blocks may have been made for; None for what arrays decide."""
    *batch, heads, len_q, _ = operands.q.shape
    len_k = operands.k.shape[-2]
    keys = len_k if length is None else length
    known_keys = None if operands.kv_lengths is not None else keys
    first = start
    if start is None and operands.q_start is None and known_keys is not None:
        first = known_keys - len_q
    facts: Facts = {"batch": math.prod(batch), "heads": heads, "len_q": len_q, "len_k": len_k}
    return facts | {"q_start": first, "kv_lengths": known_keys, "dtype": dtype}


def _kind(label: str, value: Any, axes: int, operands: Operands, dtypes: tuple[str, ...]) -> Kind:
    dtype = arrays.dtype_name(value.dtype)
    if dtype not in dtypes:
        raise TypeError(f"`{label}` must have dtype {' or '.join(dtypes)}, not {dtype}")
    if math.prod(value.shape) and not in_elements(value):
        raise ValueError(f"`{label}` must begin, and have strides, at whole elements")
    unit = value.shape[-1] <= 1 or value.strides[-1] == value.itemsize
    eight = 8 * value.itemsize
    strides = (stride for stride, length in zip(value.strides[:-1], value.shape) if length > 1)
    aligned = dtype in IN_PAIRS and unit and value.shape[-1] % 8 == 0
    aligned = aligned and all(each % eight == 0 for each in (address(value), *strides))
    return Kind(dtype, axes, unit, value.shape[-1] >= operands.k.shape[-2], aligned)
