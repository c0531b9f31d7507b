"""Masks on ranges, as CUDA C++: which tiles they leave empty, and which they leave whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cuda import Trees
from .expression import Node

_ON_INTEGERS_TOO = (
    *("add", "subtract", "multiply", "divide", "floor_divide", "remainder", "negate", "abs"),
    *("minimum", "maximum"),
)
_NAMES = {"not": "negation", "and": "both", "or": "either"}
_FUNCTION = """
#include "device/interval.cuh"
// Whether the variants' masks hide some places of a tile, and show some.
__device__ interval::Truth visible(const Variant& variant, const interval::Area& at) {{
  return {text};
}}
"""


def function(variants: Sequence[Trees]) -> str:
    """The function that classifies a tile, for the masks of these variants."""
    text = "interval::known(true)"
    for each in variants:
        if each.mask:
            text = f"interval::both({text}, {_range(each.mask, each.names)})"
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
    operands = ", ".join(_range(each, names) for each in node.operands)
    if operation == "element":
        array = f"variant.{names[node.value]}"
        return f"interval::element<Variant::Number>({array}, at.entry, {operands})"
    if operation == "float":
        return f"interval::rounded<false>({operands})"
    name = _NAMES.get(operation, operation)
    if operation in _ON_INTEGERS_TOO:
        name += f"<{'true' if node.type == 'int' else 'false'}>"
    return f"interval::{name}({operands})"
