"""Random expressions as texts, of the types that they should have, and their values by Python.

The values come from Python's own `eval`, point by point: of the expression's syntax only literals
and `a if c else b` are rewritten, as calls of functions given here. Ints are Python's and are
wrapped to 32 bits after each operation; floats are Python's, of 64 bits.
"""

from __future__ import annotations

import ast
import math
import operator
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cuflash._attention.variants.expression import COORDINATES, Parameter

PARAMETERS = {
    "width": Parameter("int"),
    "cap": Parameter("float"),
    "local": Parameter("bool"),
    "document": Parameter("int", 2),
    "slope": Parameter("float", 1),
    "seen": Parameter("bool", 1),
}
NAMES = {name: Parameter(kind) for name, kind in COORDINATES.items()} | PARAMETERS
# Other libraries round the first three differently; the rest is exact, or rounded correctly.
ROUGH = ("exp", "log", "tanh")
EXACT = ("sqrt", "abs", "minimum", "maximum", "where")
INTS = ("-2147483648", "-65537", "-7", "-3", "-1", "0", "1", "2", "5", "64", "65536", "2147483647")
FLOATS = ("0.0", "1.", ".5", "-0.25", "3.125", "1e-3", "-2.5e2", "1_0.0")
ARITHMETIC = ("+", "-", "*", "//", "%")
ORDERS = ("<", "<=", ">", ">=")


@st.composite
def expressions(
    draw: Callable[..., Any],
    wanted: str,
    names: Mapping[str, Parameter] = NAMES,
    functions: tuple[str, ...] = ROUGH + EXACT,
    depth: int = 3,
) -> str:
    """Texts of type `wanted`, "bool", "int" or "float", over the names; masks have no `score`."""
    if wanted == "bool":
        names = {name: each for name, each in names.items() if name != "score"}
    return getattr(_Writer(draw, names, functions), f"write_{wanted}")(depth)


