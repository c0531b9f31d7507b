"""Expressions as CUDA C++: the struct Variant that every attention kernel asks about its scores.

Scores leave the struct in base 2, as kernels want them. What depends on neither the score nor the
key is put together into one factor, which the compiler then computes once a row: a soft cap is one
multiplication, one tanh and one multiplication a score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .expression import Node
from .kinds import Kind

LOG2_E = "Number(1.4426950408889634)"
_OPERATORS = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "different": "!=",
    "and": "&",
    "or": "|",
}
_TYPES = {"int": "int", "bool": "bool", "float": "Number"}
_STRUCT = """
#include "device/expression.cuh"
struct Variant {{
  using Number = Accumulator<Element>;
  using Functions = expression::Functions<sizeof(Element) == 2>;
  using Coordinates = expression::Coordinates<Number>;
{members}  int64 entries[expression::kBatchAxes];  // what a step along each axis adds to b
  int64 first;                            // b of the launch's first entry

{streamed}{score_reads}{mask_reads}
  // log2(e) times what becomes of q k, for the key at.key + step.
  // `c`: which of this lane's elements of 32 keys that is.
  template <bool kPairs>
  __device__ __forceinline__ Number score(Number score, const Coordinates& at, int step,
                                          const ScoreReads& reads, int c) const {{
{scores}    return score;
  }}
  template <bool kPairs>
  __device__ __forceinline__ bool mask(const Coordinates& at, int step,
                                       const MaskReads& reads, int c) const {{
    return {mask};
  }}
  __device__ __forceinline__ Number sink(const Coordinates& at) const {{ return {sink}; }}
}};
"""
_READS = """
  struct {struct} {{
{members}    // Of the 32 keys that begin 8 below `key` for each lane of a row before this one.
    __device__ __forceinline__ void load(const Variant& variant, const Coordinates& at, int key) {{
{loads}    }}
    __device__ __forceinline__ void exchange() {{{exchanges} }}
{fetches}  }};
"""
_FETCH = """    // `read` finds the words of this lane's elements, in shared memory.
    template <typename Read> __device__ __forceinline__ void fetch(Read read) {{
      read({name}.words);
    }}
"""
_STREAMED = """  // The array that is in shared memory, tile by tile, and its stride along heads.
  __device__ __forceinline__ const {type}& streamed() const {{ return {name}; }}
  __device__ __forceinline__ int64 streamed_head() const {{ return {head}; }}
