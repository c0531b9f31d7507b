"""Masks on ranges, as CUDA C++: which tiles they leave empty, and which they leave whole."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from .cuda import Trees
from .expression import Node

_ON_INTEGERS_TOO = (
    *("add", "subtract", "multiply", "divide", "floor_divide", "remainder", "negate", "abs"),
    *("minimum", "maximum"),
)
_NAMES = {"not": "negation", "and": "both", "or": "either"}
# Of these the first operand may decide alone. The others are then not evaluated: `kinds == 2 or
# (kinds == 1 and m)` of a BlockMask looks for what m reads only in blocks that m divides.
_LAZY = ("and", "or", "where")
_FUNCTION = """
#include "device/interval.cuh"
// Whether the variants' masks hide some places of a tile, and show some.
__device__ interval::Truth visible(const Variant& variant, const interval::Area& at) {{
  return {text};
}}
"""


def function(variants: Sequence[Trees]) -> str:
    """The function that classifies a tile, for the masks of these variants."""
    ranges = [_range(each.mask, each.names) for each in variants if each.mask]
    text = functools.reduce(lambda left, right: _call("both", left, _later(right)), ranges)
    return _FUNCTION.format(text=text)


def _range(node: Node, names: Mapping[str, str]) -> str:
    operation = node.operation
    if operation == "constant":
        if node.type == "bool":
            return f"interval::known({str(node.value).lower()})"
        number = "Variant::Number" if node.type == "float" else "double"  # as it is compared with
        return f"interval::exactly({number}({node.value!r}))"
    if operation == "coordinate":
        return f"at.{node.value}"
    if operation == "parameter":
        return f"interval::of_value(variant.{names[node.value]})"
    first, *others = (_range(each, names) for each in node.operands)
    if operation == "element":
        array = f"variant.{names[node.value]}"
        return _call("element<Variant::Number>", array, "at.entry", first, *others)
    if operation == "float":
        return _call("rounded<false>", first)
    name = _NAMES.get(operation, operation)
    if operation in _ON_INTEGERS_TOO:
        name += f"<{'true' if node.type == 'int' else 'false'}>"
    if operation in _LAZY:
        others = [_later(each) for each in others]
    return _call(name, first, *others)


def _call(name: str, *operands: str) -> str:
    return f"interval::{name}({', '.join(operands)})"


def _later(text: str) -> str:
    return f"[&] {{ return {text}; }}"