class _Writer:
    """Writes a text by drawing from the grammar; each method's texts have one type."""

    def __init__(self, draw, names: Mapping[str, Parameter], functions: tuple[str, ...]) -> None:
        self.draw, self.names, self.functions = draw, names, functions

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def one_of(self, functions: tuple[str, ...]) -> str:
        return self.pick(*(name for name in functions if name in self.functions))

    def leaf(self, kind: str, literals: tuple[str, ...]) -> str:
        names = [name for name, each in self.names.items() if each.type == kind]
        name = self.pick(*literals[:1], *names, *literals)
        axes = self.names[name].axes if name in self.names else 0
        if not axes:
            return name
        return f"{name}[{', '.join(self.pick('i', 'j', '-1', '0', '1') for _ in range(axes))}]"

    def element(self, kind: str, depth: int) -> str:
        arrays = [name for name, each in self.names.items() if each.type == kind and each.axes]
        if not arrays:
            return getattr(self, f"write_{kind}")(depth)
        name = self.pick(*arrays)
        return f"{name}[{', '.join(self.write_int(depth) for _ in range(self.names[name].axes))}]"

    def arithmetic(self, left: str, op: str, right: str) -> str:
        """Brackets are often left out, so that precedence matters; types do not depend on it."""
        return self.pick("({} {} {})", "{} {} {}", "{}{}{}").format(left, op, right)

    def choice(self, kind: str, depth: int) -> str:
        write = getattr(self, f"write_{kind}")
        other = self.write_int if kind == "float" and self.draw(st.booleans()) else write
        form = self.pick("({1} if {0} else {2})", "where({0}, {1}, {2})", "where({0}, {2}, {1})")
        return form.format(self.write_bool(depth), write(depth), other(depth))

    def number(self, depth: int) -> str:
        return self.write_int(depth) if self.draw(st.booleans()) else self.write_float(depth)

    def write_int(self, depth: int) -> str:
        form = self.pick("arithmetic", "leaf", "negate", "call", "element", "choice")
        if depth == 0 or form == "leaf":
            return self.leaf("int", INTS)
        below = lambda: self.write_int(depth - 1)
        if form == "arithmetic":
            return self.arithmetic(below(), self.pick(*ARITHMETIC), below())
        if form == "negate":
            return self.pick("-{}", "-({})", "+{}").format(below())
        if form == "call":
            name = self.one_of(("abs", "minimum", "maximum"))
            return f"abs({below()})" if name == "abs" else f"{name}({below()}, {below()})"
        return getattr(self, form)("int", depth - 1)

    def write_float(self, depth: int) -> str:
        form = self.pick("arithmetic", "leaf", "negate", "call", "bound", "element", "choice")
        if depth == 0 or form == "leaf":
            return self.leaf("float", FLOATS)
        below = lambda: self.write_float(depth - 1)
        if form == "arithmetic":
            sides = [below(), self.number(depth - 1)]
            sides.sort(key=lambda _: self.draw(st.booleans()))
            return f"({sides[0]} {self.pick(*ARITHMETIC, '/')} {sides[1]})"
        if form == "negate":
            return self.pick("-{}", "-({})").format(below())
        if form == "call":
            return f"{self.one_of((*ROUGH, 'sqrt'))}({self.number(depth - 1)})"
        if form == "bound":
            name = self.one_of(("minimum", "maximum"))
            return f"{name}({self.number(depth - 1)}, {below()})"
        return getattr(self, form)("float", depth - 1)

    def write_bool(self, depth: int) -> str:
        form = self.pick("order", "same", "leaf", "join", "not", "equal", "element", "choice")
        if depth == 0 or form == "leaf":
            return self.leaf("bool", ("True", "False"))
        below = lambda: self.write_bool(depth - 1)
        if form == "order":  # all of them chains, perhaps with only two sides
            sides = [self.number(depth - 1) for _ in range(self.pick(2, 2, 3))]
            return "(" + self._chained(sides, ORDERS) + ")"
        if form == "same":  # of ints: floats that differ in a digit would be another case
            sides = [self.write_int(depth - 1) for _ in range(self.pick(2, 2, 3))]
            return "(" + self._chained(sides, ("==", "!=", *ORDERS)) + ")"
        if form == "join":
            return f"({below()} {self.pick('and', 'or')} {below()})"
        if form == "not":
            return f"(not {below()})"
        if form == "equal":
            return f"({below()} {self.pick('==', '!=')} {below()})"
        return getattr(self, form)("bool", depth - 1)

    def _chained(self, sides: list[str], operators: tuple[str, ...]) -> str:
        return sides[0] + "".join(f" {self.pick(*operators)} {side}" for side in sides[1:])


# What names are bound to.

SHAPE = (3, 4)
ARRAYS = {
    "document": np.array([[0, 0, 1, 1, 2], [3, -4, 5, 2**31 - 1, 7]], np.int32),
    "slope": np.array([0.5, -0.25, 2.0, 1.5]),
    "seen": np.array([True, False, True]),
}


@st.composite
def points(draw: Callable[..., Any]) -> dict[str, np.ndarray]:
    """Names bound to arrays that broadcast to SHAPE, and to the arrays with subscripts."""
    several = lambda each, count: draw(st.lists(each, min_size=count, max_size=count))
    scores = st.floats(-8, 8, width=16) | st.floats()
    names = {name: draw(st.integers(0, 5)) for name in ("b", "h", "len_q", "len_k")} | {
        "score": np.reshape(several(scores, math.prod(SHAPE)), SHAPE),
        "i": np.reshape(several(st.integers(-20, 300), SHAPE[0]), (-1, 1)),
        "j": several(st.integers(0, 300), SHAPE[1]),
        "row": draw(st.integers(0, 300)),
        "width": draw(st.integers(-(2**31), 2**31 - 1)),
        "cap": draw(st.floats(-8, 8, width=32)),
        "local": draw(st.booleans()),
    }
    return {name: np.asarray(each) for name, each in (names | ARRAYS).items()}


def each_point(names: Mapping[str, np.ndarray], call: Callable[[dict], Any]) -> np.ndarray:
    """Return what a call gives for the names of one point, for all points of SHAPE."""
    found = []
    for place in np.ndindex(SHAPE):
        at = lambda each, place=place: np.broadcast_to(each, SHAPE)[place]
        found.append(call({n: x if n in ARRAYS else at(x) for n, x in names.items()}))
    return np.array(found).reshape(SHAPE)