"""
_APPROXIMATE = ("exp", "log", "tanh", "sqrt")
_DIVISIONS = ("floor_divide", "remainder")
_INSTRUCTIONS = dict.fromkeys(_DIVISIONS, 20) | dict.fromkeys(_APPROXIMATE, 8)  # or 1, roughly
_SMALL = 1 << 20  # constants that may be added to a difference of places without wrapping


@dataclass(frozen=True)
class Trees:
    """The expressions of one variant.

    `names` says how its parameters are spelt, and `places` what its mask is where single places are
    looked at. If `blocks_decide`, all places of a tile within one block are as the tile.
    """

    score: Node | None
    mask: Node | None
    sink: Node | None
    names: Mapping[str, str]
    kinds: Mapping[str, Kind]
    places: Node | None = None
    blocks_decide: bool = False

    def seen_from_outside(self) -> Trees:
        """The same where the struct is `variant`."""
        return replace(self, names={name: f"variant.{slot}" for name, slot in self.names.items()})


def struct(variants: Sequence[Trees], slots: Sequence[Kind], streamed: int | None = None) -> str:
    """The struct Variant for variants that follow one another, with `slots` p0, p1, ... in it.

    Of the slot `streamed`, what scores read by row and key is in shared memory.
    """
    scores = [each for each in variants if each.score]
    sinks = [Writer(each).scaled(each.sink, (LOG2_E,)) for each in variants if each.sink]
    score_reads, mask_reads = Reads(None if streamed is None else f"p{streamed}"), Reads()
    masks = [_mask(each, mask_reads) for each in variants if each.places]
    lines = [
        f"static constexpr bool kHasScore = {_bool(scores)}, kHasMask = {_bool(masks)};",
        f"static constexpr bool kHasSink = {_bool(sinks)};",
        f"static constexpr bool kStreams = {_bool(streamed is not None)};",
        *(f"{_declaration(kind)} p{number};" for number, kind in enumerate(slots)),
    ]
    scored = _scores(scores, score_reads)
    return _STRUCT.format(
        members="".join(f"  {line}\n" for line in lines),
        streamed="" if streamed is None else _streamed(slots[streamed], f"p{streamed}"),
        score_reads=score_reads.text("ScoreReads"),
        mask_reads=mask_reads.text("MaskReads"),
        scores="".join(f"    score = {text};\n" for text in scored),
        mask=" & ".join(masks) or "true",
        sink=sinks[0] if sinks else "-infinity<Number>()",
    )


def _mask(variant: Trees, reads: Reads) -> str:
    """Whether a place is seen; kWholeBlocks: tiles are visited that lie within one block."""
    assert variant.places is not None
    text = Writer(variant, reads).value(variant.places)
    return f"(kWholeBlocks || {text})" if variant.blocks_decide else text


def _streamed(kind: Kind, name: str) -> str:
    head = f"{name}.strides[0]" if kind.axes == 3 else "0"
    return _STREAMED.format(type=_declaration(kind), name=name, head=head)


def streamable(variants: Sequence[Trees]) -> list[str]:
    """The arrays, by the names of their slots, of which scores read tiles: by row and key."""
    return [
        each.names[node.value]
        for each in variants
        if each.score
        for node in _all(each.score)
        if node.operation == "element" and _is_of_tile(node.operands)
    ]


def instructions(variants: Sequence[Trees]) -> int | None:
    """Roughly what masks take for each score; None where they read elements key by key."""
    masks = [each.places for each in variants if each.places]
    nodes = [node for mask in masks for node in _all(mask) if not _same_for_all_keys(node)]
    if any(node.operation == "element" for node in nodes):
        return None
    return sum(_INSTRUCTIONS.get(node.operation, 1) for node in nodes)


def _scores(variants: Sequence[Trees], reads: Reads) -> list[str]:
    """What becomes of a score, step by step: the first has the scale to apply, the last log2(e)."""
    texts = []
    for number, each in enumerate(variants):
        assert each.score is not None
        last = number == len(variants) - 1
        writer = Writer(each, reads, raw_score=number == 0)
        texts.append(writer.scaled(each.score, (LOG2_E,) if last else ()))
    return texts


class Reads:
    """The elements that are read along the keys, 32 keys at a time.

    Of the array `streamed`, a kernel has tiles brought to shared memory by itself.
    """

    def __init__(self, streamed: str | None = None) -> None:
        self.members: dict[tuple[str, str], tuple[str, str]] = {}  # by what is read: name, type
        self.streamed = streamed
        self.tile = ""  # the member for what is read of its tiles

    def brings(self, array: str, places: Sequence[Node]) -> bool:
        """Whether what stands in an array at some places is in shared memory."""
        return array == self.streamed and _is_of_tile(places)

    def name(self, array: str, kind: Kind, indices: str) -> str:
        """The member for what stands in an array at some indices and the key."""
        number = f"r{len(self.members)}"
        member = number, f"expression::Pairs<{kind.element}>"
        return self.members.setdefault((array, indices), member)[0]

    def text(self, struct: str) -> str:
        """The struct that holds them."""
        members, loads, exchanges = [], [], []
        for (array, indices), (name, kind) in self.members.items():
            members.append(f"    {kind} {name};\n")
            if name == self.tile:
                continue
            loads.append(f"      {name} = variant.{array}.pairs(at.entry, key{indices});\n")
            exchanges.append(f" {name}.exchange();")
        return _READS.format(
            struct=struct,
            members="".join(members),
            loads="".join(loads),
            exchanges="".join(exchanges),
            fetches=_FETCH.format(name=self.tile) if self.tile else "",
        )


class Writer:
    """Writes one expression; `names` says how parameters are spelt, `kinds` what they are."""

    def __init__(self, variant: Trees, reads: Reads | None = None, raw_score: bool = False) -> None:
        self.variant, self.reads = variant, reads
        self.names, self.kinds = variant.names, variant.kinds
        # The product q k, to which the scale is still to be applied.
        self.raw_score = raw_score
        self.compared = False  # what is written now decides about something: nothing is regrouped

    def value(self, node: Node) -> str:
        """The text of a node."""
        if node.operation == "constant":
            return _literal(node)
        if node.operation == "parameter":
            return self.names[node.value]
        if node.operation == "coordinate":
            return self.coordinate(node.value)
        if node.operation == "element":
            return self.element(node)
        if node.operation == "float":
            return self.as_float(node.operands[0])
        if node.type == "float" and not self.compared:
            return self.scaled(node, ())
        around, self.compared = self.compared, self.compared or node.type == "bool"
        operation = node.operation
        is_whole = operation in _DIVISIONS and node.type == "int"
        if is_whole and node.operands[1].operation != "constant":
            operation += "_by"
        text = self.call(operation, [self.value(each) for each in node.operands], node.type)
        self.compared = around
        return text

    def scaled(self, node: Node, factors: tuple[str, ...]) -> str:
        """The text of a number times factors that are the same for all keys of a row."""
        operation, operands = node.operation, node.operands
        if operation == "multiply" and _same_for_all_keys(operands[1]):
            return self.scaled(operands[0], (*factors, self.value(operands[1])))
        if operation == "divide" and _same_for_all_keys(operands[1]) and names(node, "score"):
            return self.scaled(operands[0], (*factors, f"(Number(1) / {self.value(operands[1])})"))
        if operation == "multiply" and _same_for_all_keys(operands[0]):
            return self.scaled(operands[1], (*factors, self.value(operands[0])))
        if operation in ("add", "subtract") and factors == (LOG2_E,):
            left, right = (self.scaled(each, factors) for each in operands)
            return f"({left} {_OPERATORS[operation]} {right})"
        if operation == "negate":
            return f"(-{self.scaled(operands[0], factors)})"
        if operation == "where":
            chosen, other = (self.scaled(each, factors) for each in operands[1:])
            return f"({self.value(operands[0])} ? {chosen} : {other})"
        if operation == "coordinate" and self.raw_score:
            return f"(({' * '.join((*factors, 'at.scale'))}) * score)"
        product = " * ".join(factors)
        text = self.number(node)
        return f"(({product}) * {text})" if factors else text

    def number(self, node: Node) -> str:
        """The text of a number that has no factors to be taken out."""
        if node.operation in ("constant", "parameter", "coordinate", "element", "float"):
            return self.value(node)
        return self.call(node.operation, [self.value(each) for each in node.operands], node.type)

    def call(self, operation: str, operands: Sequence[str], kind: str) -> str:
        if operation == "not":
            return f"!{operands[0]}"
        if operation == "where":
            return f"({operands[0]} ? {operands[1]} : {operands[2]})"
        if operation in _OPERATORS and kind != "int":
            return f"({operands[0]} {_OPERATORS[operation]} {operands[1]})"
        if operation == "negate" and kind == "float":
            return f"(-{operands[0]})"
        name = "absolute" if operation == "abs" else operation
        scope = "Functions::" if operation in _APPROXIMATE else "expression::"
        return f"{scope}{name}({', '.join(operands)})"

    def coordinate(self, name: str) -> str:
        if name == "score":
            return "(at.scale * score)" if self.raw_score else "score"
        return "(at.key + step)" if name == "j" else f"at.{name}"

    def element(self, node: Node) -> str:
        name, places = self.names[node.value], node.operands
        kind = self.kinds[node.value]
        if _is_key(places[-1]) and kind.keys:
            others = "".join(f", {self.value(place)}" for place in places[:-1])
            read = f"{name}.along(at.entry, at.key, step{others})"
            brought = self.reads is not None and self.reads.brings(name, places)
            in_pairs = kind.aligned and all(map(_same_for_all_keys, places[:-1]))
            if self.reads and (brought or in_pairs):
                outside = Writer(self.variant.seen_from_outside())
                indices = "".join(f", {outside.value(place)}" for place in places[:-1])
                member = self.reads.name(name, kind, indices)
                if brought:
                    self.reads.tile = member
                read = f"(kPairs ? reads.{member}.at(c) : {read})"
        else:
            read = f"{name}.at(at.entry, {', '.join(self.value(place) for place in places)})"
        return f"expression::Value<Number>::of({read})"

    def as_float(self, node: Node) -> str:
        """An integer as a number: of a place, what all keys share is converted once."""
        if node.operation in ("abs", "minimum", "maximum"):
            parts = [self.as_float(each) for each in node.operands]
            if all(_is_place(each) for each in node.operands):
                return self.call(node.operation, parts, "float")
        if _is_place(node) and (sign := _sign_of_key(node)):
            shared = self.value(_at_first_key(node))
            return f"(Number({shared}) {'+' if sign > 0 else '-'} Number(step))"
        return f"Number({self.value(node)})"


def _all(node: Node) -> Iterator[Node]:
    yield node
    for each in node.operands:
        yield from _all(each)


def names(tree: Node, coordinate: str) -> bool:
    """Whether an expression names a coordinate."""
    return any(node.operation == "coordinate" and node.value == coordinate for node in _all(tree))


def has_numbers(tree: Node) -> bool:
    """Whether there are real numbers in an expression."""
    return any(node.type == "float" for node in _all(tree))


def _declaration(kind: Kind) -> str:
    if kind.axes == 0:
        return _TYPES[kind.type]
    return f"expression::Array<{kind.element}, {kind.axes}, {_bool(kind.unit)}>"


def _bool(value: object) -> str:
    return str(bool(value)).lower()


def _is_key(node: Node) -> bool:
    return node.operation == "coordinate" and node.value == "j"


def _is_of_tile(places: Sequence[Node]) -> bool:
    """Whether an element stands at [row, j] or [h, row, j]."""
    named = [place.value if place.operation == "coordinate" else None for place in places]
    return named in (["row", "j"], ["h", "row", "j"])


def _same_for_all_keys(node: Node) -> bool:
    if node.operation == "coordinate":
        return node.value not in ("score", "j")
    return all(_same_for_all_keys(each) for each in node.operands)


def _leaves(node: Node) -> list[Node]:
    if node.operation in ("add", "subtract", "negate"):
        return [leaf for each in node.operands for leaf in _leaves(each)]
    return [node]


def _is_place(node: Node) -> bool:
    """Whether an integer is a sum or difference of two places and small constants, for no wrap."""
    places = [leaf for leaf in _leaves(node) if leaf.operation == "coordinate"]
    others = [leaf for leaf in _leaves(node) if leaf.operation != "coordinate"]
    small = [leaf.operation == "constant" and abs(leaf.value) <= _SMALL for leaf in others]
    return len(places) <= 2 and len(others) <= 2 and all(small)


def _sign_of_key(node: Node, sign: int = 1) -> int:
    """How often the key is counted in a sum: 1, -1, or 0 where it is not, or otherwise."""
    if _is_key(node):
        return sign
    if node.operation == "negate":
        return _sign_of_key(node.operands[0], -sign)
    if node.operation not in ("add", "subtract"):
        return 0
    left, right = node.operands
    turned = sign if node.operation == "add" else -sign
    total = _sign_of_key(left, sign) + _sign_of_key(right, turned)
    return total if abs(total) == 1 else 0


def _at_first_key(node: Node) -> Node:
    if _is_key(node):
        return Node("int", "coordinate", value="key")
    return Node(node.type, node.operation, tuple(map(_at_first_key, node.operands)), node.value)


def _literal(node: Node) -> str:
    if node.type == "bool":
        return "true" if node.value else "false"
    if node.type == "int":
        return f"({node.value})" if node.value > -(2**31) else "(-2147483647 - 1)"
    if not math.isfinite(node.value):
        raise ValueError(f"{node.value} has no literal")
    return f"Number({node.value!r})"
