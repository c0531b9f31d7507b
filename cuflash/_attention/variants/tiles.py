"""Masks on ranges, as CUDA C++: which tiles they leave empty, and which they leave whole."""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
_FUNCTIONS = """
#include "device/interval.cuh"
// Elements along the keys of arrays of truth values, too many for a lane: a warp looks at them.
constexpr int kDense = {count};
template <typename Enough>
__device__ interval::Truth dense_part(int number, const Variant& variant, const interval::Area& at,
                                      int lane, Enough enough) {{
{parts}  return {{true, true}};
}}
// Whether the variants' masks hide some places of a tile, and show some.
// `dense`: what is known of those elements.
__device__ interval::Truth visible(const Variant& variant, const interval::Area& at,
                                   const interval::Truth (&dense)[kDense + 1]) {{
  return {text};
}}
"""


def functions(variants: Sequence[Trees]) -> tuple[str, bool]:
    """The functions that classify a tile, for the masks of these variants, and whether a warp has
    elements to look at."""
    dense: dict[str, int] = {}
    ranges = [_Ranges(each, dense).text(each.mask) for each in variants if each.mask]
    text = functools.reduce(lambda left, right: _call("both", left, _later(right)), ranges)
    parts = [f"  if (number == {number}) return {part};\n" for part, number in dense.items()]
    return _FUNCTIONS.format(count=len(dense), parts="".join(parts), text=text), bool(dense)


class _Ranges:
    """Writes the masks of a variant; `dense` collects and numbers what a warp looks at."""

    def __init__(self, variant: Trees, dense: dict[str, int]) -> None:
        self.names, self.kinds, self.dense = variant.names, variant.kinds, dense

    def text(self, node: Node) -> str:
        """The text of a node."""
        operation = node.operation
        if operation == "constant":
            if node.type == "bool":
                return f"interval::known({str(node.value).lower()})"
            number = "Variant::Number" if node.type == "float" else "double"  # as it is compared
            return f"interval::exactly({number}({node.value!r}))"
        if operation == "coordinate":
            return f"at.{node.value}"
        if operation == "parameter":
            return f"interval::of_value(variant.{self.names[node.value]})"
        first, *others = map(self.text, node.operands)
        if operation == "element":
            return self.element(node, first, *others)
        if operation == "float":
            return _call("rounded<false>", first)
        name = _NAMES.get(operation, operation)
        if operation in _ON_INTEGERS_TOO:
            name += f"<{'true' if node.type == 'int' else 'false'}>"
        if operation in _LAZY:
            others = [_later(each) for each in others]
        return _call(name, first, *others)

    def element(self, node: Node, *indices: str) -> str:
        array, kind = f"variant.{self.names[node.value]}", self.kinds[node.value]
        text = _call("element<Variant::Number>", array, "at.entry", *indices)
        if kind.dtype != "bool" or kind.axes < 2 or not kind.unit or indices[-1] != "at.j":
            return text
        width = 8 if kind.aligned else 1
        part = _call(f"part_of_elements<{width}>", array, "at.entry", "lane", "enough", *indices)
        number = self.dense.setdefault(part, len(self.dense))
        return _call("narrowed", text, f"dense[{number}]")


def _call(name: str, *operands: str) -> str:
    return f"interval::{name}({', '.join(operands)})"


def _later(text: str) -> str:
    return f"[&] {{ return {text}; }}"