# Python's values.


def wrapped(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


class Number:
    """An int of 32 bits or a float, with Python's operators; what Python raises has a value."""

    def __init__(self, value: float) -> None:
        self.value = wrapped(value) if isinstance(value, int) else value

    def pair(self, other: Number) -> tuple[float, float]:
        kind = float if float in (type(self.value), type(other.value)) else int
        return kind(self.value), kind(other.value)

    def __truediv__(self, other: Number) -> Number:
        return Number(divided(float(self.value), float(other.value)))

    def __floordiv__(self, other: Number) -> Number:
        a, b = self.pair(other)
        return Number(a // b if b else 0 if type(b) is int else divided(a, b))

    def __mod__(self, other: Number) -> Number:
        a, b = self.pair(other)
        return Number(a % b if b else 0 if type(b) is int else math.nan)

    def __neg__(self) -> Number:
        return Number(-self.value)

    def __pos__(self) -> Number:
        return self

    def __abs__(self) -> Number:
        return Number(abs(self.value))

    def __index__(self) -> int:
        return operator.index(self.value)


def _give_operators() -> None:
    for name in ("add", "sub", "mul"):
        apply = getattr(operator, name)
        setattr(Number, f"__{name}__", lambda a, b, f=apply: Number(f(*a.pair(b))))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        apply = getattr(operator, name)
        setattr(Number, f"__{name}__", lambda a, b, f=apply: f(*a.pair(b)))


_give_operators()


def divided(a: float, b: float) -> float:
    if b:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)


class Array:
    """An array whose indices outside it are moved to its nearest end."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __getitem__(self, indices: Any) -> Any:
        indices = indices if isinstance(indices, tuple) else (indices,)
        places = [
            sorted((0, int(operator.index(at)), n - 1))[1]
            for at, n in zip(indices, self.values.shape)
        ]
        return scalar(self.values[tuple(places)].item())


def scalar(value: Any) -> Any:
    return value if isinstance(value, bool) else Number(value)


def extreme(choose: Callable[..., float]) -> Callable[[Number, Number], Number]:
    def chosen(a: Number, b: Number) -> Number:
        pair = a.pair(b)
        return Number(math.nan if any(map(math.isnan, pair)) else choose(pair))

    return chosen


def where(condition: bool, a: Any, b: Any) -> Any:
    if isinstance(a, bool):
        return a if condition else b
    return Number(a.pair(b)[0 if condition else 1])


def rough(function: Callable[[float], float], noise: Callable[[], float]):
    """The function, with a value where Python raises, times 1 + noise."""

    def applied(a: Number) -> Number:
        value = float(a.value)
        try:
            return Number(function(value) * (1 + noise()))
        except OverflowError:
            return Number(math.inf)
        except ValueError:
            return Number(-math.inf if function is math.log and value == 0 else math.nan)

    return applied


class _Rewriter(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Call(ast.Name("scalar", ast.Load()), [node], [])

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return ast.Call(ast.Name("where", ast.Load()), [node.test, node.body, node.orelse], [])


def by_python(source: str, size: float, seed: int, names: Mapping[str, Any]) -> Any:
    """Return the value at one point, a bool, an int or a float, for names bound to NumPy's.

    Each value of exp, log and tanh is off by up to `size` of it.
    """
    draw = random.Random(seed)
    noise = lambda: draw.uniform(-size, size)
    scope = {"__builtins__": {}, "scalar": scalar, "where": where, "abs": abs}
    scope |= {"minimum": extreme(min), "maximum": extreme(max), "sqrt": rough(math.sqrt, lambda: 0)}
    scope |= {name: rough(getattr(math, name), noise) for name in ROUGH}
    for name, value in names.items():
        scope[name] = Array(value) if np.ndim(value) else scalar(np.asarray(value).item())
    tree = ast.fix_missing_locations(_Rewriter().visit(ast.parse(source, mode="eval")))
    value = eval(compile(tree, "expression", "eval"), scope)
    return value.value if isinstance(value, Number) else value
