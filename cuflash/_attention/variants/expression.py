"""Expressions in Python's syntax: from a caller's text to a tree, and the tree's value in NumPy.

`ast` parses the text, each part of it is compared with what is allowed, and nothing is ever run as
Python. Names are coordinates of a score or parameters, which a caller binds. Every node has one of
three types. Integers have 32 bits and wrap; `//` and `%` are Python's, and by an integer 0 they
give 0. An index outside an array is moved to the array's nearest end. `minimum` and `maximum` of
NaN are NaN.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

Type = Literal["bool", "int", "float"]
COORDINATES: dict[str, Type] = {
    "score": "float",
    "b": "int",
    "h": "int",
    "i": "int",
    "j": "int",
    "row": "int",
    "len_q": "int",
    "len_k": "int",
}
LONGEST = 4096  # characters of a text
DEEPEST = 64  # operations within one another, as written
LARGEST = 256  # nodes of a tree
OPERATIONS: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.FloorDiv: "floor_divide",
    ast.Mod: "remainder",
    ast.USub: "negate",
    ast.Not: "not",
    ast.And: "and",
    ast.Or: "or",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "different",
}
# How many arguments each function takes.
FUNCTIONS = {"minimum": 2, "maximum": 2, "where": 3}
FUNCTIONS |= dict.fromkeys(("exp", "log", "tanh", "sqrt", "abs"), 1)
ALLOWED = (
    "names, numbers, True, False, + - * / // %, comparisons, and, or, not, `a if c else b`, "
    f"array[index] and the functions {', '.join(FUNCTIONS)}"
)
CALLED = {("int",): "an integer", ("bool",): "a truth value", ("int", "float"): "a number"}


@dataclass(frozen=True)
class Parameter:
    """What a caller binds to a name: a number, or an array with so many axes."""

    type: Type
    axes: int = 0


@dataclass(frozen=True)
class Node:
    """One operation: the type of its value, its name, and what it is applied to.

    Leaves are "constant", "coordinate" and "parameter"; "element" is an array's, at its operands.
    The rest are "float" (of an int), the values of `OPERATIONS` and the names in `FUNCTIONS`; their
    operands have one type, but for the condition of "where". A middle operand of a chained
    comparison is the same node twice.
    """

    type: Type
    operation: str
    operands: tuple[Node, ...] = ()
    value: Any = None  # of a constant, or the name of a coordinate, a parameter or an array

    @functools.cached_property
    def size(self) -> int:
        """The nodes of the tree; one that is used twice counts twice."""
        return 1 + sum(operand.size for operand in self.operands)


def subscripts(source: str) -> dict[str, int]:
    """Return the names of an expression that are no coordinates: how many subscripts each has.

    >>> from cuflash._attention.variants.expression import subscripts
    >>> subscripts("score + slope[h] * (j - i) / width")
    {'slope': 1, 'width': 0}
    """
    text = _Text(source)
    found: dict[str, int] = {}
    for node, _ in _walk(text.parsed()):
        named = node.value if isinstance(node, ast.Subscript) else node
        if not isinstance(named, ast.Name) or named.id in COORDINATES:
            continue
        axes = len(_indices(node)) if isinstance(node, ast.Subscript) else 0
        if found.setdefault(named.id, axes) != axes:
            raise text.refusal(
                node, f"subscripts of `{named.id}`: {found[named.id]} before, {axes} here"
            )
    return found


def parse(
    source: str, parameters: Mapping[str, Parameter], wanted: Literal["bool", "float"]
) -> Node:
    """Return the tree of a mask ("bool"), which must not use `score`, or of a score ("float").

    A text may have several lines, and comments. What is not allowed is a ValueError with a caret.

    >>> from cuflash._attention.variants.expression import parse
    >>> parse("j <= i", {}, "bool").operation
    'less_equal'
    """
    for name in parameters:
        if name in COORDINATES or name in FUNCTIONS or name.startswith("__"):
            raise ValueError(f"`{name}` cannot be the name of a parameter: rename it")
    text = _Text(source)
    tree = text.parsed()
    node = _Translator(text, parameters, wanted).visit(tree)
    if wanted == "bool" and node.type != "bool":
        raise text.refusal(tree, "a mask must be a truth value, a comparison for example")
    if wanted == "float" and node.type == "bool":
        raise text.refusal(tree, "a score must be a number: use where(condition, a, b)")
    return _as(wanted, node)


# The text, and what is allowed in it.


class _Text:
    """An expression as it was written, which errors show with a caret."""

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise TypeError(f"an expression must be a str, not {type(source).__name__}")
        self.lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if len(source) > LONGEST:
            self.lines = [self.lines[0][:64] + " ..."]
            raise self.refusal_at(0, 0, f"an expression has at most {LONGEST} characters")
        for number, line in enumerate(self.lines):
            column = next((n for n, each in enumerate(line) if not _is_shown(each)), None)
            if column is not None:
                why = f"the character U+{ord(line[column]):04X} is not allowed"
                raise self.refusal_at(number, column, why)

    def parsed(self) -> ast.expr:
        """Return the expression as `ast` has it, allowed but for its types."""
        tree = self._syntax()
        for node, depth in _walk(tree):
            why = _objection(node)
            if depth > DEEPEST:
                why = f"more than {DEEPEST} operations are within one another"
            if why:
                raise self.refusal(node, why)
        return tree

    def _syntax(self) -> ast.expr:
        # Within brackets line breaks mean nothing. The brackets have lines of their own, so that
        # line 2 of what is parsed is the first of the expression, and columns are the same.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # `1if` for `1 if` becomes a SyntaxError
                tree = ast.parse("\n".join(["(", *self.lines, ")"]), mode="eval").body
        except SyntaxError as error:
            number, column = (error.lineno or 1) - 2, (error.offset or 1) - 1
            why = error.msg.replace(" Perhaps you forgot a comma?", "")
            if not 0 <= number < len(self.lines):
                number, column = len(self.lines) - 1, len(self.lines[-1])
                why = "its end is missing, or brackets do not match"
            raise self.refusal_at(number, column, f"not an expression: {why}") from None
        except (MemoryError, RecursionError):
            why = f"more than {DEEPEST} operations are within one another"
            raise self.refusal_at(*self._start(), why) from None
        if tree.lineno == 1 and isinstance(tree, ast.Tuple) and not tree.elts:
            raise self.refusal_at(0, 0, "an expression must not be empty")
        if tree.lineno == 1 and not isinstance(tree, (ast.Tuple, ast.GeneratorExp)):
            raise self.refusal(tree, "brackets do not match")  # `a) + (b`, with ours around it
        return tree

    def refusal(self, node: ast.expr, why: str) -> ValueError:
        """Return an error that points at a node, whose column `ast` counts in bytes of UTF-8."""
        if node.lineno == 1:
            return self.refusal_at(*self._start(), why)
        number = node.lineno - 2
        before = self.lines[number].encode()[: node.col_offset]
        return self.refusal_at(number, len(before.decode()), why)

    def refusal_at(self, number: int, column: int, why: str) -> ValueError:
        shown = ["".join(each if _is_shown(each) else "?" for each in line) for line in self.lines]
        caret = "".join("\t" if each == "\t" else " " for each in shown[number][:column])
        shown.insert(number + 1, caret + "^")
        return ValueError("\n  ".join([why, *shown]))

    def _start(self) -> tuple[int, int]:
        number = next((n for n, line in enumerate(self.lines) if line.strip()), 0)
        line = self.lines[number]
        return number, len(line) - len(line.lstrip())


def _is_shown(character: str) -> bool:
    return character.isprintable() or character == "\t"


def _walk(tree: ast.expr) -> Iterator[tuple[ast.expr, int]]:
    """Yield an expression and its operands, each with its depth and before its own operands."""
    waiting = [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        yield node, depth
        waiting += [(operand, depth + 1) for operand in reversed(_operands(node))]


def _operands(node: ast.expr) -> Sequence[ast.expr]:
    if isinstance(node, ast.Subscript):
        return _indices(node)
    if isinstance(node, ast.Call):
        return node.args
    if _is_smallest(node):
        return []
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def _indices(node: ast.Subscript) -> Sequence[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _is_smallest(node: ast.expr) -> bool:
    """Whether this is -2**31, an int though 2**31 is none."""
    if not (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)):
        return False
    value = node.operand.value if isinstance(node.operand, ast.Constant) else None
    return isinstance(value, int) and value == 2**31


def _objection(node: ast.expr) -> str | None:
    """Return why a node is not allowed, whatever its operands, or None."""
    match node:
        case ast.Constant():
            return _constant_objection(node.value)
        case ast.Name():
            return _name_objection(node.id)
        case ast.Subscript(value=ast.Name(id=name)):
            number = f"`{name}` is a number without subscripts" if name in COORDINATES else None
            return (
                number
                or _name_objection(name)
                or (None if _indices(node) else _forbidden(node.slice))
            )
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            if node.keywords or starred or len(node.args) != FUNCTIONS[name]:
                return f"`{name}` takes arguments by position, so many: {FUNCTIONS[name]}"
            return None
        case ast.Call():
            return f"only these are functions: {', '.join(FUNCTIONS)}"
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.BoolOp(op=op):
            return None if type(op) in OPERATIONS or isinstance(op, ast.UAdd) else _forbidden(op)
        case ast.Compare(ops=ops):
            return next((_forbidden(op) for op in ops if type(op) not in OPERATIONS), None)
        case ast.IfExp():
            return None
    return _forbidden(node)


def _forbidden(thing: Any) -> str:
    return f"{type(thing).__name__} is not allowed: an expression has {ALLOWED}"


def _constant_objection(value: Any) -> str | None:
    if not isinstance(value, (int, float)):
        return _forbidden(value)
    if isinstance(value, int) and value >= 2**31:
        return "an integer must have 32 bits: from -2**31 to 2**31 - 1"
    return "a number must be finite" if math.isinf(value) else None


def _name_objection(name: str) -> str | None:
    if name.startswith("__"):
        return f"`{name}` is not allowed: a name must not begin with two underscores"
    return f"`{name}` is a function, not a number" if name in FUNCTIONS else None


# The tree, and its types.


class _Translator(ast.NodeVisitor):
    """Makes the tree of an expression that is allowed, if its types are."""

    def __init__(self, text: _Text, parameters: Mapping[str, Parameter], wanted: Type) -> None:
        self.text, self.parameters, self.wanted = text, parameters, wanted

    def make(self, where: ast.expr, kind: Type, operation: str, operands: Sequence[Node]) -> Node:
        made = Node(kind, operation, tuple(operands))
        if made.size > LARGEST:
            raise self.text.refusal(where, f"an expression has at most {LARGEST} operations")
        return made

    def operand(self, node: ast.expr, *types: Type) -> Node:
        made = self.visit(node)
        if made.type not in types:
            raise self.text.refusal(node, f"{CALLED[types]} is wanted here, not {made.type}")
        return made

    def numbers(self, nodes: Sequence[ast.expr]) -> list[Node]:
        return _alike([self.operand(node, "int", "float") for node in nodes])

    def visit_Constant(self, node: ast.Constant) -> Node:
        types: dict[type, Type] = {bool: "bool", int: "int", float: "float"}
        return Node(types[type(node.value)], "constant", value=node.value)

    def visit_Name(self, node: ast.Name) -> Node:
        if node.id == "score" and self.wanted == "bool":
            raise self.text.refusal(node, "a mask must not use `score`: masks come before scores")
        if node.id in COORDINATES:
            return Node(COORDINATES[node.id], "coordinate", value=node.id)
        return Node(self.parameter(node, node.id, 0), "parameter", value=node.id)

    def visit_Subscript(self, node: ast.Subscript) -> Node:
        assert isinstance(node.value, ast.Name)
        name, indices = node.value.id, _indices(node)
        kind = self.parameter(node, name, len(indices))
        places = tuple(self.operand(index, "int") for index in indices)
        return Node(kind, "element", places, name)

    def parameter(self, node: ast.expr, name: str, axes: int) -> Type:
        if name not in self.parameters:
            known = ", ".join([*COORDINATES, *self.parameters])
            raise self.text.refusal(node, f"`{name}` is not known: the names are {known}")
        parameter = self.parameters[name]
        if parameter.axes != axes:
            raise self.text.refusal(node, f"subscripts of `{name}`: {parameter.axes}, not {axes}")
        return parameter.type

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Node:
        if isinstance(node.op, ast.Not):
            return self.make(node, "bool", "not", [self.operand(node.operand, "bool")])
        if _is_smallest(node):
            return Node("int", "constant", value=-(2**31))
        made = self.operand(node.operand, "int", "float")
        return (
            made if isinstance(node.op, ast.UAdd) else self.make(node, made.type, "negate", [made])
        )

    def visit_BinOp(self, node: ast.BinOp) -> Node:
        made = self.numbers([node.left, node.right])
        if isinstance(node.op, ast.Div):
            made = [_as("float", each) for each in made]
        return self.make(node, made[0].type, OPERATIONS[type(node.op)], made)

    def visit_BoolOp(self, node: ast.BoolOp) -> Node:
        made = [self.operand(value, "bool") for value in node.values]
        return self.chain(node, OPERATIONS[type(node.op)], made)

    def visit_Compare(self, node: ast.Compare) -> Node:
        sides = [node.left, *node.comparators]
        made = [self.visit(side) for side in sides]
        links = []
        for op, right, pair in zip(node.ops, sides[1:], itertools.pairwise(made)):
            types = {each.type for each in pair}
            if types == {"bool"} and not isinstance(op, (ast.Eq, ast.NotEq)):
                raise self.text.refusal(right, "truth values have no order: use == or !=")
            self.agree(right, pair)
            links.append(self.make(right, "bool", OPERATIONS[type(op)], _alike(pair)))
        return self.chain(node, "and", links)

    def visit_Call(self, node: ast.Call) -> Node:
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if name == "where":
            return self.where(node, *node.args)
        made = self.numbers(node.args)
        if name not in ("minimum", "maximum", "abs"):
            made = [_as("float", each) for each in made]
        return self.make(node, made[0].type, name, made)

    def visit_IfExp(self, node: ast.IfExp) -> Node:
        return self.where(node, node.test, node.body, node.orelse)

    def where(self, node: ast.expr, test: ast.expr, a: ast.expr, b: ast.expr) -> Node:
        condition, choices = self.operand(test, "bool"), [self.visit(a), self.visit(b)]
        self.agree(b, choices)
        choices = _alike(choices)
        return self.make(node, choices[0].type, "where", [condition, *choices])

    def agree(self, where: ast.expr, made: Sequence[Node]) -> None:
        if len({each.type == "bool" for each in made}) > 1:
            raise self.text.refusal(where, "a truth value and a number do not go together")

    def chain(self, where: ast.expr, operation: str, made: Sequence[Node]) -> Node:
        join = lambda left, right: self.make(where, "bool", operation, [left, right])
        return functools.reduce(join, made)


def _as(kind: Type, node: Node) -> Node:
    return Node("float", "float", (node,)) if (node.type, kind) == ("int", "float") else node


def _alike(made: Sequence[Node]) -> list[Node]:
    """Return the nodes, with ints among floats as floats."""
    kind: Type = "float" if any(each.type == "float" for each in made) else "int"
    return [_as(kind, each) for each in made]


# The value in NumPy.

# The functions that have other names in NumPy.
NUMPY = {
    "negate": np.negative,
    "not": np.logical_not,
    "and": np.logical_and,
    "or": np.logical_or,
    "different": np.not_equal,
}


def evaluate(node: Node, names: Mapping[str, Any], number: DTypeLike) -> np.ndarray:
    """Return the value of a tree, for names bound to numbers and arrays that broadcast.

    Ints are computed in int32 and floats in `number`, float32 or float64; arrays with subscripts
    must have no axis of length 0.

    >>> import numpy as np
    >>> from cuflash._attention.variants.expression import evaluate, parse
    >>> tree = parse("j <= i and j % 2 == 0", {}, "bool")
    >>> evaluate(tree, {"i": np.array([[0], [2]]), "j": np.arange(4)}, np.float32)
    array([[ True, False, False, False],
           [ True, False,  True, False]])
    """
    dtypes = {"bool": np.dtype(bool), "int": np.dtype(np.int32), "float": np.dtype(number)}
    with np.errstate(all="ignore"):
        return np.asarray(_value(node, names, dtypes))


def _value(node: Node, names: Mapping[str, Any], dtypes: Mapping[str, np.dtype]) -> Any:
    operands = [_value(operand, names, dtypes) for operand in node.operands]
    if node.operation == "constant":
        value = node.value
    elif node.operation in ("coordinate", "parameter"):
        value = names[node.value]
    elif node.operation == "element":
        array = names[node.value]
        value = array[tuple(np.clip(at, 0, n - 1) for at, n in zip(operands, array.shape))]
    elif node.operation == "float":
        value = operands[0]
    else:  # NumPy's integers wrap, and by 0 its // and % give 0
        return (NUMPY.get(node.operation) or getattr(np, node.operation))(*operands)
    return np.asarray(value).astype(dtypes[node.type], copy=False)
